"""Real QEMUs and machines of ours in the same place, beside each other, and what is compared of them."""

from __future__ import annotations

import re
from typing import Any, Final

import attrs

from .ours import Ours
from .peer import Qemu
from .qmp import Monitored, spell

Side = Qemu | Ours


@attrs.frozen
class Two:
    """A source that runs and a destination, of one make."""

    source: Side
    destination: Side

    def listen(self) -> str:
        """Let the destination wait; the URI to go to."""
        uri = self.destination.uri("stream")
        self.destination.execute("migrate-incoming", uri=uri)
        return uri

    def begin(self, **parameters: Any) -> None:
        """Begin to migrate, with `parameters`, until both sides are active."""
        self.source.execute("migrate-set-parameters", **parameters)
        self.source.migrate(self.listen())
        self.source.wait_status("active")
        self.destination.wait_status("active")

    def both(self) -> tuple[Side, Side]:
        return self.source, self.destination


@attrs.frozen
class Beside:
    """Real QEMUs, and machines of ours in the same place."""

    theirs: Two
    ours: Two

    @property
    def sources(self) -> tuple[Side, Side]:
        return self.theirs.source, self.ours.source

    @property
    def destinations(self) -> tuple[Side, Side]:
        return self.theirs.destination, self.ours.destination

    def each(self) -> tuple[Two, Two]:
        return self.theirs, self.ours


CRAWLING: Final = {"max_bandwidth": 4096}
"""Never done; there is no way to be done but another bandwidth."""
FAST: Final = {"max_bandwidth": 1 << 40, "downtime_limit": 2000}


def order(side: Monitored) -> list[str]:
    """The events in a word each; of those passes that depend on how fast it went only the last, as PASS n.

    Passes must be counted from 1, one by one.
    """
    words = spell(side.qmp.events)
    passes = [word for word in words if word.startswith("PASS ")]
    expected = 0
    for word in passes:
        expected = 1 if word == "PASS 1" else expected + 1
        assert word == f"PASS {expected}"
    kept = ["PASS n" if re.fullmatch(r"PASS (?!1$)\d+", word) else word for word in words]
    end = kept.index("STOP") if "STOP" in kept else len(kept)
    return [word for at, word in enumerate(kept) if word != "PASS n" or at > end]


def settle(two: Two) -> None:
    """Wait until both are where they stay."""
    assert two.source.wait_status("completed", "failed") == "completed"
    two.source.wait_run_state("postmigrate")
    assert two.destination.wait_status("completed", "failed") == "completed"


def shape(value: Any) -> Any:
    """Keys, and types of values; words as they are."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return value if isinstance(value, str) else type(value).__name__


def compare_info(sides: tuple[Monitored, Monitored], status: str) -> None:
    """query-migrate of both: the same keys, with values of the same types; numbers may be of any kind."""
    shapes = []
    for side in sides:
        info = side.execute("query-migrate")
        assert info["status"] == status
        if "ram" in info:
            info["ram"]["mbps"] = float(info["ram"]["mbps"])  # 0 at first, and a fraction later
        shapes.append(shape(info))
    assert shapes[0] == shapes[1]
