"""Which tracker a migration gets."""

from __future__ import annotations

import pluggy
import pytest

from whimbrel import hookspecs
from whimbrel.abc import DirtyTrackerSpec
from whimbrel.errors import TrackerUnavailable, UnknownNameError
from whimbrel.machine.dirty import CompareTracker, ManualTracker, UserfaultTracker, choose, plugin
from whimbrel.machine.ram import Ram


def spec(name: str, rank: int | None, reason: str | None = None) -> DirtyTrackerSpec:
    return DirtyTrackerSpec(name=name, summary="", create=CompareTracker, probe=lambda _: reason, rank=rank)


def broken(name: str, rank: int | None) -> DirtyTrackerSpec:
    return DirtyTrackerSpec(name=name, summary="", create=CompareTracker, probe=lambda _: 1 / 0, rank=rank)


def test_auto_takes_the_highest_rank_that_works_and_says_what_it_passed_over():
    specs = [spec("low", 1), spec("high", 9, "no kernel"), broken("odd", 8), spec("mid", 5), spec("named only", None)]
    chosen, reasons = choose("auto", specs, [])
    assert chosen.name == "mid"
    assert reasons == ("high: no kernel", "odd: its probe failed: ZeroDivisionError('division by zero')")


def test_equal_ranks_are_taken_by_name():
    assert choose("auto", [spec("b", 1), spec("a", 1)], [])[0].name == "a"


def test_a_name_is_taken_whatever_its_rank():
    specs = [spec("high", 9), spec("named only", None)]
    assert choose("named only", specs, []) == (specs[1], ())


def test_a_named_one_that_cannot_work_is_an_error_with_its_reason():
    with pytest.raises(TrackerUnavailable, match="'high' cannot work here: no kernel"):
        choose("high", [spec("high", 9, "no kernel"), spec("low", 1)], [])
    with pytest.raises(TrackerUnavailable, match="its probe failed"):
        choose("odd", [broken("odd", None)], [])


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"did you mean 'compare'.*auto, compare"):
        choose("compair", [spec("compare", 1)], [])


def test_if_none_works_all_reasons_are_told():
    with pytest.raises(TrackerUnavailable, match="no dirty tracker works here; b: two; a: one"):
        choose("auto", [spec("a", 1, "one"), spec("b", 2, "two"), spec("c", None)], [])


def test_the_bundled_ones_come_through_the_same_door_as_a_strangers():
    manager = pluggy.PluginManager("whimbrel")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    manager.check_pending()
    (specs,) = manager.hook.whimbrel_dirty_trackers()
    ranked = sorted(specs, key=lambda spec: -spec.rank)
    assert [spec.name for spec in ranked] == ["userfaultfd", "compare", "manual"]
    assert [type(spec.create()) for spec in ranked] == [UserfaultTracker, CompareTracker, ManualTracker]
    assert all(spec.summary for spec in ranked)


@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
def test_auto_never_falls_through_to_manual(memory):
    block = Ram(memory).add("a", 1 << 20)
    chosen, reasons = choose("auto", plugin.whimbrel_dirty_trackers(), [block])
    assert chosen.name == ("compare" if reasons else "userfaultfd")
