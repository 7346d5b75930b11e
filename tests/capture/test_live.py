"""Sources that listen: what they are told, and when; each plays its part over a link with a way back."""

import threading
from contextlib import suppress

import pytest

from whimbrel.capture import taking, walk
from whimbrel.capture.patient import PatientChannel
from whimbrel.capture.taking import CaptureUndecided
from whimbrel.errors import (
    ChannelLost,
    HandoverUndecided,
    IncompatibleError,
    MigrationError,
    StreamError,
)
from whimbrel.migration import answers

from .conftest import check
from .live import LONG, PONG, SHUT, Link, rest, with_way_back
from .streams import (
    AT_2_3,
    EOF,
    FOOTED,
    FOOTER,
    FROM_2_4,
    FULL,
    PAGE,
    PROOF,
    SHAPES,
    START,
    SUPPRESSED,
    TO_2_2,
    Device,
    Script,
    page,
    str8,
    u32,
)


@pytest.fixture
def link(plugins, settings):
    """`link(play, …)`: a capture and a source that plays; what is left of its machine is closed after the test."""
    made = []

    def make(play, **more):
        made.append(Link(play, settings=settings, plugins=plugins, **more))
        return made[-1]

    yield make
    for each in made:
        each.capture.cancel()
        if each.capture.machine is not None:
            each.capture.machine.close()


@pytest.fixture
def short(monkeypatch):
    """Waiting that would take seconds does not; each is so long that what it waits for comes in time."""

    def shorten(*, grace=0.05, silence=LONG, order=LONG, linger=0.2):
        monkeypatch.setattr(walk, "GRACE", grace)
        monkeypatch.setattr(walk, "SILENCE", silence)
        monkeypatch.setattr(taking, "ORDER", order)
        monkeypatch.setattr(taking, "LINGER", linger)
        monkeypatch.setattr(answers, "LINGER", linger)

    shorten(grace=LONG, linger=LONG)
    return shorten


pytestmark = pytest.mark.usefixtures("short")


def qemu(script, *, pieces=1 << 30, hang_up=True):
    """Plays a QEMU: sends everything, waits for SHUT, and hangs up."""

    def play(source):
        source.send(script.finish(), pieces=pieces)
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 0)
        if not hang_up:
            source.expect_end()

    return play


# ------------------------------------------------------------------------------------------------ one that only waits


@pytest.mark.parametrize("pieces", [1 << 30, 100, 1])
@pytest.mark.parametrize("shape", [AT_2_3, FROM_2_4], ids=str)
def test_a_source_is_told_when_the_machine_is_kept(link, shape, pieces):
    script = rest(with_way_back(shape))
    taken = link(qemu(script, pieces=pieces))
    machine = taken.run()
    check(machine, script)
    assert taken.heard == ["PONG 0x1", "PONG 0x10001", "SHUT 0x0"]
    assert taken.kept_before("SHUT 0x0")
    assert taken.kept == [machine]
    assert (taken.capture.told, taken.capture.heard) == (True, True)
    assert taken.capture.received == len(script.finish())


def test_it_is_not_told_while_it_is_being_kept(link):
    """The source says at which byte it is; behind that the machine is kept, and nothing is said before that is over."""
    script = rest(with_way_back(FROM_2_4))
    silent = threading.Event()

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        silent.set()
        source.expect(SHUT, 0)

    def keep(machine):
        assert silent.wait(LONG)
        assert taken.diary == ["PONG 0x1", "PONG 0x10001"]

    taken = link(play, on_keep=keep)
    taken.run()
    assert taken.diary[2:] == ["kept", "SHUT 0x0"]


@pytest.mark.parametrize("error", [MigrationError("full"), StreamError("no"), OSError("a disk"), ZeroDivisionError()])
@pytest.mark.parametrize("proof", [False, True])
def test_a_machine_that_cannot_be_kept(link, error, proof):
    """The source is told to go on, and whoever keeps machines hears his own error."""
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(bytes(script.ping(PROOF).data) if proof else script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 1)

    def keep(machine):
        raise error

    taken = link(play, on_keep=keep)
    with pytest.raises(type(error)) as caught:
        taken.run()
    assert caught.value is error
    assert taken.diary == ["PONG 0x1", "PONG 0x10001", "SHUT 0x1"]
    assert taken.kept[0].run_state == "shutdown"
    assert not taken.capture.told


