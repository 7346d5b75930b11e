"""Measures both sides in turns, and keeps what was measured as figures: samples, medians, ratios, targets.

Rules:

* The sides take turns within a run, and change the order from run to run, so that what other work the host does falls
  on both.
* A run that fails is made once more, and told in the figures; a side that fails twice on one work is not asked again
  for it. The others go on.
* A ratio is always whimbrel's median divided by QEMU's, whichever of more and less is the better.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from benchmarks import qemu_pairs, whimbrel_pairs
from benchmarks.work import Run, RunFailed, Work

Tell = Callable[[str], None]
Take = Callable[[], None]


@attrs.frozen
class Target:
    """What was promised: `of` is "ratio" or "ours", `least` or `most` what it must be."""

    of: str
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether `value` is what was promised."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        sign, bound = ("≥", self.least) if self.least is not None else ("≤", self.most)
        return f"{sign} {bound:g}{' x' if self.of == 'ratio' else ''}"


@attrs.frozen(kw_only=True)
class Figure:
    """One quantity, of whimbrel (`ours`) and of what is beside it (`theirs`), a sample a run.

    `where` says which of its kind it is, for plots. An error stands in place of samples; `stuck` counts runs that had
    no end, which are no samples; `failed` those that failed. Where neither more nor less is better, `more_is_better` is
    None.
    """

    name: str
    unit: str
    ours: Sequence[float] = ()
    theirs: Sequence[float] = ()
    beside: str = "QEMU"
    more_is_better: bool | None = True
    target: Target | None = None
    where: Mapping[str, Any] = attrs.field(factory=dict)
    ours_error: str = ""
    theirs_error: str = ""
    ours_stuck: int = 0
    theirs_stuck: int = 0
    ours_failed: int = 0
    theirs_failed: int = 0

    @property
    def our_median(self) -> float | None:
        """The median of whimbrel's samples."""
        return statistics.median(self.ours) if self.ours else None

    @property
    def their_median(self) -> float | None:
        """The median of the other's samples."""
        return statistics.median(self.theirs) if self.theirs else None

    @property
    def ratio(self) -> float | None:
        """Our median by the other's."""
        ours, theirs = self.our_median, self.their_median
        return None if ours is None or not theirs else ours / theirs

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or nothing to hold against it."""
        if self.target is None:
            return None
        value = self.ratio if self.target.of == "ratio" else self.our_median
        return None if value is None else self.target.met(value)

    def as_dict(self) -> dict[str, Any]:
        """Everything, what follows from it too, ready for JSON."""
        told = attrs.asdict(self)
        return {**told, "our_median": self.our_median, "their_median": self.their_median, "ratio": self.ratio,
                "target_text": str(self.target or ""), "met": self.met}  # fmt: skip

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Figure:
        """The figure that `as_dict` has told."""
        fields = {field.name: told[field.name] for field in attrs.fields(cls) if field.name in told}
        if fields.get("target") is not None:
            fields["target"] = Target(**fields["target"])
        return cls(**fields)


@attrs.define
class Samples:
    """The runs of one side on one work."""

    runs: list[Run] = attrs.field(factory=list)
    failed: int = 0
    error: str = ""

    def take(self, take: Callable[[], Run]) -> None:
        """Run once more, unless it has failed twice."""
        wanted = len(self.runs) + 1
        while not self.error and len(self.runs) < wanted:
            try:
                self.runs.append(take())
            except RunFailed as exc:
                self.failed += 1
                self.error = str(exc) if self.failed > 1 else ""

    @property
    def ended(self) -> list[Run]:
        """Those that came to an end."""
        return [run for run in self.runs if run.converged]

    @property
    def stuck(self) -> int:
        """How many had none."""
        return len(self.runs) - len(self.ended)


@attrs.frozen
class Both:
    """The runs of both sides on one work."""

    work: Work
    ours: Samples = attrs.field(factory=Samples)
    theirs: Samples = attrs.field(factory=Samples)

    def figure(
        self, name: str, unit: str, quantity: Callable[[Run], float], *, even_stuck: bool = False, **more: Any
    ) -> Figure:
        """What `quantity` says of each run that has ended; of all, where that means something."""
        ours = self.ours.runs if even_stuck else self.ours.ended
        theirs = self.theirs.runs if even_stuck else self.theirs.ended
        return Figure(
            name=name,
            unit=unit,
            ours=[quantity(run) for run in ours],
            theirs=[quantity(run) for run in theirs],
            ours_error=self.ours.error,
            theirs_error=self.theirs.error,
            ours_stuck=self.ours.stuck,
            theirs_stuck=self.theirs.stuck,
            ours_failed=self.ours.failed,
            theirs_failed=self.theirs.failed,
            **more,
        )

    def speed(self, name: str, **more: Any) -> Figure:
        """MiB of RAM per second of the source's total time."""
        return self.figure(name, "MiB/s", lambda run: self.work.mib / run.seconds, **more)

    def cpu(self, name: str, **more: Any) -> Figure:
        """Processor seconds of both processes for each GiB of RAM."""
        return self.figure(
            name, "CPU s/GiB", lambda run: run.cpu / (self.work.mib / 1024), more_is_better=False, **more
        )

    def downtime(self, name: str, **more: Any) -> Figure:
        """Milliseconds of standstill."""
        return self.figure(name, "ms", lambda run: run.downtime, more_is_better=False, **more)

    def seconds(self, name: str, **more: Any) -> Figure:
        """The source's total time."""
        return self.figure(name, "s", lambda run: run.seconds, more_is_better=False, **more)


@attrs.frozen
class Bench:
    """How thoroughly to measure: `runs` of each, `quick` for sizes that only show that it works."""

    runs: int = 5
    quick: bool = False
    tell: Tell = print

    def mib(self, full: int) -> int:
        """A size of RAM: `full`, or a small one."""
        return min(full, 16) if self.quick else full

    def in_turns(self, takes: Mapping[str, Take]) -> None:
        """Call all of `takes` in each run, every other run the other way round."""
        for number in range(self.runs):
            ordered = list(takes.items())
            for name, take in ordered if number % 2 == 0 else reversed(ordered):
                self.tell(f"  {number + 1}/{self.runs} {name}")
                take()

    def both(self, works: Mapping[str, Work], further: Mapping[str, Take] | None = None) -> dict[str, Both]:
        """Measure both sides on all `works`, by name, and call what is `further` in turn with them."""
        measured = {name: Both(work) for name, work in works.items()}
        missing = qemu_pairs.missing()
        takes = dict(further or {})
        for name, both in measured.items():
            both.theirs.error = missing
            takes[f"{name}: QEMU"] = _taking(both.theirs, qemu_pairs.migrate, both.work)
            takes[f"{name}: whimbrel"] = _taking(both.ours, whimbrel_pairs.migrate, both.work)
        self.in_turns(takes)
        return measured


def _taking(samples: Samples, migrate: Callable[[Work], Run], work: Work) -> Take:
    return lambda: samples.take(lambda: migrate(work))


def errors(figures: Iterable[Figure]) -> list[str]:
    """Why something could not be measured, each reason once."""
    return sorted({text for figure in figures for text in (figure.ours_error, figure.theirs_error) if text})
