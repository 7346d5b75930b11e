"""One side of a migration between two processes: `python -m benchmarks.roles source|destination WORK`.

WORK is a `work.Work` as JSON. A destination says its address, and says so when the machine has arrived. A source says
that it is ready; then it is asked: `{"do": "count"}` is answered with the pages that its guest has written, `{"do":
"migrate", "uri": …}` with what came of it. The end of standard input ends either.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import whimbrel
from benchmarks.contents import fill
from benchmarks.work import Pattern, Work
from benchmarks.writers import RAM, machine, pages_written

LAST_WORDS: Final = 10.0  # seconds that a process may take to end

Command = dict[str, Any]


def main(role: str, text: str) -> None:
    """Be a source or a destination until standard input ends."""
    values = json.loads(text)
    pattern = values.pop("pattern")
    work = Work(**values, pattern=None if pattern is None else Pattern(**pattern))
    commands = _commands()
    with machine(work, work.source_image if role == "source" else work.destination_image) as built:
        if role == "source":
            source(built, work, commands)
        else:
            destination(built, work, commands)


def source(built: whimbrel.Machine, work: Work, commands: Iterator[Command]) -> None:
    """Fill the machine, run it, and do as told."""
    fill(built.ram[RAM].view, work.content)
    built.start()
    built.plugins.transports()  # as in a process that has been up for a while; a QEMU has loaded its own as it began
    _say(ready=True)
    for command in commands:
        if command["do"] == "count":
            _say(pages=pages_written(built), at=time.monotonic())
        else:
            _say(**_migrate(built, command["uri"], work.bound))


def destination(built: whimbrel.Machine, work: Work, commands: Iterator[Command]) -> None:
    """Wait for the machine, and then for the end."""
    if work.destination == "preallocated":
        built.ram[RAM].populate()
    arriving = built.incoming(f"{work.transport}:127.0.0.1:0")
    _say(uri=arriving.uri)
    try:
        arriving.wait()
    except whimbrel.MigrationError as exc:
        _say(arrived=False, error=str(exc))
    else:
        _say(arrived=True)
    for _ in commands:
        pass


def _migrate(built: whimbrel.Machine, uri: str, bound: float) -> dict[str, Any]:
    before, began = pages_written(built), time.monotonic()
    migration = built.migrate(uri)
    converged = True
    try:
        migration.wait(bound)
    except TimeoutError:
        converged = False
    pages, seconds = pages_written(built) - before, time.monotonic() - began
    if not converged:
        # A cancel may come too late: then it has converged in the very last moment, and that is no convergence either.
        migration.cancel()
        migration.join()
    info = migration.info
    return {
        "converged": converged,
        "milliseconds": info.total_time,
        "downtime": info.downtime_exact or 0.0,
        "rounds": info.rounds,
        "sent": info.ram.transferred,
        "pages_during": pages / seconds,
    }


def _commands() -> Iterator[Command]:
    """Lines as they come, until there are no more. Whoever does not come to ask for them by then is ended."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            waiting.put(line)
        waiting.put("")
        time.sleep(LAST_WORDS)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    while line := waiting.get():
        yield json.loads(line)


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
