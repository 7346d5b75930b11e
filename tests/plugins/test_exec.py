"""exec: the conformance suite, and what is a program's own: its words, its group, its end and what it says."""

import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whimbrel.abc import Patience
from whimbrel.capture.receiving import Reception
from whimbrel.errors import (
    ChannelClosed,
    ChannelLost,
    ConfigError,
    ConnectError,
    HandoverUndecided,
    MigrationCancelled,
    MigrationRefused,
)
from whimbrel.plugins import PluginManager
from whimbrel.testing.transports import Task, TransportConformance, receive_all, send_until_it_fails
from whimbrel_transports import _program
from whimbrel_transports._words import split
from whimbrel_transports.exec import ExecTransport

LONG = 20.0


class TestExec(TransportConformance):
    duplex = False
    close_abandons = True
    nobody = "/nonexistent/program"
    bad_addresses = ("", " ", "cat | cat", "cat > file", "'open", "\0", "\udfff")

    def make(self):
        return ExecTransport()

    def ends(self, tmp_path):
        fifo = tmp_path / str(len(list(tmp_path.iterdir())))
        os.mkfifo(fifo)
        return f"sh -c 'cat > {fifo}'", f"cat {fifo}"


@pytest.fixture
def write(tidy):
    """Starts a command to write to."""
    made = []

    def start(command):
        made.append(ExecTransport().connect(command, Patience(LONG)))
        return made[-1]

    yield start
    for channel in made:
        channel.close()


@pytest.fixture
def read(tidy):
    """Starts a command to read from."""
    made = []

    def start(command):
        listener = ExecTransport().listen(command)
        made.append(listener)
        made.append(listener.accept(Patience(LONG)))
        return made[-1]

    yield start
    for one in made:
        one.close()


def script(text):
    """A command that has a shell."""
    return shlex.join(["sh", "-c", text])


# ------------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cat", ["cat"]),
        ("  gzip   -c\t-9 ", ["gzip", "-c", "-9"]),
        ("sh -c 'cat > $FILE'", ["sh", "-c", "cat > $FILE"]),
        ('sh -c "cat > FILE"', ["sh", "-c", "cat > FILE"]),
        (r'sh -c "cat > \$FILE"', ["sh", "-c", "cat > $FILE"]),
        (r"ssh host cat \> a\ file", ["ssh", "host", "cat", ">", "a file"]),
        ("a '' b", ["a", "", "b"]),
        ("dd of=file bs=1M", ["dd", "of=file", "bs=1M"]),
        ("xargs -I{} echo a#b x~", ["xargs", "-I{}", "echo", "a#b", "x~"]),
        ("'a=b' c", ["a=b", "c"]),
    ],
)
def test_a_command_is_split_as_a_shell_would(command, words):
    assert split(command) == words


@pytest.mark.parametrize(
    ("command", "character"),
    [
        *((f"cat {character} file", character) for character in "|&;<>()$`*?[\n\r"),
        ("cat>file", ">"),
        ("cat a|b", "|"),
        ('cat "$HOME"', "$"),
        ('cat "`id`"', "`"),
        ("cat ~/file", "~"),
        ("cat file # comment", "#"),
    ],
)
def test_what_needs_a_shell_is_refused_and_the_error_says_how_to_have_one(command, character):
    with pytest.raises(ConfigError) as caught:
        ExecTransport().connect(command, Patience(LONG))
    assert f"has {character!r} in it, which is for a shell to act on" in caught.value.message
    assert "exec:sh -c '...'" in str(caught.value)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "names no program"),
        ("''", "names no program"),
        ("'open", "has a quote ' that does not close"),
        ("open\\", "ends in a backslash"),
        ("A=b cat", "begins with a variable.*; write exec:env NAME=VALUE"),
        ("cat \0", "zero byte"),
        ("\udfff", "cannot be written for the system"),
    ],
)
def test_commands_that_cannot_be(command, message):
    with pytest.raises(ConfigError, match=message):
        ExecTransport().listen(command)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1))
