"""What a user waits for before anything happens."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from benchmarks.measuring import Bench, Figure, Target

STARTS: Final = {
    "numpy": ("-c", "import numpy"),
    "whimbrel": ("-c", "import numpy, whimbrel"),
    "machine": ("-c", "import numpy, whimbrel; whimbrel.Machine"),
    "help": ("-m", "whimbrel", "--help"),
}


def measure(bench: Bench) -> list[Figure]:
    """How long `import whimbrel` and `whimbrel --help` take, beside `import numpy`."""
    taken: dict[str, list[float]] = {name: [] for name in STARTS}
    bench.in_turns({name: _timing(taken[name], arguments) for name, arguments in STARTS.items()})
    beyond = [ours - numpy for ours, numpy in zip(taken["whimbrel"], taken["numpy"], strict=True)]
    return [
        Figure(
            name="import whimbrel, beyond numpy's own",
            unit="ms",
            ours=beyond,
            more_is_better=False,
            target=Target("ours", most=150),
        ),
        Figure(
            name="... and everything behind Machine",
            unit="ms",
            ours=[ours - numpy for ours, numpy in zip(taken["machine"], taken["numpy"], strict=True)],
            more_is_better=False,
        ),
        Figure(
            name="whimbrel --help",
            unit="ms",
            ours=taken["help"],
            theirs=taken["numpy"],
            beside="import numpy",
            more_is_better=False,
            target=Target("ours", most=300),
        ),
    ]


def _timing(taken: list[float], arguments: tuple[str, ...]) -> Callable[[], None]:
    def take() -> None:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        taken.append((time.perf_counter() - began) * 1000)

    return take
