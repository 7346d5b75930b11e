"""The sweep can fail: what is planted here in the protocol, in the link or in the machine is found out."""

from __future__ import annotations

import os

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ChannelLost
from whimbrel.machine import BareMachine
from whimbrel.migration import IncomingMigration, OutgoingMigration, outgoing
from whimbrel.migration.handover import DestinationOwnership, Handover, Reason
from whimbrel.testing import cutwire
from whimbrel.testing.cutwire import Action, Cut, Way

from .moves import DESTINATION, RUNS, SOURCE, STANDS, Step, check
from .sweep import quiet_world

IN_THE_PROOF = Cut(Way.BACK, 20, Action.RESET)
BEHIND_THE_PROOF = Cut(Way.BACK, 24, Action.HOLE)
IN_THE_LAST_WORD = Cut(Way.BACK, 28, Action.RESET)


@pytest.fixture
def world():
    with quiet_world("proof") as made:
        assert made.attempt().verdict == "destination"
        yield made


def test_nothing_is_planted(world):
    verdicts = [world.attempt(cut).verdict for cut in (IN_THE_PROOF, BEHIND_THE_PROOF, IN_THE_LAST_WORD)]
    assert verdicts == ["source", "nobody", "destination"]


@pytest.fixture
def starts_too_early(monkeypatch):
    """A destination that does not wait for the order."""
    prepared = IncomingMigration._prepared

    def at_once(self):
        prepared(self)
        self._holding.take_over(Reason.ORDERED)

    monkeypatch.setattr(IncomingMigration, "_prepared", at_once)


def test_a_destination_that_starts_at_its_own_proof_runs_beside_the_source(world, starts_too_early):
    outcome = world.attempt(IN_THE_PROOF)
    assert outcome.verdict == "both"
    assert "another ran" in outcome.why[0]


def test_the_model_knows_even_where_no_harm_comes_of_it(world, starts_too_early):
    outcome = world.attempt()
    assert outcome.verdict == "model"
    assert "the source is frozen and has not let go" in outcome.why[0]


def test_a_source_that_goes_on_behind_its_release(world, monkeypatch):
    settle = OutgoingMigration._settle

    def and_go_on(self, error, *, cancelled):
        end = settle(self, error, cancelled=cancelled)
        if error is not None and self._released:
            BareMachine.reclaim(self._machine)  # the real one waits for this thread
            self._machine.start()
        return end

    monkeypatch.setattr(OutgoingMigration, "_settle", and_go_on)
    assert world.attempt(IN_THE_PROOF).verdict == "source"
    assert world.attempt(IN_THE_LAST_WORD).verdict == "both"


def test_a_source_that_goes_on_while_nobody_else_does(world, monkeypatch):
    """No two run, and still: the destination may have been told."""
    monkeypatch.setattr(OutgoingMigration, "_released", property(lambda self: False))
    move = Handover.move

    def any_move(self, to, why):
        if str(self.now) == "released" and str(to) == "owner":
            self._now = to
            return
        move(self, to, why)

    monkeypatch.setattr(Handover, "move", any_move)
    outcome = world.attempt(BEHIND_THE_PROOF)
    assert outcome.verdict == "model"
    assert "source runs: the source is released" in outcome.why


def test_a_link_that_sends_an_old_machine_again(world):
    """A second destination starts what has moved on long ago."""
    assert world.attempt().verdict == "destination"
    old = world.network.passed(Way.FORTH)
    world.network.lay()
    arriving = world.destination.incoming("memory:sweep-old")
    link = world.network.connect("sweep-old", Patience(10.0))
    link.send(old)
    link.end_writing()
    arriving.wait(60.0)
    link.close()
    world.oracle.entries()
    # The image is the one that was frozen last: who runs has not been stopped since.
    assert {kind for kind, _ in world.oracle.take_wrong()} == {"both", "travel"}


def test_an_old_machine_that_nobody_runs_beside_is_one_that_went_back_in_time(world):
    old = world.network.passed(Way.FORTH)
    assert world.attempt().verdict == "destination"
    world.source.stop()
    world.oracle.take_wrong()
    world.network.lay()
    arriving = world.destination.incoming("memory:sweep-old")
    link = world.network.connect("sweep-old", Patience(10.0))
    link.send(old)
    link.end_writing()
    arriving.wait(60.0)
    link.close()
    world.oracle.entries()
    assert {kind for kind, _ in world.oracle.take_wrong()} == {"travel", "torn"}