def test_whatever_is_quoted_goes_through(words):
    if words[0]:
        assert split(shlex.join(words)) == words


LETTERS = st.sampled_from(" abc=~#'\"\\$`|&;<>()*?[]{}!\n\t-")
PIECES = st.one_of(
    st.sampled_from([" ", "  ", "\t", "a", "b=", "x~", "#", "{}", "!", "''", '""']),
    LETTERS.map(lambda letter: f"\\{letter}"),
    st.text(LETTERS, max_size=4).map(lambda text: f"'{text}'"),
    st.text(LETTERS, max_size=4).map(lambda text: f'"{text}"'),
    LETTERS,
)


@given(st.lists(PIECES, max_size=5).map("".join))
@settings(max_examples=150, deadline=None)
@example("a\\\nb \"a\\\nb\" '\\\n'")
@example('"\\a\\$\\"" a#b #')
def test_what_is_taken_is_what_a_shell_would_have_made_of_it(text):
    """The real shell is asked: its words are ours, unless ours are an error."""
    command = f"x {text}"
    try:
        words = split(command)
    except ConfigError:
        return
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, cwd="/", check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


# ---------------------------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize(
    ("command", "reason"),
    [("/nonexistent/program -x", "No such file or directory"), ("/etc/passwd", "Permission denied")],
)
def test_what_cannot_be_started_says_so_in_the_words_of_qemu(tidy, command, reason):
    with pytest.raises(ConnectError) as caught:
        ExecTransport().connect(command, Patience(LONG))
    assert caught.value.message == f"Failed to connect to '{command}': {reason}"
    with pytest.raises(ConnectError) as caught:
        ExecTransport().listen(command)
    assert caught.value.message == f"Failed to listen on '{command}': {reason}"


def test_a_kernel_that_cannot_watch_it_leaves_nothing_running(tidy, monkeypatch):
    def pidfd_open(number):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with pytest.raises(ConnectError, match=r"Failed to connect to 'sleep 1000': Function not implemented"):
        ExecTransport().connect("sleep 1000", Patience(LONG))


def test_it_runs_alone_with_the_environment_of_the_caller(read, monkeypatch):
    monkeypatch.setenv("WHIMBREL_TEST", "heard")
    said = receive_all(read(script("echo $WHIMBREL_TEST; echo $$; cut -d' ' -f5,6 /proc/$$/stat; ls -l /proc/$$/fd")))
    environment, number, group, *descriptors = said.decode().split("\n")
    assert environment == "heard"
    assert group == f"{number} {number}"  # a group and a session of its own
    there = {line.split()[-3]: line.split()[-1] for line in descriptors if "->" in line}
    assert set(there) == {"0", "1", "2"}
    assert there["0"] == os.devnull
    assert there["1"].startswith("pipe:")


def test_a_writer_has_nowhere_to_write_to(write, tmp_path):
    channel = write(script(f"is=$(readlink /proc/$$/fd/1); echo $is > {tmp_path}/out; cat > /dev/null"))
    channel.end_writing()
    assert (tmp_path / "out").read_text().strip() == os.devnull


def test_a_broken_pipe_ends_it_as_it_would_in_a_shell(read, tmp_path):
    """Python ignores SIGPIPE, and what is ignored would stay so in the program."""
    channel = read("yes")
    ignored = Path(f"/proc/{channel._program._group}/status").read_text().split("SigIgn:")[1].split()[0]
    assert not int(ignored, 16) & (1 << (signal.SIGPIPE - 1))