def test_whoever_interrupts_is_not_kept_waiting(link):
    """A KeyboardInterrupt closes the link at once; that is a word too."""
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish())
        while source.hear() is not None:
            pass

    def keep(machine):
        raise KeyboardInterrupt

    taken = link(play, on_keep=keep)
    with pytest.raises(KeyboardInterrupt):
        taken.run()
    assert taken.diary == ["PONG 0x1", "PONG 0x10001", "end"]
    assert taken.kept[0].run_state == "shutdown"


@pytest.mark.parametrize("cut", ["in its RAM", "in a device", "in its description"])
def test_a_source_that_sends_nonsense_is_refused(link, cut):
    script = rest(with_way_back(FROM_2_4))
    stream = bytearray(script.finish())
    at = {"in its RAM": script.at("PART"), "in a device": script.at("FULL"), "in its description": len(stream) - 9}[cut]
    stream[at] = 0xEE

    def play(source):
        source.send(stream)
        source.channel.end_writing()
        while (heard := source.hear()) is not None:
            last = heard
        assert last == (SHUT, 1)

    taken = link(play)
    with pytest.raises((StreamError, ChannelLost)) as caught:
        taken.run()
    assert caught.value.place.section
    assert taken.capture.machine.run_state == "shutdown"


def test_too_much_ram_is_said_to_the_source(link):
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(SHUT, 1)

    with pytest.raises(IncompatibleError, match="max_ram"):
        link(play, max_ram=3 * PAGE - 1).run()


def test_what_cannot_be_mapped_is_said_to_the_source(link, settings, tmp_path):
    """Also an error that is none of a migration's."""
    settings.backends.memory = f"file:{tmp_path / 'one'}"
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(SHUT, 1)

    taken = link(play)
    with pytest.raises(Exception, match="there already") as caught:
        taken.run()
    assert caught.value.code == "config"
    assert taken.capture.machine.run_state == "shutdown"


def test_a_source_that_does_not_open_a_way_back_is_told_nothing(link):
    """Over a link that has one."""
    script = rest(Script(FROM_2_4, {"a": 2, "b": 1}).header().ping())

    def play(source):
        source.send(script.finish())
        source.expect_end()

    taken = link(play)
    check(taken.run(), script)
    assert (taken.capture.told, taken.capture.heard) == (False, False)
    assert taken.diary == ["kept", "end"]


def test_a_way_back_that_is_opened_twice(link):
    script = Script(FROM_2_4, {"a": 1}).header().open_return_path().ping().open_return_path().ping(9)
    script.start().end(("a", 0, 0)).open_return_path().full(Device("d", 4, b""))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 9)
        source.expect(SHUT, 0)

    check(link(play).run(), script)


def test_a_flood_of_questions(link):
    """Each is answered, in order, also when the link is full of answers for a while."""
    script = Script(FROM_2_4, {"a": 1}).header().open_return_path()
    for number in range(20_000):
        script.ping(number)
    script.start().end(("a", 0, 0))

    def play(source):
        source.send(script.finish())
        for number in range(20_000):
            source.expect(PONG, number)
        source.expect(SHUT, 0)

    check(link(play).run(), script)


def test_bytes_behind_the_end(link, short, caplog):
    """What a source still says behind its description is of no use to anybody."""
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish() + b"more")
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        with suppress(ChannelLost):  # it may have been hung up on by then
            source.channel.send(b"and more")
        source.hear()

    # It is there and whole, but more has come behind it, and that may be a device's: so the silence is waited for.
    short(grace=0.05)
    taken = link(play)
    machine = taken.run()
    check(machine, script)
    assert "bytes came behind the end of the stream" in caplog.text
    assert taken.heard == ["PONG 0x1", "PONG 0x10001", "SHUT 0x0"]
    assert taken.kept_before("SHUT 0x0")


