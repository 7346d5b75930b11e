"""Chooses the dirty tracker of a migration from what is offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from whimbrel.errors import TrackerUnavailable, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import DirtyTrackerSpec, MemoryRegion

AUTO = "auto"


def choose(
    name: str, specs: Sequence[DirtyTrackerSpec], regions: Sequence[MemoryRegion]
) -> tuple[DirtyTrackerSpec, tuple[str, ...]]:
    """Choose the tracker `name` for `regions`, or with "auto" the working one of the highest rank.

    Returns it with one sentence for each better one that was passed over. Raises UnknownNameError if there is none
    of that name, and TrackerUnavailable if the one named, or every one that "auto" may take, cannot work here.
    """
    if name != AUTO:
        for spec in specs:
            if spec.name == name:
                reason = _why_not(spec, regions)
                if reason is not None:
                    raise TrackerUnavailable(f"the dirty tracker {name!r} cannot work here: {reason}")
                return spec, ()
        raise UnknownNameError("dirty tracker", name, [AUTO, *(spec.name for spec in specs)])
    ranked = [(spec.rank, spec) for spec in specs if spec.rank is not None]
    reasons: list[str] = []
    for _, spec in sorted(ranked, key=lambda pair: (-pair[0], pair[1].name)):
        reason = _why_not(spec, regions)
        if reason is None:
            return spec, tuple(reasons)
        reasons.append(f"{spec.name}: {reason}")
    raise TrackerUnavailable("no dirty tracker works here" + "".join(f"; {reason}" for reason in reasons))


def _why_not(spec: DirtyTrackerSpec, regions: Sequence[MemoryRegion]) -> str | None:
    try:
        return spec.probe(regions)
    except Exception as exc:  # noqa: BLE001 - a stranger's plugin; its failure is a reason, not an end
        return f"its probe failed: {exc!r}"