# ------------------------------------------------------------------------------------------------- how it ends counts


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("echo 'no room' >&2; exit 3", "ended with status 3; it said: no room"),
        ("head -c 300000 > /dev/null; echo 'no room' >&2; exit 3", "ended with status 3; it said: no room"),
        ("kill -9 $$", "was killed by SIGKILL"),
        ("head -c 300000 > /dev/null; kill -SEGV $$", "was killed by SIGSEGV"),
        ("echo 1 >&2; echo 2 >&2; echo 3 >&2; echo 4 >&2; exit 1", "ended with status 1; it said: 2 / 3 / 4"),
        ("head -c 300000 > /dev/null", "ended with status 0 before it had taken everything"),
        ("exec 0<&-; exec sleep 1000", "runs on, but takes no more"),
    ],
)
def test_a_program_that_ends_before_its_time_is_the_error(write, text, ending, monkeypatch):
    monkeypatch.setattr("whimbrel_transports.exec.SETTLING", 0.2)
    channel = write(script(text))
    with pytest.raises(ChannelLost) as caught:
        send_until_it_fails(channel)
    assert caught.value.message == f"the command `{script(text)}` {ending}"
    for again in (lambda: channel.send(b"more"), channel.end_writing):
        with pytest.raises(ChannelLost) as second:
            again()
        assert second.value.message == caught.value.message


def test_one_that_takes_everything_and_fails_then_is_the_error_of_the_end(write):
    channel = write(script("cat > /dev/null; echo 'the disk is on fire' >&2; exit 4"))
    channel.send(bytes(300_000))
    for _ in range(2):
        with pytest.raises(ChannelLost, match=r"ended with status 4; it said: the disk is on fire$"):
            channel.end_writing()


def test_the_end_of_writing_waits_for_the_program(write, tmp_path):
    channel = write(script(f"cat > {tmp_path}/part; mv {tmp_path}/part {tmp_path}/whole"))
    channel.send(b"everything")
    channel.end_writing()
    assert (tmp_path / "whole").read_bytes() == b"everything"


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("exit 3", "ended with status 3"),
        ("echo 'no such host' >&2; exit 255", "ended with status 255; it said: no such host"),
        ("kill -TERM $$", "was killed by SIGTERM"),
    ],
)
@pytest.mark.parametrize("size", [0, 300_000])
def test_a_reader_is_told_how_it_ended_behind_the_last_byte(read, text, ending, size):
    channel = read(script(f"head -c {size} /dev/zero; {text}"))
    came = 0
    with pytest.raises(ChannelLost) as caught:
        while count := channel.recv_into(bytearray(100_000)):
            came += count
    assert came == size
    assert caught.value.message.endswith(ending)
    with pytest.raises(ChannelLost):
        channel.recv_into(bytearray(1))