def test_a_bit_that_flips_in_a_page_is_seen_where_it_is_started(world, monkeypatch):
    put = cutwire._CutPipe.put

    def flipped(self, data):
        if self.passed <= 10_000 < self.passed + len(data):
            copy = bytearray(data)
            copy[10_000 - self.passed] ^= 1
            data = memoryview(copy)
        return put(self, data)

    monkeypatch.setattr(cutwire._CutPipe, "put", flipped)
    assert world.attempt().verdict == "torn"


def test_a_machine_of_which_one_side_says_that_all_is_well(world, monkeypatch):
    monkeypatch.setattr(outgoing, "_undecided", lambda error: ChannelLost("the machine goes on here"))
    assert world.attempt(IN_THE_LAST_WORD).verdict == "destination"
    outcome = world.attempt(BEHIND_THE_PROOF)
    assert outcome.verdict == "lost"
    assert "goes on here" in outcome.why[0]


def test_a_side_that_is_prepared_without_saying_so(world, monkeypatch):
    move = Handover.move

    def silently(self, to, why):
        if to is DestinationOwnership.PREPARED:
            self._now = to
            return
        move(self, to, why)

    monkeypatch.setattr(Handover, "move", silently)
    outcome = world.attempt()
    assert outcome.verdict == "model"
    assert any("the model has no such move from loading" in why for why in outcome.why)


def test_a_descriptor_that_is_left_behind(world, monkeypatch):
    settle, left = IncomingMigration._settle, []

    def and_leave_something(self, error, *, cancelled):
        left.append(os.open("/dev/null", os.O_RDONLY))
        return settle(self, error, cancelled=cancelled)

    monkeypatch.setattr(IncomingMigration, "_settle", and_leave_something)
    try:
        assert world.attempt(IN_THE_PROOF).verdict == "leak"
    finally:
        for each in left:
            os.close(each)


# ------------------------------------------------------------------------------------------------- the replay by itself

WHOLE = [
    (SOURCE, "", STANDS),
    (SOURCE, "owner", "frozen", Reason.STOPPED),
    (DESTINATION, "loading", "prepared", Reason.LOADED),
    (SOURCE, "frozen", "prepared", Reason.PROVED),
    (SOURCE, "prepared", "released", Reason.LET_GO),
    (DESTINATION, "prepared", "owner", Reason.ORDERED),
    (DESTINATION, "", RUNS),
    (SOURCE, "released", "done", Reason.RUNNING),
]


def replayed(steps, mine="done", theirs="owner"):
    return check([Step(*step) for step in steps], source=mine, destination=theirs)


def test_the_whole_handover_is_in_the_model():
    assert replayed(WHOLE) == []


@pytest.mark.parametrize("missing", range(len(WHOLE)))
def test_without_any_of_its_steps_it_is_not(missing):
    """But a destination that does not run has merely arrived paused."""
    steps = WHOLE[:missing] + WHOLE[missing + 1 :]
    assert bool(replayed(steps)) == (WHOLE[missing][2] != RUNS)


@pytest.mark.parametrize("first", range(len(WHOLE) - 1))
def test_in_another_order_it_is_not(first):
    steps = [*WHOLE[:first], WHOLE[first + 1], WHOLE[first], *WHOLE[first + 2 :]]
    # Being frozen and proving, running and being told so: each is another's business.
    harmless = {0, 1, 6}
    assert bool(replayed(steps)) == (first not in harmless)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([*WHOLE[:5], (SOURCE, "released", "owner", Reason.REFUSE)], "has not refused"),
        ([*WHOLE[:5], (SOURCE, "released", "owner", Reason.OPERATOR)], "nobody else gives it back"),
        ([*WHOLE[:5], (SOURCE, "released", "owner", Reason.THAWED)], "no such move"),
        ([*WHOLE[:3], (DESTINATION, "prepared", "refused", Reason.ABORTED)], "has taken nothing back"),
        ([*WHOLE, (SOURCE, "", RUNS)], "both run"),
        ([*WHOLE[:7], (DESTINATION, "owner", "refused", Reason.FAILED)], "it has run"),
        ([*WHOLE[:2], (SOURCE, "frozen", "released", Reason.LET_GO)], "has proved nothing"),
        ([(SOURCE, "", STANDS), (SOURCE, "owner", "released", Reason.LET_GO)], "no such move"),
    ],
)
def test_what_the_two_sides_may_not_be_together(steps, words):
    assert any(words in why for why in replayed(steps))
