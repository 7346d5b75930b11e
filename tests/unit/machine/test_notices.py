"""Notices: order, muting, holding back, and a thread only while there is something to tell."""

from __future__ import annotations

import logging
import threading

import pytest

from whimbrel.events import GuestStarted, GuestStopped, RoundStarted
from whimbrel.machine.notices import Notices

LONG = 20.0


@pytest.fixture
def notices():
    notices = Notices()
    yield notices
    assert notices.drain(LONG)
    assert "whimbrel-notices" not in {thread.name for thread in threading.enumerate() if thread.is_alive()} or (
        _joined()
    )


def _joined():
    # The thread has said that it ends, and may take a moment to be gone.
    for thread in threading.enumerate():
        if thread.name == "whimbrel-notices":
            thread.join(LONG)
            assert not thread.is_alive()
    return True


def numbered(count):
    return [RoundStarted(number=number) for number in range(count)]


def test_events_arrive_in_order_at_everyone(notices):
    first, second = [], []
    notices.add(first.append)
    notices.add(second.append)
    events = numbered(500)
    for event in events:
        notices.emit(event)
    assert notices.drain(LONG)
    assert first == second == events


def test_order_holds_from_several_threads_as_each_emitted(notices):
    told = []
    notices.add(told.append)
    gate = threading.Barrier(4)

    def emit(base):
        gate.wait()
        for number in range(200):
            notices.emit(RoundStarted(number=base + number))

    emitters = [threading.Thread(target=emit, args=(base,)) for base in (0, 1000, 2000, 3000)]
    for emitter in emitters:
        emitter.start()
    for emitter in emitters:
        emitter.join()
    assert notices.drain(LONG)
    for base in (0, 1000, 2000, 3000):
        mine = [event.number for event in told if base <= event.number < base + 1000]
        assert mine == list(range(base, base + 200))


def test_the_same_notifier_is_told_once_and_not_after_it_was_removed(notices):
    told = []
    notices.add(told.append)
    notices.add(told.append)
    notices.emit(GuestStarted())
    assert notices.drain(LONG)
    notices.remove(told.append)
    notices.remove(told.append)
    notices.emit(GuestStopped())
    assert notices.drain(LONG)
    assert [type(event) for event in told] == [GuestStarted]


def test_what_happened_before_it_listened_is_not_told(notices):
    notices.emit(GuestStarted())
    told = []
    notices.add(told.append)
    assert notices.drain(LONG)
    assert not told


@pytest.mark.parametrize("fault", [ValueError("broken"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_one_that_raises_is_muted_and_listed_and_the_others_hear_on(notices, caplog, fault):
    told = []
    calls = []

    def clumsy(event):
        calls.append(event)
        raise fault

    notices.add(clumsy)
    notices.add(told.append)
    with caplog.at_level(logging.ERROR, "whimbrel"):
        for event in numbered(5):
            notices.emit(event)
        assert notices.drain(LONG)
    assert len(calls) == 1
    assert told == [event for event in told if event.number in range(5)]
    assert [event.number for event in told] == [0, 1, 2, 3, 4]
    assert len(notices.failures) == 1
    assert "clumsy" in notices.failures[0]
    assert str(fault) in notices.failures[0]
    assert "clumsy" in caplog.text


def test_emit_does_not_wait_for_a_slow_notifier(notices):
    entered, go_on = threading.Event(), threading.Event()

    def slow(event):
        entered.set()
        assert go_on.wait(LONG)

    notices.add(slow)
    for event in numbered(3):
        notices.emit(event)
    assert entered.wait(LONG)
    notices.emit(GuestStopped())  # returns although the first is not through
    assert not notices.drain(0.01)
    go_on.set()


def test_nothing_is_told_while_held_and_all_of_it_after(notices):
    told = []
    notices.add(told.append)
    with notices.held(), notices.held():
        for event in numbered(5):
            notices.emit(event)
        assert not notices.drain(0.02)
        assert not told
    assert notices.drain(LONG)
    assert [event.number for event in told] == [0, 1, 2, 3, 4]


def test_holding_stops_a_delivery_that_is_under_way(notices):
    told, entered, go_on = [], threading.Event(), threading.Event()

    def gated(event):
        told.append(event)
        entered.set()
        assert go_on.wait(LONG)

    notices.add(gated)
    for event in numbered(3):
        notices.emit(event)
    assert entered.wait(LONG)
    with notices.held():  # waits for the one in delivery, a moment at most
        go_on.set()
        assert not notices.drain(0.05)
        assert len(told) == 1
    assert notices.drain(LONG)
    assert len(told) == 3


def test_holding_waits_for_the_notice_in_delivery_if_it_is_quick(notices):
    inside, entered, go_on = [], threading.Event(), threading.Event()

    def gated(event):
        inside.append(True)
        entered.set()
        assert go_on.wait(LONG)
        inside.append(False)

    notices.add(gated)
    notices.emit(GuestStarted())
    assert entered.wait(LONG)
    go_on.set()
    with notices.held():
        assert notices.drain(LONG)  # nothing is queued and nobody is inside
        assert inside == [True, False]


def test_a_notifier_may_emit_remove_itself_and_ask_to_drain(notices):
    told, drained = [], []

    def busy(event):
        told.append(event)
        if isinstance(event, GuestStarted):
            drained.append(notices.drain(LONG))
            notices.emit(GuestStopped())
        else:
            notices.remove(busy)

    notices.add(busy)
    notices.emit(GuestStarted())
    assert notices.drain(LONG)
    notices.emit(GuestStarted())
    assert notices.drain(LONG)
    assert [type(event) for event in told] == [GuestStarted, GuestStopped]
    assert drained == [False]  # it would have waited for itself


def test_there_is_no_thread_while_there_is_nothing_to_tell(notices):
    told = []
    notices.add(told.append)
    assert notices._thread is None
    for _ in range(3):
        notices.emit(GuestStarted())
        assert notices.drain(LONG)
        assert notices._thread is None
    assert len(told) == 3