def test_an_end_is_none_before_the_program_has_ended(read, tmp_path):
    """It has closed its output and may still fail."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    channel = read(script(f"exec 1>&-; read nothing < {gate}; exit 7"))
    reading = Task(lambda: channel.recv_into(bytearray(1)), "read", LONG)
    reading.wait_until_blocked()
    assert reading.is_alive()
    gate.write_text("")
    with pytest.raises(ChannelLost, match="ended with status 7"):
        reading.result()


def test_one_that_says_very_much_is_not_held_up_and_fills_nothing(write):
    channel = write(
        script("head -c 3000000 /dev/zero | tr '\\0' x >&2; cat > /dev/null; echo >&2; echo last >&2; exit 1")
    )
    channel.send(bytes(300_000))
    with pytest.raises(ChannelLost) as caught:
        channel.end_writing()
    assert caught.value.message.endswith("x / last")
    assert len(channel._program._tail) <= _program.LONGEST_TAIL
    assert len(caught.value.message) < 2 * _program.LONGEST_WORDS + 100


def test_what_it_says_cannot_command_a_terminal(write):
    channel = write(script(r"printf '\033]0;title\007\033[2Jred\377\n' >&2; exit 1"))
    with pytest.raises(ChannelLost) as caught:
        channel.end_writing()
    assert caught.value.message.isprintable()
    assert "red" in caught.value.message


def test_whoever_takes_the_status_away_leaves_an_error(write):
    channel = write(script("cat > /dev/null"))
    stolen = threading.Thread(target=os.waitpid, args=(channel._program._group, 0))
    stolen.start()
    channel._program._process.send_signal(signal.SIGTERM)
    stolen.join(LONG)
    with pytest.raises(ChannelLost, match="has ended, and another part of this process has taken its exit status"):
        send_until_it_fails(channel)


# ---------------------------------------------------------------------------------------------------- the whole group


def started(fifo, count):
    """What the programs wrote of themselves: their numbers."""
    with fifo.open() as told:
        numbers = told.read().split()
    assert len(numbers) == count
    return [int(number) for number in numbers]


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "numbers"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("echo $$ > {}; exec cat > /dev/null", 1),
        ("sleep 1000 & echo $$ $! > {}; cat > /dev/null", 2),
        ("(sleep 1000 & sleep 1000 & echo $$ $! > {}) ; exit 0", 2),
        ("trap '' TERM; sleep 1000 & echo $$ $! > {}; wait; wait; sleep 1000", 2),
        ("echo $$ > {}; kill -STOP $$; cat", 1),
    ],
    ids=["alone", "with another", "left behind", "deaf", "stopped"],
)
def test_no_process_is_left_after_a_close(write, fifo, handles, has_ended, text, count):
    channel = write(script(text.format(fifo)))
    watched = handles(*started(fifo, count))
    channel.close()
    assert all(has_ended(handle) for handle in watched)


def test_nothing_is_left_of_one_that_was_never_accepted(tidy, fifo, handles, has_ended):
    listener = ExecTransport().listen(script(f"sleep 1000 & echo $$ $! > {fifo}; sleep 1000"))
    watched = handles(*started(fifo, 2))
    assert not any(has_ended(handle) for handle in watched)
    listener.close()
    assert all(has_ended(handle) for handle in watched)


def test_what_was_cut_off_does_not_look_whole_to_it(write, fifo, tmp_path):
    """It is ended before its input ends."""
    channel = write(script(f"echo $$ > {fifo}; cat > /dev/null && touch {tmp_path}/whole"))
    started(fifo, 1)
    channel.send(b"half of it")
    channel.close()
    assert not (tmp_path / "whole").exists()


def test_a_close_wakes_who_waits_for_the_end(write):
    channel = write(script("cat > /dev/null; exec sleep 1000"))
    ending = Task(channel.end_writing, "end", LONG)
    ending.wait_until_blocked()
    channel.close()
    with pytest.raises(ChannelClosed):
        ending.result()


def test_a_program_of_another_user_is_no_hang(write, caplog, monkeypatch):
    """It cannot be signalled; the end of its input ends it."""

    def killpg(group, number):
        raise PermissionError

    monkeypatch.setattr(_program.os, "killpg", killpg)
    monkeypatch.setattr(_program, "GRACE", 0.05)
    monkeypatch.setattr(_program, "KILLING", 0.05)
    channel = write("cat")
    channel.close()
    assert "does not end" in caplog.text


# ----------------------------------------------------------------------------------------------------- whole machines


@pytest.mark.parametrize("start", [None, True, False])
def test_a_machine_goes_through_a_file_and_starts_only_if_told(make_machine, moved, tmp_path, start):
    path = tmp_path / "a machine"
    out, into = (f"exec:{script(text)}" for text in (f"cat > '{path}'", f"cat '{path}'"))
    done = moved(make_machine(), make_machine(), out, into, together=False, start=start)
    assert done.there.ownership == "released"
    assert done.runs == (start is True)


def test_a_machine_goes_from_program_to_program(make_machine, moved, fifo):
    moved(
        make_machine(),
        make_machine(),
        f"exec:{script(f'gzip -1 > {fifo}')}",
        f"exec:{script(f'gzip -dc < {fifo}')}",
        together=True,
    )


def test_a_cancel_ends_what_it_had_started(make_machine, fifo, handles, has_ended):
    source = make_machine(size=8 << 20)
    source.start()
    outgoing = source.migrate(f"exec:{script(f'sleep 1000 & echo $$ $! > {fifo}; sleep 1000')}")
    watched = handles(*started(fifo, 2))
    outgoing.cancel()
    with pytest.raises(MigrationCancelled):
        outgoing.wait(LONG)
    assert all(has_ended(handle) for handle in watched)
    assert source.run_state == "running"


def test_a_program_that_fails_on_the_way_leaves_the_machine_running(make_machine):
    source = make_machine(size=8 << 20)
    source.start()
    outgoing = source.migrate(f"exec:{script('head -c 100000 > /dev/null; echo full >&2; exit 28')}")
    with pytest.raises(ChannelLost, match="ended with status 28; it said: full"):
        outgoing.wait(LONG)
    assert source.run_state == "running"


def test_a_program_that_fails_at_the_very_end_leaves_it_undecided(make_machine):
    """Everything was handed to it, so whimbrel cannot know what has become of it."""
    source = make_machine()
    source.start()
    outgoing = source.migrate(f"exec:{script('cat > /dev/null; echo full >&2; exit 28')}")
    with pytest.raises(HandoverUndecided, match="ended with status 28; it said: full"):
        outgoing.wait(LONG)
    assert source.run_state == "postmigrate"
    source.reclaim()
    source.start()


def test_a_command_that_gives_no_machine_says_why(make_machine):
    destination = make_machine()
    incoming = destination.incoming(f"exec:{script('echo no such host >&2; exit 255')}")
    with pytest.raises(ChannelLost, match="ended with status 255; it said: no such host"):
        incoming.wait(LONG)


def test_a_command_that_fails_behind_a_whole_machine_leaves_it_to_somebody_to_decide(make_machine, moved, tmp_path):
    """A program that unpacks or checks may find only at its end that what it gave was not what was packed."""
    path = tmp_path / "machine"
    source = make_machine()
    source.start()
    source.migrate(f"exec:{script(f'cat > {path}')}").wait(LONG)
    destination = make_machine()
    incoming = destination.incoming(f"exec:{script(f'cat {path}; echo bad signature >&2; exit 2')}", start=True)
    with pytest.raises(HandoverUndecided, match="ended with status 2; it said: bad signature"):
        incoming.wait(LONG)
    assert destination.run_state == "inmigrate"
    incoming.adopt()
    assert destination.run_state == "running"


def test_a_machine_that_came_whole_is_kept_though_its_command_fails_in_the_end(make_machine, tmp_path, caplog):
    """Its source has let go, so this is the only copy; somebody must hear of the failure."""
    path = tmp_path / "machine"
    source = make_machine()
    source.start()
    source.migrate(f"exec:{script(f'cat > {path}')}").wait(LONG)
    stored = tmp_path / "stored"
    Reception(f"exec:{script(f'cat {path}; echo bad signature >&2; exit 2')}", stored).run()
    assert stored.exists()
    assert "ended with status 2; it said: bad signature" in caplog.text


def test_a_command_may_take_its_time_to_begin(make_machine, fifo):
    """Whoever is waited for has not connected before the first byte: the time for the header begins with it."""
    destination = make_machine()
    destination.settings.limits.update({"header-timeout": 0.05})
    incoming = destination.incoming(f"exec:cat {fifo}")
    assert not incoming._status.wait_finished(0.2)
    incoming.cancel()
    with pytest.raises(MigrationCancelled):
        incoming.wait(LONG)


def test_what_needs_a_way_back_is_refused(make_machine):
    source = make_machine(**{"return-path": True})
    with pytest.raises(MigrationRefused, match="transport 'exec' has no way back"):
        source.migrate("exec:cat")


def test_it_is_an_offer_of_the_plugin_exec():
    spec = PluginManager().transport("exec")
    assert isinstance(spec.create(), ExecTransport)
    assert (spec.duplex, spec.runs_programs) == (False, True)
