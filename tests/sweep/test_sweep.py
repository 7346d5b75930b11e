"""The quick sweep: some five thousand cuts, and not one of them makes it two, none, or another machine than it was.

`make test` makes those around the one moment that counts, `make test-slow` all of them; `make sweep` is the long one.
"""

from __future__ import annotations

from collections import Counter

import pytest

from .plan import everywhere, name_of, rows, thinned
from .report import OUTCOMES
from .sweep import EVERYWHERE, measure, quiet_world
from .world import GOOD, MODES

PART = 425  # cuts, some four seconds
PARTS = {"proof": 2, "xbzrle": 2, "lanes": 2, "h1": 4, "answer": 1, "order": 1, "proof-cut": 1, "proof-dark": 1}
OVER_ONE = [name for name, mode in MODES.items() if mode.handover == "proof"]
REFUSED, MOVED = "source (owner, refused)", "destination (done, owner)"
COMMITS = {"answer", "order"}  # modes in which all cuts are behind the release, so that the source never has it back


@pytest.fixture(scope="module")
def plans():
    """The cuts of each mode, found out once."""
    made = {}

    def plan(mode):
        if mode not in made:
            measured = measure(mode)
            cuts = everywhere(measured, all_of_it=mode in EVERYWHERE)
            made[mode] = measured, thinned(cuts, measured, PARTS[mode] * PART)
        return made[mode]

    return plan


def test_every_mode_is_swept_and_there_are_five_thousand():
    assert PARTS.keys() == MODES.keys()
    assert sum(PARTS.values()) * PART >= 5_000


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "part"), [(mode, part) for mode, parts in PARTS.items() for part in range(parts)])
def test_wherever_the_link_is_cut(plans, mode, part):
    _, cuts = plans(mode)
    mine = cuts[part :: PARTS[mode]]
    found, wrong, missed = Counter(), [], []
    with quiet_world(mode) as world:
        if world.mode.first is not None:
            world.measure()  # finds where the first cut is
        for cut in mine:
            outcome = world.attempt(cut)
            found[name_of(outcome)] += 1
            if outcome.verdict not in GOOD:
                wrong.append(f"{cut}: {outcome}")
                break  # this world is not what it was
            if not outcome.cut and cut.connection == 0:  # which lane takes what is up to the lanes
                missed.append(str(cut))
    print(mode, found)
    assert not wrong
    assert not missed
    assert len(mine) > 0.9 * min(PART, len(cuts))
    assert found.keys() <= OUTCOMES.keys()
    if MODES[mode].first is not None:
        # Words alone are cut: nearly always they come through at last, and all go the way of the first cut.
        assert found[MOVED if mode in COMMITS else REFUSED] > 0.75 * len(mine)
        assert found[REFUSED if mode in COMMITS else MOVED] == 0
        return
    assert {REFUSED, "source (owner, prepared)", MOVED} <= found.keys()
    # The machine is where it was, and it goes.
    assert found[REFUSED] > found["source (owner, prepared)"]


@pytest.mark.parametrize("mode", OVER_ONE)
def test_around_the_one_moment_in_which_nobody_runs(plans, mode):
    """Each byte of the way back, in a hole: with the last byte of the proof, and not the answer to the order."""
    measured, _ = plans(mode)
    cuts = [
        cut for cut in everywhere(measured, all_of_it=False)
        if (cut.connection, cut.way, cut.action) == (0, "back", "hole")
    ]  # fmt: skip
    assert len(cuts) == measured.sizes[0, "back"] + 1
    with quiet_world(mode) as world:
        found = [(cut, name_of(world.attempt(cut)), False) for cut in cuts]
    shown = [(row.first, row.last, row.outcome) for row in rows(found)]
    proof = measured.sizes[0, "back"] - 16  # in front of it; SHUT is the last
    assert shown == [
        (0, proof, "source (owner, refused)"),
        (proof + 1, proof + 7, "source (owner, prepared)"),
        (proof + 8, proof + 8, "nobody (released, prepared)"),
        (proof + 9, proof + 15, "destination (released, owner)"),
        (proof + 16, proof + 16, "destination (done, owner)"),
    ]


@pytest.mark.slow
def test_in_pairs_only_a_link_that_is_gone_for_good_leaves_a_moment_in_which_nobody_runs(plans):
    """The same bytes in a hole; over a detour each of them is settled without anybody's help."""
    measured, _ = plans("h1")
    every = [cut for cut in everywhere(measured, all_of_it=False) if (cut.connection, cut.way) == (0, "back")]
    found = {}
    with quiet_world("h1") as world:
        for action in ("hole", "detour"):
            cuts = [cut for cut in every if cut.action == action]
            found[action] = [
                (row.first, row.last, row.outcome)
                for row in rows((cut, name_of(world.attempt(cut)), False) for cut in cuts)
            ]
    end = measured.sizes[0, "back"]
    proof = end - 44  # the last byte of the PONG; RUNNING and SHUT follow
    assert found["hole"] == [
        (0, proof - 8, REFUSED),
        (proof - 7, proof - 1, "source (owner, prepared)"),
        (proof, proof, "nobody (released, prepared)"),
        (proof + 1, end - 9, "destination (released, owner)"),
        (end - 8, end, MOVED),
    ]
    assert found["detour"] == [(0, proof - 1, REFUSED), (proof, end, MOVED)]
