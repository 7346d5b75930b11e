"""`python -m tests.sweep`: the long sweep, as far as it comes in the time that it is given; it goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from . import report
from .sweep import summary, sweep
from .world import MODES


def main() -> int:
    """Do it; 1 if anything came out that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--kept", type=Path, default=Path("build/sweep.jsonl"), help="what is done already")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4 * 3600.0, help="begin nothing more after so long")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--write", action="store_true", help="write the result and the table of the docs")
    parser.add_argument("--commit", default="", help="what it runs at, for the page")
    options = parser.parse_args()
    sweep(options.modes, options.kept, processes=options.processes, seconds=options.seconds)
    result = summary(options.kept)
    print(report.table(result))
    if options.write:
        for mode in result["modes"].values():
            mode["commit"] = options.commit
        before = report.kept()
        modes = {**before.get("modes", {}), **result["modes"]}  # modes that were not swept now stay as they were
        report.RESULTS.write_text(json.dumps({**before, **result, "modes": modes}) + "\n")
        report.write()
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
