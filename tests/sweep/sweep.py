"""Carries a sweep out, in pieces that any process can do, and keeps what came out of each."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import attrs

from whimbrel.testing.cutwire import Cut

from .plan import Row, everywhere, joined, name_of, rows
from .world import GOOD, MODES, Measured, World, world

CHUNK: Final = 400  # cuts that one process does at a time, with machines of their own
EVERYWHERE: Final = frozenset({"proof", "h1"})
"""Modes of which every byte of the whole stream is cut; of others those of the window, and around each piece."""


@contextmanager
def quiet_world(mode: str) -> Iterator[World]:
    """A world in a folder of its own, which logs nothing: there is a warning for about every second cut."""
    before, interval = logging.root.manager.disable, sys.getswitchinterval()
    logging.disable(logging.CRITICAL)
    sys.setswitchinterval(0.0005)  # a cut is some dozens of turns between threads that wait for one another
    gc.collect()
    gc.freeze()  # an attempt's leaks are looked for among its own objects, and not among all of the tests'
    try:
        with tempfile.TemporaryDirectory(prefix="whimbrel-sweep-") as folder, world(mode, Path(folder)) as made:
            yield made
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval)
        logging.disable(before)


def measure(mode: str) -> Measured:
    """Where everything is in the streams of `mode`."""
    with quiet_world(mode) as made:
        return made.measure()


def run(mode: str, cuts: Sequence[Cut]) -> tuple[list[Row], list[str]]:
    """Make `cuts`, one attempt after another; what came out, and what is wrong.

    Behind an attempt that went wrong the world is made anew.
    """
    found, wrong = [], []
    left = list(cuts)
    while left:
        with quiet_world(mode) as made:
            if made.mode.first is not None:
                made.measure()  # finds where the first cut is
            while left:
                cut = left.pop(0)
                outcome = made.attempt(cut)
                found.append((cut, name_of(outcome), bool(outcome.told)))
                if outcome.verdict not in GOOD:
                    wrong.append(f"{mode}: {cut}: {found[-1][1]}")
                    break
    return list(rows(found)), wrong


# ----------------------------------------------------------------------------------------------------- all of it


@attrs.define
class Chunk:
    """A piece of a sweep."""

    mode: str
    number: int
    cuts: list[Cut]


def chunks(modes: Sequence[str]) -> Iterator[Chunk]:
    """All pieces of a whole sweep of `modes`, those with something of everything first."""
    for mode in modes:
        cuts = everywhere(measure(mode), all_of_it=mode in EVERYWHERE)
        for number, first in enumerate(range(0, len(cuts), CHUNK)):
            yield Chunk(mode, number, cuts[first : first + CHUNK])


def carry_out(chunk: Chunk) -> dict[str, Any]:
    """Do a piece; what is kept of it."""
    started, used = time.perf_counter(), time.process_time()
    found, wrong = run(chunk.mode, chunk.cuts)
    return {
        "mode": chunk.mode,
        "number": chunk.number,
        "cuts": len(chunk.cuts),
        "seconds": round(time.perf_counter() - started, 3),
        "processor_seconds": round(time.process_time() - used, 3),
        "rows": [attrs.astuple(row) for row in found],
        "wrong": wrong,
    }


def sweep(modes: Sequence[str], kept: Path, *, processes: int, seconds: float) -> None:
    """Do what of the sweep is not in `kept` yet, until it is done or `seconds` are over; says how far it is."""
    done = {(piece["mode"], piece["number"]) for piece in pieces(kept)}
    wanted = list(chunks(modes))
    todo = sorted(
        (chunk for chunk in wanted if (chunk.mode, chunk.number) not in done), key=lambda chunk: _turn(chunk.number)
    )
    total = sum(len(chunk.cuts) for chunk in wanted)
    made = total - sum(len(chunk.cuts) for chunk in todo)
    print(f"{total} cuts, {made} of them made before; {processes} processes", flush=True)
    started, first, wrong = time.monotonic(), made, 0
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file, ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        queue, running = iter(todo), set()
        while True:
            while len(running) < processes + 1 and time.monotonic() - started < seconds:
                if (chunk := next(queue, None)) is None:
                    break
                running.add(pool.submit(carry_out, chunk))
            if not running:
                break
            for future in [next(as_completed(running))]:
                running.discard(future)
                piece = future.result()
                file.write(json.dumps(piece) + "\n")
                file.flush()
                os.fsync(file.fileno())
                made, wrong = made + piece["cuts"], wrong + len(piece["wrong"])
                rate = (made - first) / (time.monotonic() - started)
                left = (total - made) / rate
                print(f"{made} of {total} cuts, {rate:.0f} a second, {left:.0f} s to go, {wrong} wrong", flush=True)
                for each in piece["wrong"]:
                    print(each, flush=True)


def _turn(number: int) -> float:
    """Chunks in an order in which, wherever it stops, what is done is spread over everything."""
    fraction, value = 0.5, 0.0
    while number:
        value, number, fraction = value + fraction * (number & 1), number >> 1, fraction / 2
    return value


def pieces(kept: Path) -> list[dict[str, Any]]:
    """What is kept; a last line that was torn is not."""
    found = []
    for line in kept.read_text().splitlines() if kept.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(kept: Path) -> dict[str, Any]:
    """All that is kept as one: for each mode its cuts, its seconds and its rows, and what is wrong."""
    found = pieces(kept)
    modes = {}
    for mode in MODES:
        mine = [piece for piece in found if piece["mode"] == mode]
        if mine:
            measured = measure(mode)
            modes[mode] = {
                "summary": MODES[mode].summary,
                "cuts": sum(piece["cuts"] for piece in mine),
                "planned": len(everywhere(measured, all_of_it=mode in EVERYWHERE)),
                "processor_seconds": round(sum(piece["processor_seconds"] for piece in mine)),
                "connections": [
                    {"number": number, "forth": measured.sizes[number, way], "window": measured.window.get(number, 0)}
                    for number, way in measured.sizes
                    if way == "forth"
                ],
                "rows": [
                    attrs.astuple(row)
                    for row in joined(
                        (Row(*row) for piece in mine for row in piece["rows"]), 0 if MODES[mode].first is None else 1
                    )
                ],
            }
    return {"modes": modes, "wrong": [each for piece in found for each in piece["wrong"]]}