# ------------------------------------------------------------------------------------------- one without description


def test_a_source_without_a_description_that_waits(link, short):
    """It has sent everything and says no more; its silence behind the EOF is the end."""
    short(grace=0.05)
    script = rest(with_way_back(SUPPRESSED))
    taken = link(qemu(script))
    machine = taken.run()
    check(machine, script)
    assert taken.capture.told
    assert taken.heard == ["PONG 0x1", "PONG 0x10001", "SHUT 0x0"]
    assert taken.kept_before("SHUT 0x0")


def test_a_description_that_comes_late(link, short):
    """As long as a moment has not passed, it is waited for."""
    script = rest(with_way_back(FROM_2_4))
    script.eof()
    upto = len(script.data)
    script.description()

    def play(source):
        source.send(script.data[:upto])
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        taken.far.wait_for(upto)  # it looks for more
        source.send(script.data[upto:])
        source.expect(SHUT, 0)

    taken = link(play)
    check(taken.run(), script)


@pytest.mark.parametrize("behind", [2, 5, 8, 40, -1])
def test_a_description_that_comes_slowly(link, short, monkeypatch, behind):
    """Once it has begun to come the moment does not count: to be told now would be to be told in the middle of it."""
    waited, looking = [], threading.Event()
    wait = PatientChannel.wait

    def noted(channel, seconds):
        waited.append(seconds)
        looking.set()
        return wait(channel, seconds)

    monkeypatch.setattr(PatientChannel, "wait", noted)
    short(grace=0.0, silence=LONG)
    script = rest(with_way_back(FROM_2_4))
    upto = script.eof().at("EOF") + 1
    script.description()
    first = upto + behind if behind > 0 else len(script.data) - 1

    def play(source):
        source.send(script.data[:first])
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        if first >= upto + 7:  # before that, what has come may still be a device's
            assert looking.wait(LONG)
        taken.far.wait_for(first)
        source.send(script.data[first:])
        source.expect(SHUT, 0)

    taken = link(play)
    check(taken.run(), script)
    assert set(waited) <= {LONG}


def test_a_description_that_never_ends(link, short):
    short(silence=0.1)
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish()[:-5])
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 1)

    taken = link(play)
    with pytest.raises(StreamError, match=r"silent for 0\.1 s"):
        taken.run()
    assert taken.kept == []


def test_a_machine_type_whose_end_cannot_be_told(link, short):
    """Up to 2.2, and listening: it waits for us, and we for it."""
    short(silence=0.1)
    script = rest(with_way_back(TO_2_2))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 1)

    taken = link(play)
    with pytest.raises(StreamError, match=r"silent for 0\.1 s, and nothing tells") as caught:
        taken.run()
    assert "return-path" in caught.value.hint
    assert caught.value.place.section == "devices"
    assert taken.kept == []


@pytest.mark.parametrize("shape", [TO_2_2, AT_2_3], ids=str)
def test_a_question_that_no_footer_shows(link, short, shape):
    """Without footers a question for the proof looks like a device's bytes: it is not answered, and not for ever."""
    short(silence=0.1)
    script = rest(with_way_back(shape)).ping(PROOF)

    def play(source):
        source.send(script.data)
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 1)

    taken = link(play)
    with pytest.raises(StreamError, match="silent"):
        taken.run()
    assert taken.kept == []


def test_footers_that_lie_and_no_description(link, short):
    """Nothing can be told any more; that is said, and not waited for without end."""
    short(silence=0.1)
    script = with_way_back(SUPPRESSED).start().end(("a", 0, 0))
    lie = FOOTER + u32(4) + START + u32(99) + str8("ram") + u32(0) + u32(4)
    script.full(Device("liar", 4, b"x" + lie + b"y"))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(SHUT, 1)

    with pytest.raises(StreamError, match="silent"):
        link(play).run()


