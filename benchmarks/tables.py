"""Figures as text: the cells of a table's rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring import Figure

HEAD = ("what", "whimbrel", "beside it", "ratio", "promised", "")
MARKS = {True: "met", False: "missed", None: ""}


def cells(figure: Figure) -> tuple[str, ...]:
    """What, whimbrel's median, the other's, their ratio, what was promised, and whether it is so."""
    ours = (
        "not measured"
        if figure.ours_error
        else _side(figure.our_median, figure.unit, figure.ours, figure.ours_stuck, figure.ours_failed)
    )
    theirs = (
        "not measured"
        if figure.theirs_error
        else _side(figure.their_median, figure.unit, figure.theirs, figure.theirs_stuck, figure.theirs_failed)
    )
    beside = f"{figure.beside}: {theirs}" if theirs else ""
    ratio = "" if figure.ratio is None else f"{number(figure.ratio)} x"
    return figure.name, ours, beside, ratio, str(figure.target or ""), MARKS[figure.met]


def number(value: float) -> str:
    """A figure with as many digits as mean something."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def _side(median: float | None, unit: str, samples: Sequence[float], stuck: int, failed: int) -> str:
    told = []
    if median is not None:
        spread = f" ({number(min(samples))} to {number(max(samples))})" if len(samples) > 1 else ""
        told.append(f"{number(median)} {unit}{spread}")
    if stuck:
        told.append(f"did not converge in {_runs(stuck)}")
    if failed:
        told.append(f"failed in {_runs(failed)}")
    return "; ".join(told)


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count > 1)}"
