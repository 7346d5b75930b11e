"""The stated figures, measured: ratios to physical limits of the same run, interleaved, medians.

    make bench                      everything, about three minutes
    make bench ARGS="bulk --runs 3" one part, fewer runs

Absolute figures vary between machines and from run to run; what counts is the ratio to the limit beside it. The
results are also written as JSON to `benchmarks/results.json` (`--json FILE`).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
MIB = 1 << 20


@attrs.frozen
class Result:
    """One line of the table. `met` is None where nothing was promised."""

    name: str
    value: str
    beside: str
    ratio: str
    target: str
    met: bool | None


def role(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "roles.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def pair(mib: int, destination: list[object], source: Callable[[str], list[object]]) -> dict[str, Any]:
    """Run a destination and a source against it; returns what both said.

    Just before the start as much memory as the destination will touch is touched and freed elsewhere: on a virtual
    machine whose hypervisor takes free memory back, the first touch of a page would otherwise measure the hypervisor
    (some 4 s a GiB), in whichever of the runs comes first.
    """
    with role(*destination) as there:
        assert there.stdout is not None
        uri = json.loads(there.stdout.readline())["uri"]
        with role(*source(uri)) as here:
            assert here.stdout is not None
            here.stdout.readline()
            with role("warm", mib + mib // 4) as warming:
                warming.communicate(timeout=60)
            out, _ = here.communicate("go\n", timeout=120)
        rest, _ = there.communicate(timeout=30)
    if here.returncode or there.returncode:
        raise SystemExit(f"a process of the benchmark failed: {here.args} {there.args}")
    said: dict[str, Any] = json.loads(out)
    if rest.strip():
        said["destination_cpu"] = json.loads(rest)["cpu"]
    return said


def migrate(mib: int, fill: str, memory: str = "fresh") -> dict[str, Any]:
    return pair(mib, ["destination", mib, memory], lambda uri: ["source", uri, mib, fill])


def raw(mib: int, memory: str) -> float:
    seconds: float = pair(mib, ["raw_destination", mib, memory], lambda uri: ["raw_source", uri, mib])["seconds"]
    return mib / seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def bulk(runs: int) -> list[Result]:
    """1 GiB of random pages into a fresh destination, beside a bare socket into untouched memory."""
    mib = 1024
    ours: dict[str, list[float]] = {"fresh": [], "populated": []}
    limits: dict[str, list[float]] = {"untouched": [], "populated": [], "reused": []}
    overheads, cpus = [], []
    for _ in range(runs):
        for memory, speeds in limits.items():
            speeds.append(raw(mib, memory))
        for memory, speeds in ours.items():
            said = migrate(mib, "random", memory)
            speeds.append(mib / said["seconds"])
            overheads.append(said["overhead"])
            if memory == "fresh":
                cpus.append(said["cpu"] + said["destination_cpu"])
    fresh, untouched = median(ours["fresh"]), median(limits["untouched"])
    ratio = fresh / untouched
    populated = median(ours["populated"]) / median(limits["populated"])
    overhead = max(overheads) / MIB
    return [
        Result("bulk random, fresh destination", f"{fresh:.0f} MiB/s", f"raw, untouched: {untouched:.0f} MiB/s",
               f"{ratio:.2f} x", ">= 3 x", ratio >= 3),
        Result("bulk random, populated destination", f"{median(ours['populated']):.0f} MiB/s",
               f"raw, populated: {median(limits['populated']):.0f} MiB/s", f"{populated:.2f} x", "", None),
        Result("", "", f"raw, one small buffer: {median(limits['reused']):.0f} MiB/s", "", "", None),
        Result("source's memory above its RAM, worst", f"{overhead:.0f} MiB", "", "", "<= 64 MiB", overhead <= 64),
        Result("CPU seconds per GiB, both sides", f"{median(cpus):.2f} s", "", "", "", None),
    ]  # fmt: skip


def zero(runs: int) -> list[Result]:
    """4 GiB of zero pages: never touched, and touched by the source."""
    mib = 4096
    figures = {fill: [mib / 1024 / migrate(mib, fill)["seconds"] for _ in range(runs)] for fill in ("none", "touched")}
    names = {"none": "all zero, never touched", "touched": "all zero, touched"}
    return [
        Result(names[fill], f"{median(values):.1f} GiB/s", "", "", ">= 8 GiB/s", median(values) >= 8)
        for fill, values in figures.items()
    ]


def idle(runs: int) -> list[Result]:
    """The downtime of a machine that does nothing."""
    downtimes = [migrate(512, "idle")["downtime"] for _ in range(runs)]
    value = median(downtimes)
    return [Result("downtime, idle machine of 512 MiB", f"{value:.1f} ms", f"worst {max(downtimes):.1f} ms", "",
                   "< 20 ms", value < 20)]  # fmt: skip


def demo(runs: int) -> list[Result]:
    """The demo: 512 MiB under constant writes."""
    said = []
    for _ in range(runs):
        command = [sys.executable, "-m", "whimbrel", "demo", "--json"]
        said.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    downtime = [run["migration"]["downtime-exact"] for run in said]
    kept = [run["operations-per-second"]["during"] / run["operations-per-second"]["before"] for run in said]
    identical = all(run["identical"] for run in said)
    return [
        Result("demo: downtime", f"{median(downtime):.1f} ms", f"worst {max(downtime):.1f} ms", "", "< 50 ms",
               median(downtime) < 50),
        Result("demo: operations per second during", f"{median(kept):.0%}", "of before", "", ">= 70 %",
               median(kept) >= 0.7),
        Result("demo: every byte compared", "identical" if identical else "DIFFERS", "", "", "identical", identical),
    ]  # fmt: skip


def startup(runs: int) -> list[Result]:
    """What a user waits for before anything happens."""

    def seconds(*arguments: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    numpy, ours, used, help_ = [], [], [], []
    for _ in range(2 * runs + 1):
        numpy.append(seconds("-c", "import numpy"))
        ours.append(seconds("-c", "import numpy, whimbrel"))
        used.append(seconds("-c", "import numpy, whimbrel; whimbrel.Machine"))
        help_.append(seconds("-m", "whimbrel", "--help"))
    beyond, all_of_it = ((median(times) - median(numpy)) * 1000 for times in (ours, used))
    help_ms = median(help_) * 1000
    return [
        Result("import whimbrel, beyond numpy's own", f"{beyond:.0f} ms", f"numpy: {median(numpy) * 1000:.0f} ms", "",
               "< 150 ms", beyond < 150),
        Result("... and everything behind Machine", f"{all_of_it:.0f} ms", "", "", "", None),
        Result("whimbrel --help", f"{help_ms:.0f} ms", "", "", "< 300 ms", help_ms < 300),
    ]  # fmt: skip


def qemu(runs: int) -> list[Result]:
    """A real QEMU's stream: taken by `whimbrel receive` beside a QEMU destination; `whimbrel inspect`."""
    from against_qemu import Bench, available

    if reason := available():
        return [Result("receive from a QEMU", "not measured", reason, "", "", None)]
    ours, theirs, preallocated, seconds, inspected = [], [], [], [], []
    with Bench() as bench:
        for _ in range(runs):
            theirs.append(bench.to_qemu(prealloc=False))
            speed, until_stored = bench.to_whimbrel()
            ours.append(speed)
            seconds.append(until_stored)
            preallocated.append(bench.to_qemu(prealloc=True))
            inspected.append(bench.inspect())
    ratio = median(ours) / median(theirs)
    return [
        Result("receive from a QEMU, 1 GiB random", f"{median(ours):.0f} MiB/s",
               f"QEMU destination: {median(theirs):.0f} MiB/s", f"{ratio:.2f} x", ">= 1 x", ratio >= 1),
        Result("", "", f"QEMU, preallocated: {median(preallocated):.0f} MiB/s", "", "", None),
        Result("... until it is on the disk", f"{median(seconds):.2f} s", "", "", "", None),
        Result("inspect", f"{median(inspected):.0f} MiB/s", "", "", ">= 200 MiB/s", median(inspected) >= 200),
    ]  # fmt: skip


PARTS = {part.__name__: part for part in (bulk, zero, idle, demo, startup, qemu)}


@click.command()
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)))
@click.option("--runs", default=5, show_default=True, help="runs of each measurement; the median is told")
@click.option("--json", "file", type=click.Path(path_type=Path), default=HERE / "results.json", show_default=True)
def main(parts: tuple[str, ...], runs: int, file: Path) -> None:
    """Measure what whimbrel promises."""
    results: list[Result] = []
    for name in parts or PARTS:
        click.echo(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}", err=True)
        results += PARTS[name](runs)
    table = Table("what", "measured", "beside", "ratio", "target", "")
    for result in results:
        mark = {True: "met", False: "MISSED", None: ""}[result.met]
        table.add_row(result.name, result.value, result.beside, result.ratio, result.target, mark)
    Console(width=130).print(table)
    file.write_text(json.dumps([attrs.asdict(result) for result in results], indent=1) + "\n")
    sys.exit(any(result.met is False for result in results))


if __name__ == "__main__":
    main()