def test_a_description_of_other_devices_is_refused_soon(link, short):
    """Without footers: the source waits behind it, so there will be no better one."""
    short(grace=0.05, silence=LONG)
    script = rest(with_way_back(AT_2_3))
    script.said = script.text.replace(b'"timer"', b'"other"')

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 1)

    with pytest.raises(StreamError, match="'other'"):
        link(play).run()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["in order", "broken"])
def test_a_source_that_hangs_up_before_it_was_told(link, shape, how):
    """It listens, so it has not let go: it was cancelled or has failed, and what came is no machine of ours."""
    script = rest(with_way_back(shape)).eof()

    def play(source):
        source.send(script.data)
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        if how == "broken":
            source.channel.reset()

    taken = link(play)
    with pytest.raises(ChannelLost) as caught:
        taken.run()
    if how == "in order":
        assert "hung up before it was told" in str(caught.value)
    assert taken.kept == []
    assert taken.capture.machine.run_state == "shutdown"


def test_a_link_that_breaks_as_the_source_is_told(link):
    """Nobody can know whether it heard; the machine is kept, and so it is said."""
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish())
        while source.hear() is not None:
            pass

    def broken():
        raise ChannelLost("the link broke")

    def keep(machine):
        taken.far.failing_send = broken

    taken = link(play, on_keep=keep)
    with pytest.raises(HandoverUndecided) as caught:
        taken.run()
    assert caught.value.machine is taken.kept[0]
    check(caught.value.machine, script)
    assert isinstance(caught.value.__cause__, ChannelLost)
    assert not taken.capture.told


@pytest.mark.parametrize("proof", [False, True])
def test_a_source_that_hangs_up_while_its_machine_is_kept(link, proof):
    """It was not told anything, so it goes on, and nothing is undecided."""
    script = rest(with_way_back(FROM_2_4))
    data = bytes(script.ping(PROOF).data) if proof else script.finish()
    kept = threading.Event()

    def play(source):
        source.send(data)
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        assert kept.wait(LONG)

    def keep(machine):
        kept.set()
        taken.source._thread.join(LONG)
        assert taken.capture._channel.wait(LONG)

    taken = link(play, on_keep=keep)
    with pytest.raises(ChannelLost, match="hung up while its machine was being stored"):
        taken.run()
    assert taken.kept[0].run_state == "shutdown"
    assert not taken.capture.told


def test_a_link_that_breaks_behind_the_last_word(link):
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.finish())
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(SHUT, 0)
        source.channel.reset()

    taken = link(play)
    with pytest.raises(CaptureUndecided) as caught:
        taken.run()
    check(caught.value.machine, script)


# ------------------------------------------------------------------------------------------- one that asks for a proof


def asks(script, *, then, pieces=1 << 30):
    """Plays a source that lets go in two phases: it asks, is answered, and only then writes its EOF."""

    def play(source):
        source.send(script.data, pieces=pieces)
        source.expect(PONG, 1)
        source.expect(PONG, 0x10001)
        source.expect(PONG, PROOF)
        then(source)

    return play


@pytest.mark.parametrize("pieces", [1 << 30, 1])
@pytest.mark.parametrize("shape", FOOTED, ids=str)
def test_a_source_that_asks_for_a_proof(link, short, shape, pieces):
    short(grace=0.05)
    script = rest(with_way_back(shape)).ping(PROOF)
    upto = len(script.data)

    def then(source):
        assert taken.heard == ["PONG 0x1", "PONG 0x10001", f"PONG {PROOF:#x}"]
        assert taken.kept_before(f"PONG {PROOF:#x}")
        machine = taken.kept[0]
        check(machine, script, described=False)
        source.send(script.finish()[upto:])
        source.expect(SHUT, 0)

    play = asks(script, then=then, pieces=pieces)
    taken = link(play)
    machine = taken.run()
    check(machine, script)
    assert taken.kept == [machine]
    assert taken.capture.told


