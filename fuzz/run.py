"""Runs fuzz targets with atheris, each in a process of its own with bounded memory: `python -m fuzz.run [NAME…]`.

The corpus is made at the start of a run and thrown away at its end. A finding is written to `fuzz-findings/`, and ends
the run with status 1; `--replay FILE NAME` tries one again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Final

from fuzz.target import judge

ROOM: Final = 1 << 30  # bytes of address space for libFuzzer, its corpus, and one input
GRACE: Final = 120.0  # seconds beyond those asked for, in which a process starts and ends
HANG: Final = 20  # seconds on the wall, as a last resort: what counts is the processor's time
FINDINGS: Final = Path("fuzz-findings")

_STATISTIC: Final = re.compile(r"stat::(\w+):\s+(\d+)")
_COVERAGE: Final = re.compile(r"cov: (\d+) ft: (\d+)")


def main(arguments: list[str]) -> int:
    """Run what is asked for, two at a time if asked for, and print a table; returns the exit status."""
    options = _options().parse_args(arguments)
    if options.within:
        _fuzz(options.names[0], options.within, options.seconds)
    from fuzz.targets import TARGETS  # not before: what is to be instrumented must not have been imported

    names = options.names or list(TARGETS)
    if options.replay:
        (name,) = names
        logging.disable(logging.CRITICAL)
        print(judge(TARGETS[name](), Path(options.replay).read_bytes()))
        return 0
    print("| target | executions | a second | edges | findings |\n| --- | --- | --- | --- | --- |", flush=True)
    waiting, running, found = deque(names), deque[_Run](), 0
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(_Run(waiting.popleft(), options.seconds))
        found += running.popleft().finish()
    return 1 if found else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description="Run fuzz targets with atheris.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which targets; all by default")
    parser.add_argument("--seconds", type=int, default=int(os.environ.get("FUZZ_SECONDS", "60")), help="for each")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--replay", metavar="FILE", help="try one input of a target, and nothing else")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    return parser


class _Run:
    """One target in a process of its own."""

    def __init__(self, name: str, seconds: int) -> None:
        self._name, self._seconds = name, seconds
        self._folder = tempfile.TemporaryDirectory(prefix="whimbrel-fuzz-")
        self._log = Path(self._folder.name, "log").open("wb+")  # noqa: SIM115 - closed by `finish`
        command = [sys.executable, "-m", "fuzz.run", name, "--seconds", str(seconds), "--within", self._folder.name]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def finish(self) -> int:
        """Wait for its end, and print its line; how many findings there are."""
        try:
            status = self._process.wait(self._seconds + GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        with self._log, self._folder:
            self._log.seek(0)
            text = self._log.read().decode("utf-8", "replace")
            statistics = {name: int(number) for name, number in _STATISTIC.findall(text)}
            edges = _COVERAGE.findall(text)
            count = statistics.get("number_of_executed_units", 0)
            print(
                f"| {self._name} | {count} | {count // max(1, self._seconds)} | {edges[-1][0] if edges else 0} | "
                f"{int(status != 0)} |",
                flush=True,
            )
            if status:
                sys.stderr.write(text[-6000:])
        return int(status != 0)


def _fuzz(name: str, folder: str, seconds: int) -> None:
    """Make the corpus, and fuzz until the time is over; does not return."""
    import atheris

    with atheris.instrument_imports(include=["whimbrel", "whimbrel_savevm", "whimbrel_codecs", "whimbrel_transports"]):
        from fuzz.targets import TARGETS
    target = TARGETS[name]()
    logging.disable(logging.CRITICAL)
    corpus = Path(folder, "corpus")
    corpus.mkdir()
    for seed in target.seeds():
        judge(target, seed)  # what is imported late, and is no input's
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    FINDINGS.mkdir(exist_ok=True)
    _bound_memory()
    longest = max(target.longest, *(path.stat().st_size for path in corpus.iterdir()))
    atheris.Setup(
        [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={seconds}",
            f"-max_len={longest}",
            f"-timeout={HANG}",
            "-rss_limit_mb=0",
            "-print_final_stats=1",
            "-reduce_inputs=0",
            f"-artifact_prefix={FINDINGS}/{target.name}-",
        ],
        lambda data: judge(target, data) and None,
    )
    atheris.Fuzz()


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
