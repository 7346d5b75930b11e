"""Cancelled in every phase, from another thread: in time, and the source goes on; or too late, and nothing changes."""

import threading
from contextlib import suppress

import pytest

from whimbrel.capture import taking, walk
from whimbrel.capture.taking import Capture, CaptureUndecided
from whimbrel.errors import ChannelError, MigrationCancelled, StreamError

from .conftest import Crumbs, check
from .live import LONG, PONG, SHUT, Link, Running, rest, with_way_back
from .streams import AT_2_3, FROM_2_4, PROOF, SUPPRESSED, TO_2_2, small

pytestmark = pytest.mark.usefixtures("_patient")


@pytest.fixture
def _patient(monkeypatch):
    """No waiting of our own ends by itself."""
    for where, name in ((walk, "GRACE"), (walk, "SILENCE"), (taking, "ORDER"), (taking, "LINGER")):
        monkeypatch.setattr(where, name, LONG)


@pytest.fixture
def running(plugins, settings):
    """`running(play, …)`: a capture on a thread of its own, and the source that plays at its other end."""
    made = []

    def make(play, **more):
        settings.limits.header_timeout = LONG
        made.append(Running(Link(play, settings=settings, plugins=plugins, **more)))
        return made[-1]

    yield make
    for each in made:
        each.link.capture.cancel()
        if each.link.capture.machine is not None:
            each.link.capture.machine.close()


def until_the_end(data):
    """Plays a source that sends `data` and listens until the link ends."""

    def play(source):
        source.send(data)
        while source.hear() is not None:
            pass

    return play


def upto(shape, what):
    """A stream up to the first element of that kind, or to `what` bytes."""
    script = rest(with_way_back(shape))
    script.finish()
    return bytes(script.data[: what if isinstance(what, int) else script.at(what)])


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        (FROM_2_4, 0),
        (FROM_2_4, 7),
        (FROM_2_4, 12),
        (FROM_2_4, "command"),
        (FROM_2_4, "START"),
        (FROM_2_4, "PART"),
        (FROM_2_4, 2000),
        (FROM_2_4, "END"),
        (FROM_2_4, "FULL"),
        (FROM_2_4, "EOF"),
        (FROM_2_4, "description"),
        (FROM_2_4, -1),
        (SUPPRESSED, 10**6),
        (AT_2_3, "EOF"),
        (TO_2_2, 10**6),
    ],
    ids=str,
)
def test_while_it_waits_for_more(running, shape, what):
    """Wherever the source has come to."""
    data = upto(shape, what)
    taken = running(until_the_end(data))
    taken.link.far.wait_for(len(data))
    taken.link.capture.cancel()
    machine, error = taken.join()
    assert machine is None
    assert isinstance(error, MigrationCancelled)
    assert taken.link.diary[-1] == "end"
    assert not any("SHUT" in what for what in taken.link.diary)
    assert taken.link.kept == []
    begun = taken.link.capture.machine
    assert begun is None or begun.run_state == "shutdown"


def test_before_it_has_begun(plugins, settings):
    """Whoever cancels first wins."""
    link = Link(until_the_end(b""), settings=settings, plugins=plugins)
    link.capture.cancel()
    link.capture.cancel()
    with pytest.raises(MigrationCancelled):
        link.run()
    assert link.diary == ["end"]


@pytest.mark.parametrize("proof", [False, True])
def test_while_it_is_being_kept(running, proof):
    """The source has not been told anything, so it goes on; whoever keeps is not disturbed in the middle of it."""
    script = rest(with_way_back(FROM_2_4))
    data = bytes(script.ping(PROOF).data) if proof else script.finish()
    keeping, cancelled = threading.Event(), threading.Event()

    def keep(machine):
        keeping.set()
        assert cancelled.wait(LONG)

    taken = running(until_the_end(data), on_keep=keep)
    assert keeping.wait(LONG)
    taken.link.capture.cancel()
    cancelled.set()
    _, error = taken.join()
    assert isinstance(error, MigrationCancelled)
    assert taken.link.heard == ["PONG 0x1", "PONG 0x10001", "end"]
    assert taken.link.kept[0].run_state == "shutdown"
    assert not taken.link.capture.told