@pytest.mark.parametrize("how", ["in order", "broken"])
def test_a_link_that_is_cut_behind_the_proof(link, how):
    """The source may have let go: the machine is here, whole, and stays."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)

    def then(source):
        if how == "broken":
            source.channel.reset()

    taken = link(asks(script, then=then))
    with pytest.raises(HandoverUndecided, match="has not said that it let go") as caught:
        taken.run()
    assert isinstance(caught.value.__cause__, ChannelLost)
    assert caught.value.machine is taken.kept[0] is taken.capture.machine
    check(caught.value.machine, script, described=False)
    assert caught.value.machine.run_state == "prelaunch"
    assert not taken.capture.told
    assert taken.diary[-1] == f"PONG {PROOF:#x}"


def test_a_source_that_falls_silent_behind_its_proof(link, short):
    short(order=0.1)
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    taken = link(asks(script, then=lambda source: source.expect_end()))
    with pytest.raises(HandoverUndecided, match=r"its word has not come within 0\.1 s"):
        taken.run()
    check(taken.kept[0], script, described=False)


@pytest.mark.parametrize("behind", [1, 2, 4, 6, 9, 30])
def test_a_link_that_is_cut_behind_the_order(link, behind):
    """Its EOF says that the source has let go; its description is not needed for that."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)

    def then(source):
        source.send(script.finish()[upto : upto + behind])
        source.channel.end_writing()
        source.expect(SHUT, 0)

    taken = link(asks(script, then=then))
    machine = taken.run()
    check(machine, script, described=False)
    assert taken.capture.told


def test_devices_behind_the_proof(link, short):
    """What was kept is not what there is now: nobody may run it unasked."""
    short(grace=0.05)
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)

    def then(source):
        script.full(Device("late", 90, b"body"))
        source.send(script.finish()[upto:])
        source.expect_end()

    taken = link(asks(script, then=then))
    with pytest.raises(HandoverUndecided, match="bytes stand between the last device") as caught:
        taken.run()
    assert isinstance(caught.value.__cause__, StreamError)


@pytest.mark.parametrize("lie", [FULL + u32(77) + str8("aa") + u32(0) + u32(1), b"\xff" * 30])
def test_bytes_of_a_device_that_ask_for_a_proof(link, lie):
    """By chance a piece ends behind them, so they pass for a question; what comes shows that they were none."""
    script = with_way_back(FROM_2_4).start().end(("a", 0, 0)).full(Device("one", 4, b"1"))
    question = FOOTER + u32(5) + b"\x08\0\x02\0\x04" + u32(PROOF)
    script.full(Device("liar", 5, b"x" + question + lie), Device("two", 6, b"2"))
    stream = script.finish()
    upto = stream.index(question) + len(question)

    def play(source):
        source.send(stream[:upto])
        source.expect(PONG, 1)
        source.expect(PONG, PROOF)
        source.send(stream[upto:])
        source.expect_end()

    taken = link(play)
    with pytest.raises(HandoverUndecided, match="are not the 2 that were here"):
        taken.run()
    assert not taken.capture.told


def test_a_question_that_does_not_wait_is_not_answered(link):
    """More has come behind it already: nobody waits for that answer, and what it would prove is not known."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    taken = link(qemu(script))
    check(taken.run(), script)
    assert taken.heard == ["PONG 0x1", "PONG 0x10001", "SHUT 0x0"]
    assert taken.kept_before("SHUT 0x0")


def test_questions_behind_the_proof(link):
    """It was proved once; another question changes nothing."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)

    def then(source):
        script.ping(PROOF).ping(5)
        source.send(script.finish()[upto:])
        source.expect(SHUT, 0)

    taken = link(asks(script, then=then))
    check(taken.run(), script)


