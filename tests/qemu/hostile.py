"""A program that loads a real stream, cut or changed in many ways, and tells how it ended each time.

    python hostile.py cut|changed STREAM FROM TO STEP

It is a process of its own so that its memory can be bounded; it prints JSON: the outcomes, and how many bytes all of
them took beyond the first. What is no outcome (an error of another kind, or without a place) ends it with a traceback.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections import Counter
from pathlib import Path

from whimbrel import CapturedMachine, Settings
from whimbrel.errors import ChannelError, ProtocolError, WhimbrelError
from whimbrel.migration.machine import manager_for
from whimbrel.stream import Replay

RAM_MAX = 8 << 20
BOUND = 1 << 30  # bytes of address space beyond what the program has once it has begun

_settings = Settings()
_plugins = manager_for(_settings)


def _outcome(stream: bytes) -> str:
    """"loaded", or the code of the one error; anything else is raised."""  # fmt: skip
    try:
        machine = CapturedMachine.load(
            Replay(stream, peer="a hostile peer"), max_ram=RAM_MAX, settings=_settings, plugins=_plugins
        )
    except WhimbrelError as exc:
        named = isinstance(exc, (ProtocolError, ChannelError)) and exc.place.offset is not None
        if not named:
            raise RuntimeError("an error of the wrong kind, or without a place") from exc
        return exc.code
    machine.close()
    return "loaded"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(stream: bytes, random_: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers at their limits, pieces removed, repeated, moved, filled."""
    data = bytearray(stream)
    for _ in range(random_.choice((1, 1, 2, 4))):
        at = random_.randrange(len(data))
        match random_.randrange(7):
            case 0:
                data[at] ^= 1 << random_.randrange(8)
            case 1:
                data[at] = random_.randrange(256)
            case 2:
                size = random_.choice((2, 4, 8))
                data[at : at + size] = (random_.choice(EXTREMES) & ((1 << 8 * size) - 1)).to_bytes(size, "big")
            case 3:
                del data[at : at + random_.choice((1, 2, 8, 100))]
            case 4:
                data[at:at] = data[at : at + random_.choice((1, 5, 9, 64))]
            case 5:
                size = random_.randrange(1, 200)
                piece = data[at : at + size]
                del data[at : at + size]
                where = random_.randrange(len(data) + 1)
                data[where:where] = piece
            case 6:
                data[at : at + random_.randrange(1, 64)] = random_.randbytes(random_.randrange(64))
    return bytes(data)


def main(how: str, file: str, first: int, last: int, step: int) -> None:
    """Try all cases of a range."""
    stream = Path(file).read_bytes()
    _outcome(stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BOUND
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    began = _peak()
    outcomes = Counter[str]()
    for case in range(first, last, step):
        hostile = stream[:case] if how == "cut" else mutated(stream, random.Random(case))
        try:
            outcomes[_outcome(hostile)] += 1
        except Exception as exc:
            exc.add_note(f"{how} {case}")
            raise
    print(json.dumps({"outcomes": outcomes, "growth": _peak() - began}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