def test_behind_the_proof(running):
    """The source may have let go: nobody waits for it any more, and what it does is not known."""
    script = rest(with_way_back(FROM_2_4)).ping(PROOF)
    proved = threading.Event()

    def play(source):
        source.send(script.data)
        while (heard := source.hear()) is not None:
            if heard == (PONG, PROOF):
                proved.set()

    taken = running(play)
    assert proved.wait(LONG)
    taken.link.capture.cancel()
    _, error = taken.join()
    assert isinstance(error, CaptureUndecided)
    check(error.machine, script, described=False)
    assert taken.link.diary[-1] == "end"


def test_behind_the_last_word(running):
    """Too late: the source was told that all is well, and that stands."""
    script = rest(with_way_back(FROM_2_4))
    told, cancelled = threading.Event(), threading.Event()

    def play(source):
        source.send(script.finish())
        while source.hear() != (SHUT, 0):
            pass
        told.set()
        assert cancelled.wait(LONG)

    taken = running(play)
    assert told.wait(LONG)
    taken.link.capture.cancel()
    cancelled.set()
    machine, error = taken.join()
    assert error is None
    check(machine, script)
    assert taken.link.capture.told


def test_of_a_source_that_has_let_go(running):
    """It does not listen and has sent all: the only copy is here, and to drop it would be to lose it."""
    script = small(FROM_2_4)
    keeping, cancelled = threading.Event(), threading.Event()

    def keep(machine):
        keeping.set()
        assert cancelled.wait(LONG)

    taken = running(lambda source: source.send(script.finish()), on_keep=keep)
    assert keeping.wait(LONG)
    taken.link.capture.cancel()
    cancelled.set()
    machine, error = taken.join()
    assert error is None
    check(machine, script)


def test_from_several_threads_at_once(running):
    data = upto(FROM_2_4, "END")
    taken = running(until_the_end(data))
    taken.link.far.wait_for(len(data))
    threads = [threading.Thread(target=taken.link.capture.cancel) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    _, error = taken.join()
    assert isinstance(error, MigrationCancelled)


@pytest.mark.parametrize("proof", [False, True])
def test_at_any_moment(plugins, settings, proof):
    """Both sides agree, whenever it was: a machine if the source was told so, none if it was told nothing.

    Which of both it becomes is a matter of time; that they agree is not.
    """
    outcomes = set()
    script = rest(with_way_back(FROM_2_4))
    if proof:
        script.ping(PROOF)
    before = len(script.data)
    stream = script.finish()

    def play(source):
        with suppress(ChannelError):
            source.send(stream[:before])
        while (heard := source.hear()) is not None:
            if heard == ((PONG, PROOF) if proof else (PONG, 0x10001)):
                with suppress(ChannelError):  # cancelled
                    source.send(stream[before:])
            if heard == (SHUT, 0):
                return

    for turn in range(80):
        link = Link(play, settings=settings, plugins=plugins)
        canceller = threading.Thread(target=link.capture.cancel)
        if turn % 2:
            link.on_keep = lambda machine, canceller=canceller: canceller.start()
        taken = Running(link)
        if not turn % 2:
            link.far.wait_for(turn * before // 80)
            canceller.start()
        machine, error = taken.join()
        canceller.join(LONG)
        told = "SHUT 0x0" in link.diary
        if machine is not None:
            outcomes.add("machine")
            assert told
            machine.close()
        elif isinstance(error, CaptureUndecided):
            outcomes.add("undecided")
            assert proof
            error.machine.close()
        else:
            outcomes.add("cancelled")
            assert isinstance(error, MigrationCancelled)
            assert not told
            assert f"PONG {PROOF:#x}" not in link.diary
    assert "cancelled" in outcomes


def test_what_ended_by_itself_is_not_cancelled(plugins, settings):
    """Neither a machine nor an error."""
    capture = Capture(Crumbs(small(FROM_2_4).finish(), [1 << 30]), settings=settings, plugins=plugins)
    machine = capture.run()
    capture.cancel()
    check(machine, small(FROM_2_4).eof())
    machine.close()
    capture = Capture(Crumbs(b"nonsense" * 9, [1 << 30]), settings=settings, plugins=plugins)
    with pytest.raises(StreamError):
        capture.run()
    capture.cancel()