def test_questions_between_early_devices(link):
    """RAM is still to come: they are answered, and nothing is kept for them."""
    script = Script(FROM_2_4, {"a": 2}).header().open_return_path().full(Device("early", 90, b"e"))
    parts = [len(script.ping(1).data)]
    script.start().part(("a", 0, page(1))).full(Device("middle", 91, b"m"))
    parts.append(len(script.ping(2).data))
    script.full(Device("middle", 92, b"m"))
    parts.append(len(script.ping(3).data))
    script.part(("a", 1, page(2))).end().full(Device("late", 93, b"l"))
    parts.append(len(script.finish()))

    def play(source):
        begin = 0
        for number, end in enumerate(parts, 1):
            source.send(script.data[begin:end])
            begin = end
            if number < len(parts):
                source.expect(PONG, number)
        source.expect(SHUT, 0)

    taken = link(play)
    check(taken.run(), script)
    assert taken.heard == ["PONG 0x1", "PONG 0x2", "PONG 0x3", "SHUT 0x0"]
    assert taken.kept_before("SHUT 0x0")


def test_a_proof_without_ram(link):
    script = Script(FROM_2_4, {}).header().open_return_path().full(Device("d", 4, b"")).ping(PROOF)

    def play(source):
        source.send(script.finish())
        source.expect(PONG, PROOF)
        source.expect(SHUT, 1)

    taken = link(play)
    with pytest.raises(StreamError, match="the stream has no RAM"):
        taken.run()
    assert taken.kept == []


# ------------------------------------------------------------------------------------------------ links that misbehave


@pytest.mark.parametrize("error", [OSError("a cable"), ValueError("a bug"), RecursionError()])
def test_a_channel_that_breaks_its_contract(link, error):
    """Whatever a transport raises, one error of ours comes of it."""
    script = rest(with_way_back(FROM_2_4))

    def play(source):
        source.send(script.data)
        while source.hear() is not None:
            pass

    def fail():
        if taken.far.received >= len(script.data):
            raise error

    taken = link(play)
    taken.far.failing = fail
    with pytest.raises(MigrationError, match=f"unexpected {type(error).__name__}") as caught:
        taken.run()
    assert caught.value.__cause__ is error
    assert taken.capture.machine.run_state == "shutdown"


def test_a_channel_whose_sending_breaks_its_contract(link):
    script = rest(with_way_back(FROM_2_4))

    def fail():
        raise OSError("a cable")

    def play(source):
        source.send(script.data)
        source.expect_end()

    taken = link(play)
    taken.far.failing_send = fail
    with pytest.raises(MigrationError, match="unexpected OSError"):
        taken.run()
    assert taken.diary == ["end"]


def test_a_peer_that_says_nothing(link, settings):
    settings.limits.header_timeout = 0.05
    with pytest.raises(StreamError, match=r"no stream header within 0\.05 s"):
        link(lambda source: source.expect_end()).run()


def test_a_refused_source_that_goes_on_sending(link, short):
    """It is listened to for a moment, and then hung up on."""
    short(linger=0.1)
    stop = threading.Event()

    def play(source):
        source.send(b"no stream at all")
        with pytest.raises(ChannelLost):
            while not stop.is_set():
                source.send(bytes(1 << 16))

    with pytest.raises(StreamError, match="begins with"):
        link(play).run()
    stop.set()


def test_a_source_that_does_not_hang_up(link, short):
    """It was told that all is well, and may never have heard it."""
    short(order=0.1)
    taken = link(qemu(script := rest(with_way_back(FROM_2_4)), hang_up=False))
    with pytest.raises(CaptureUndecided, match=r"has not hung up within 0\.1 s") as caught:
        taken.run()
    check(caught.value.machine, script)
    caught.value.machine.close()


def test_a_source_that_let_go_and_does_not_hang_up(link, short, caplog):
    """It had its proof and gave its order, so nothing is open."""
    short(linger=0.1)
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)
    data = bytes(script.finish())

    def play(source):
        source.send(data[:upto])
        for value in (1, 0x10001, PROOF):
            source.expect(PONG, value)
        source.send(data[upto:])
        source.expect(SHUT, 0)
        source.expect_end()

    taken = link(play)
    check(taken.run(), script)
    assert taken.capture.told
    assert "has not hung up within 0.1 s" in caplog.text


def test_the_end_mark():
    """What `test_a_link_that_is_cut_behind_the_order` counts from."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    upto = len(script.data)
    assert script.finish()[upto : upto + 2] == EOF + b"\x06"
