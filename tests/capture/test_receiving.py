"""`Reception`: one machine, from a URI into a file; what is there when it is over, however it ends."""

import os
import threading
from contextlib import suppress

import pytest

from whimbrel.abc import Patience
from whimbrel.capture import CapturedMachine, receiving, taking, walk
from whimbrel.capture.receiving import Reception
from whimbrel.capture.taking import CaptureUndecided
from whimbrel.errors import (
    ChannelError,
    ConfigError,
    ConnectError,
    MigrationCancelled,
    MigrationError,
    StreamError,
    WhimbrelError,
)

from .conftest import check
from .live import LONG, PONG, SHUT, Source, rest, with_way_back
from .streams import FROM_2_4, PROOF, SHAPES, SUPPRESSED, TO_2_2, small


class Receiving:
    """A Reception on a thread of its own, and sources that come to it."""

    def __init__(self, plugins, network, file, **more):
        self.network, self.file = network, file
        self.reception = Reception("memory:receive", file, plugins=plugins, **more)
        self.receipt = self.error = None
        self.diary = []
        self._thread = threading.Thread(target=self._run, name="whimbrel-test-receive", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.receipt = self.reception.run()
        except BaseException as exc:
            self.error = exc

    def source(self, play):
        channel = self.network.connect("receive", Patience(LONG))
        return Source(channel, play, self.diary)

    def join(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the reception hangs"
        if self.error is not None:
            raise self.error
        return self.receipt


@pytest.fixture
def receive(plugins, network, tmp_path, monkeypatch):
    """`receive(play, …)`: a reception into a file, and a source that plays."""
    for where, name in ((walk, "GRACE"), (walk, "SILENCE"), (taking, "ORDER"), (taking, "LINGER")):
        monkeypatch.setattr(where, name, LONG)
    made = []

    def make(play=None, *, file=None, **more):
        made.append(Receiving(plugins, network, file or tmp_path / "file", **more))
        if play is not None:
            made[-1].playing = made[-1].source(play)
        return made[-1]

    yield make
    for each in made:
        each.reception.cancel()
        each._thread.join(LONG)


def sends(script):
    """Plays a source that does not listen."""
    return lambda source: source.send(script.finish())


def listens(script):
    """Plays one that waits for the last word."""

    def play(source):
        source.send(script.finish())
        while source.hear() not in (None, (SHUT, 0), (SHUT, 1)):
            pass

    return play


def stored(file, script, *, described=None):
    with CapturedMachine.load(file) as machine:
        check(machine, script, ids=False, described=described)


# ------------------------------------------------------------------------------------------------------- all is well


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_a_source_that_does_not_listen(receive, tmp_path, shape):
    script = small(shape)
    receipt = receive(sends(script)).join()
    stored(tmp_path / "file", script)
    assert receipt.machine == (script.machine if shape.configuration else "captured")
    assert (receipt.ram, receipt.blocks, receipt.devices) == (3 * 4096, 2, 3)
    assert receipt.received == len(script.finish())
    assert receipt.stored == (tmp_path / "file").stat().st_size
    assert (receipt.told, receipt.guessed) == (False, shape is TO_2_2)
    assert receipt.file == str(tmp_path / "file")
    assert 0 <= receipt.storing_seconds <= receipt.seconds


def test_of_a_source_that_listens(receive, tmp_path):
    script = rest(with_way_back(FROM_2_4))
    there = []

    def play(source):
        source.send(script.finish())
        while source.hear() != (SHUT, 0):
            pass
        there.append((tmp_path / "file").read_bytes())

    receipt = receive(play).join()
    assert receipt.told
    stored(tmp_path / "file", script)
    assert there == [(tmp_path / "file").read_bytes()], "it was there, whole, when the source was told"


def test_of_a_source_that_asks_for_a_proof(receive, tmp_path):
    """The file is there when it is answered; the description comes later and is added."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)

    def play(source):
        source.send(script.data[:upto])
        while source.hear() != (PONG, PROOF):
            pass
        stored(tmp_path / "file", script, described=False)
        source.send(script.finish()[upto:])
        source.expect(SHUT, 0)

    receiving_ = receive(play)
    receipt = receiving_.join()
    receiving_.playing.join()
    stored(tmp_path / "file", script)
    assert receipt.stored == (tmp_path / "file").stat().st_size
    assert receipt.told


@pytest.mark.parametrize("how", ["moved", "grown", "read-only"])
def test_a_description_that_cannot_be_added(receive, tmp_path, monkeypatch, caplog, how):
    """What was stored is a whole machine, and stays what it is."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)
    file = tmp_path / "file"

    def play(source):
        source.send(script.data[:upto])
        while source.hear() != (PONG, PROOF):
            pass
        if how == "moved":
            file.rename(tmp_path / "elsewhere")
        elif how == "grown":
            with file.open("ab") as out:
                out.write(b"x")
        else:

            def full(out, data):
                out.write(data[:10])
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(receiving, "_write_all", full)
        source.send(script.finish()[upto:])
        source.expect(SHUT, 0)

    receipt = receive(play).join()
    assert receipt.told
    assert "has the whole machine, but not its description" in caplog.text
    if how == "moved":
        assert not file.exists()
        stored(tmp_path / "elsewhere", script, described=False)
    elif how == "grown":
        file.write_bytes(file.read_bytes()[:-1])
        stored(file, script, described=False)
    else:
        stored(file, script, described=False)
        assert receipt.stored == file.stat().st_size


def test_replacing_a_file(receive, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    script = small(FROM_2_4)
    receive(sends(script), replace=True).join()
    stored(tmp_path / "file", script)


# ----------------------------------------------------------------------------------------------- what is wrong at once


def test_places_that_cannot_be(plugins, tmp_path):
    """Said before a source has come; nothing listens then."""
    (tmp_path / "there").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("there")
    bad = ["there", "folder", "pipe", "link", "no folder/file", "n" * 256, "nul\0", "file,offset=5"]
    for name in bad:
        with pytest.raises(ConfigError):
            Reception("memory:receive", tmp_path / name, plugins=plugins)
    for name in [name for name in bad if name != "there"]:
        with pytest.raises(ConfigError):
            Reception("memory:receive", tmp_path / name, plugins=plugins, replace=True)
    assert (tmp_path / "there").read_bytes() == b"precious"


def test_uris_that_cannot_be(plugins, network, tmp_path):
    for uri in ("nonsense", "memory:", "pigeon:loft"):
        with pytest.raises(ConfigError):
            Reception(uri, tmp_path / "file", plugins=plugins)
    listener = network.listen("receive")
    with pytest.raises(ConnectError):
        Reception("memory:receive", tmp_path / "file", plugins=plugins)
    listener.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_none(receive, tmp_path):
    with pytest.raises(StreamError):
        receive(lambda source: source.send(b"QEVM\0\0\0\3nonsense")).join()
    with pytest.raises(ChannelError):
        receive(lambda source: source.send(small(SUPPRESSED).finish()[:-1])).join()
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- it is not stored


def test_a_file_that_appears_meanwhile(receive, tmp_path):
    """It is not replaced unasked; the source hears of it and goes on."""
    script = rest(with_way_back(FROM_2_4))
    receiving_ = receive()
    (tmp_path / "file").write_bytes(b"precious")
    receiving_.source(listens(script))
    with pytest.raises(MigrationError, match="is there already"):
        receiving_.join()
    assert "SHUT 0x1" in receiving_.diary
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_the_only_copy_goes_elsewhere(receive, tmp_path):
    """Its source does not listen: it is asked for another place until one will do."""
    script = small(FROM_2_4)
    (tmp_path / "other").write_bytes(b"precious")
    places = iter([tmp_path / "other", tmp_path / "no folder" / "file", tmp_path, tmp_path / "third"])
    problems = []

    def elsewhere(problem):
        problems.append(problem)
        return next(places)

    receiving_ = receive(elsewhere=elsewhere)
    (tmp_path / "file").mkdir()
    receiving_.source(sends(script))
    receipt = receiving_.join()
    assert receipt.file == str(tmp_path / "third")
    stored(tmp_path / "third", script)
    assert (tmp_path / "other").read_bytes() == b"precious"
    assert len(problems) == 4
    assert all(isinstance(problem, MigrationError) for problem in problems)


def test_nowhere_else(receive, tmp_path):
    receiving_ = receive()
    (tmp_path / "file").mkdir()
    receiving_.source(sends(small(FROM_2_4)))
    with pytest.raises(MigrationError, match="folder"):
        receiving_.join()
    assert receiving_.reception._capture.machine.run_state == "shutdown"


def test_a_source_that_listens_is_asked_to_go_on_instead(receive, tmp_path):
    def elsewhere(problem):
        raise AssertionError("asked for another place, though the source still has its machine")

    receiving_ = receive(elsewhere=elsewhere)
    (tmp_path / "file").mkdir()
    receiving_.source(listens(rest(with_way_back(FROM_2_4))))
    with pytest.raises(MigrationError, match="folder"):
        receiving_.join()
    assert receiving_.diary[-1] == "SHUT 0x1"


# ----------------------------------------------------------------------------------------------------- it is undecided


def test_a_source_that_says_no_more(receive, tmp_path):
    """Behind its proof: the file stays, the memory does not."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)

    def play(source):
        source.send(script.data)
        while source.hear() != (PONG, PROOF):
            pass

    receiving_ = receive(play)
    with pytest.raises(CaptureUndecided) as caught:
        receiving_.join()
    assert caught.value.machine.run_state == "shutdown"
    assert caught.value.exit_code == 3
    stored(tmp_path / "file", script, described=False)


# ---------------------------------------------------------------------------------------------------- it is cancelled


def test_cancelled_before_a_source_came(receive, network, tmp_path):
    receiving_ = receive()
    receiving_.reception.cancel()
    with pytest.raises(MigrationCancelled):
        receiving_.join()
    with pytest.raises(ConnectError):
        network.connect("receive", Patience(1))
    assert list(tmp_path.iterdir()) == []


def test_cancelled_before_it_waited(plugins, tmp_path):
    reception = Reception("memory:receive", tmp_path / "file", plugins=plugins)
    reception.cancel()
    with pytest.raises(MigrationCancelled):
        reception.run()


def test_cancelled_on_the_way(receive, tmp_path):
    script = rest(with_way_back(FROM_2_4))
    half = threading.Event()

    def play(source):
        source.send(script.data[: len(script.data) // 2])
        source.expect(PONG, 1)
        half.set()
        source.expect_end()

    receiving_ = receive(play)
    assert half.wait(LONG)
    receiving_.reception.cancel()
    with pytest.raises(MigrationCancelled):
        receiving_.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("proof", [False, True])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_cancelled_while_it_is_stored(receive, tmp_path, monkeypatch, proof, when):
    """The source goes on, so no copy of its machine may be left here."""
    script = rest(with_way_back(FROM_2_4))
    data = bytes(script.ping(PROOF).data) if proof else script.finish()
    save = receiving.save

    def saving(machine, file):
        if when == "before":
            receiving_.reception.cancel()
        save(machine, file)
        if when == "behind":
            receiving_.reception.cancel()

    monkeypatch.setattr(receiving, "save", saving)
    receiving_ = receive()

    def play(source):
        source.send(data)
        while source.hear() is not None:
            pass

    source = receiving_.source(play)
    with pytest.raises(MigrationCancelled):
        receiving_.join()
    source.join()
    assert receiving_.diary[-1] == "end"
    assert not any("SHUT" in what or f"{PROOF:#x}" in what for what in receiving_.diary)
    assert list(tmp_path.iterdir()) == []


def test_cancelled_while_it_is_stored_and_nobody_else_has_it(receive, tmp_path, monkeypatch):
    script = small(FROM_2_4)
    save = receiving.save

    def saving(machine, file):
        receiving_.reception.cancel()
        save(machine, file)

    monkeypatch.setattr(receiving, "save", saving)
    receiving_ = receive()
    receiving_.source(sends(script))
    receiving_.join()
    stored(tmp_path / "file", script)


def test_cancelled_at_any_moment(plugins, network, tmp_path):
    """There is a file if and only if the source was told that there is one."""
    script = rest(with_way_back(FROM_2_4))
    outcomes = set()
    for turn in range(40):
        file = tmp_path / f"file {turn}"
        reception = Reception(f"memory:turn{turn}", file, plugins=plugins)
        seen = threading.Event()
        diary = []

        def play(source, seen=seen, turn=turn):
            with suppress(ChannelError):
                for at in range(0, len(script.finish()), 997):
                    if at // 997 == turn % 8:
                        seen.set()
                    source.send(script.finish()[at : at + 997])
            seen.set()
            while source.hear() not in (None, (SHUT, 0), (SHUT, 1)):
                pass

        def cancel(reception=reception, seen=seen):
            seen.wait(LONG)
            reception.cancel()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        connected = []

        def connect(turn=turn, play=play, diary=diary, connected=connected):
            with suppress(WhimbrelError):
                connected.append(Source(network.connect(f"turn{turn}", Patience(LONG)), play, diary))

        connecting = threading.Thread(target=connect)
        connecting.start()
        try:
            receipt = reception.run()
        except MigrationCancelled:
            receipt = None
        except CaptureUndecided:
            raise AssertionError("a cancel is in time or too late") from None
        seen.set()
        canceller.join(LONG)
        connecting.join(LONG)
        for source in connected:
            source.join()
        outcomes.add(receipt is not None)
        assert file.exists() == (receipt is not None) == ("SHUT 0x0" in diary)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert False in outcomes
