"""What the witness suite does in processes of their own: `python -m` this, and read JSON.

The process has no threads of its own, so it can fork: many that race, or one for each call at which it is interrupted.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from whimbrel.abc import Patience
from whimbrel.errors import WitnessError
from whimbrel.testing.witnesses import _LONG, _WRITERS, _factory
from whimbrel.witness import MID_SIZE

_LOST: Final = 5  # EIO


def race(factory: str, address: str, *mids: str) -> list[Any]:
    """Many claim the same cells in the same order, let go at one moment; what each was told."""
    ready, go = os.pipe()

    def claim(number: int) -> list[str]:
        os.close(go)
        os.read(ready, 1)  # until the one that started us closes it
        witness = _factory(factory)(address)
        return [witness.claim(bytes.fromhex(mid), f"w{number}", Patience(_LONG)) for mid in mids]

    tell = [_forked(lambda number=number: claim(number)) for number in range(_WRITERS)]  # type: ignore[misc]
    os.close(go)
    return [told() for told in tell]


def interrupt(how: str, factory: str, address: str, *modules: str) -> list[dict[str, Any]]:
    """A claim, interrupted at its first call, and again at its second, until it comes to its end."""
    warm = _factory(factory)(address)  # so that the children find imported what they need
    warm.read(bytes(MID_SIZE), Patience(_LONG))
    warm.close()
    outcomes: list[dict[str, Any]] = []
    while True:
        mid = secrets.token_bytes(MID_SIZE)
        told = _forked(lambda: _claim(how, factory, address, mid, modules, len(outcomes)))()  # noqa: B023 - at once
        outcome = {"told": "killed", "left": []} if told is None else told
        if outcome.get("whole"):
            return outcomes
        outcomes.append({**outcome, "mid": mid.hex(), "at": len(outcomes)})


def _claim(how: str, factory: str, address: str, mid: bytes, modules: tuple[str, ...], point: int) -> dict[str, Any]:
    witness = _factory(factory)(address)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names
    seen = 0

    def interrupted(_: FrameType, event: str, function: Any) -> None:
        nonlocal seen
        if event not in {"c_call", "c_return"} or not _reaches(function, modules):
            return
        if how == "fail" and event == "c_return" and function.__name__ == "open":
            return  # one that fails has opened nothing
        seen += 1
        if seen == point + 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(_LOST, "an error that the suite made")

    threading.setprofile(interrupted)  # of the threads it starts
    sys.setprofile(interrupted)
    try:
        told = witness.claim(mid, "source", Patience(_LONG))
    except WitnessError:
        told = "raised"
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    witness.close()
    left = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _left(before))  # noqa: PTH115
    return {"told": told, "left": left, "whole": seen <= point}


def _reaches(function: Any, modules: tuple[str, ...]) -> bool:
    """Whether a function in C is one of `modules`, or a method of a type of theirs. Closing is left alone."""
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return module in modules and getattr(function, "__name__", "") not in {"close", "fspath", "getpid"}


def _left(before: set[str]) -> list[str]:
    return [fd for fd in set(os.listdir("/proc/self/fd")) - before if os.path.lexists(f"/proc/self/fd/{fd}")]  # noqa: PTH208


def _forked(call: Callable[[], object]) -> Callable[[], Any]:
    """Make a call in a child; returns what waits for its answer, None if it died of a signal."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.write(write, json.dumps(call()).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - told below, and by the status
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write)

    def told() -> Any:
        with os.fdopen(read, "rb") as answer:
            data = answer.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return None
        if os.WEXITSTATUS(status):
            raise SystemExit("a process of the suite failed")
        return json.loads(data)

    return told


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps(race(*arguments) if what == "race" else interrupt(what, *arguments)))  # noqa: T201
