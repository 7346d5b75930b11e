"""The same cuts between real QEMUs, and between one and whimbrel: who runs behind them. `python -m tests.sweep.qemu`.

Real processes over a `CutProxy`. Bytes forth are counted from the first device section on, since how many pages a
guest that runs has dirtied is not known before. What QEMU does is QEMU's; nothing here is a test.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from whimbrel import CapturedMachine, Settings
from whimbrel.capture.receiving import Reception
from whimbrel.errors import HandoverUndecided, MigrationError
from whimbrel.machine import RunState
from whimbrel.testing.cutwire import ACTIONS, Action, Cut, CutProxy, Way

from ..qemu import guests
from ..qemu.peer import Qemu, capture, version
from . import report

TINY: Final[dict[str, Any]] = {"mib": 1, "machine": "isapc", "firmware": guests.tiny()}
STILL: Final = 0.1  # seconds in which nothing changes any more
SHORT: Final = 0.3  # seconds that whimbrel waits in a hole
_FOREVER: Final = 1 << 40

Fate = tuple[bool, bool]  # whether the source, and the destination, runs or has the machine


def waiting() -> tuple[Qemu, str]:
    """A QEMU that waits for a machine, and where."""
    fresh = Qemu(**TINY, incoming="defer")
    fresh.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = fresh.execute("query-migrate")["socket-address"]
    return fresh, f"tcp:{address['host']}:{address['port']}"


def state(qemu: Qemu) -> str:
    """Its run state, or that it is gone."""
    try:
        return qemu.run_state() if qemu.process.poll() is None else "gone"
    except (EOFError, OSError):
        return "gone"


def settled(look: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """What is seen once it has not changed for a while."""
    pause = threading.Event()
    seen, since = look(), time.monotonic()
    while time.monotonic() - since < STILL:
        pause.wait(0.005)
        if (now := look()) != seen:
            seen, since = now, time.monotonic()
    return seen


class Giving:
    """A QEMU that gives its machine away, and is used again as long as it has it."""

    def __init__(self, *, return_path: bool) -> None:
        self._return_path = return_path
        self._qemu: Qemu | None = None

    def qemu(self) -> Qemu:
        """One whose guest runs."""
        if self._qemu is None:
            self._qemu = Qemu(**TINY)
            if self._return_path:
                self._qemu.switch_on("return-path")
            self._qemu.execute("migrate-set-parameters", max_bandwidth=1 << 40)
            self._qemu.serial.wait(b"AB")
        return self._qemu

    def drop(self) -> None:
        """It is not what it was."""
        if self._qemu is not None:
            self._qemu.close()
            self._qemu = None

    def has_it(self) -> bool:
        """Whether its guest runs now."""
        return self._qemu is not None and state(self._qemu) == "running"


def between_qemus(giving: Giving, cut: Cut) -> Fate:
    """One QEMU to another."""
    source = giving.qemu()
    destination, address = waiting()
    with destination, CutProxy(address, [cut]) as proxy:
        source.migrate(proxy.uri)
        if cut.at < _FOREVER:
            proxy.wait_cut()
        else:
            source.wait_status("completed", "failed")
        found = settled(lambda: (state(source), state(destination)))
        fate = found[0] == "running", found[1] == "running"
    if fate != (True, False) or cut.action in (Action.HOLE, Action.DETOUR, Action.HALF):
        giving.drop()
    else:
        source.wait_status("completed", "failed")
    return fate


def to_a_qemu(machine: CapturedMachine, cut: Cut) -> Fate:
    """whimbrel to a QEMU. What it has is a machine that was captured, which it keeps or lets go of."""
    if machine.run_state is RunState.POSTMIGRATE:
        machine.reclaim()
    destination, address = waiting()
    with destination, CutProxy(address, [cut]) as proxy:
        migration = machine.migrate(proxy.uri)
        try:
            migration.wait(2.0 if cut.action in (Action.HOLE, Action.DETOUR) else 60.0)
        except TimeoutError:
            migration.cancel()
            migration.join()
        except MigrationError:
            pass
        found = settled(lambda: (state(destination),))
        return machine.run_state is not RunState.POSTMIGRATE, found[0] == "running"


def to_whimbrel(giving: Giving, cut: Cut) -> Fate:
    """A QEMU to `whimbrel receive`, which has the machine if it says that it has."""
    source = giving.qemu()
    with tempfile.TemporaryDirectory() as folder:
        reception = Reception("tcp:127.0.0.1:0", Path(folder) / "file")
        codes: list[str] = []

        def run() -> None:
            try:
                reception.run()
                codes.append("")
            except HandoverUndecided:
                codes.append("undecided")
            except MigrationError as exc:
                codes.append(exc.code)

        thread = threading.Thread(target=run)
        thread.start()
        with CutProxy(reception.uri, [cut]) as proxy:
            source.migrate(proxy.uri)
            if cut.at < _FOREVER:
                proxy.wait_cut()
            else:
                source.wait_status("completed", "failed")
            found = settled(lambda: (state(source), "".join(codes)))
        thread.join(1.0)
        if thread.is_alive():
            reception.cancel()
            thread.join()
    fate = found[0] == "running", codes == [""]
    giving.drop()
    return fate


def cuts(mark: bytes, forth: int, back: int, every: int) -> Iterator[Cut]:
    """Where it is delicate: every so many bytes from the first device on, close to the end all, and the way back.

    A link that dribbles ends nothing, and takes longer than anybody looks.
    """
    near = [*range(0, forth, every), *range(max(0, forth - 6), forth + 1)]
    for action in ACTIONS:
        if action is Action.DRIBBLE:
            continue
        for at in sorted(set(near)):
            yield Cut(Way.FORTH, at, action, mark=mark)
        for at in range(max(0, back - 8), back + 1, 2):
            yield Cut(Way.BACK, at, action)


def measured(go: Callable[[Cut], Fate], keep: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, int, int]:
    """The mark, the bytes from it on, and those of the way back, of a link that nobody cuts."""
    go(Cut(Way.FORTH, _FOREVER, Action.CLOSE))
    forth, back = keep()
    begins = forth.index(b"\x05timer") - 5
    return forth[begins : begins + 11], len(forth) - begins, len(back)


_NAMES: Final = {(True, False): "source", (False, True): "destination", (False, False): "nobody", (True, True): "both"}


def pair(name: str, go: Callable[[Cut], Fate], every: int) -> dict[str, Any]:
    """Make all cuts of one pair; what came out."""
    seen: dict[str, Any] = {}
    ends: list[tuple[bytes, bytes]] = []
    real = CutProxy.end

    def end(self: CutProxy) -> None:
        ends[:] = [(self.passed(Way.FORTH), self.passed(Way.BACK))]
        real(self)

    CutProxy.end = end  # type: ignore[method-assign]
    try:
        mark, forth, back = measured(go, lambda: ends[0])
    finally:
        CutProxy.end = real  # type: ignore[method-assign]
    counts: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for cut in cuts(mark, forth, back, every):
        fate = _NAMES[go(cut)]
        counts[fate] += 1
        where.setdefault(fate, []).append(f"{cut.way}+{cut.at} {cut.action}")
    seen |= {"pair": name, "forth": forth, "back": back, "counts": dict(counts)}
    seen["where"] = {fate: found for fate, found in where.items() if fate in ("both", "nobody")}
    print(name, dict(counts), flush=True)
    return seen


def main() -> int:
    """Measure all pairs, and keep it beside the result of the sweep."""
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as folder:
        with Qemu(**TINY) as source:
            source.serial.wait(b"AB")
            (Path(folder) / "tiny").write_bytes(capture(source))
        settings = Settings()
        settings.limits.handover_timeout = SHORT
        settings.parameters.max_bandwidth = 0
        found = []
        for return_path in (False, True):
            giving = Giving(return_path=return_path)
            name = "QEMU → QEMU" + (", `return-path`" if return_path else ", its defaults")
            found.append(pair(name, lambda cut, giving=giving: between_qemus(giving, cut), every))
            giving.drop()
        with CapturedMachine.load(Path(folder) / "tiny", settings=settings) as machine:
            found.append(pair("whimbrel → QEMU", lambda cut: to_a_qemu(machine, cut), every))
        giving = Giving(return_path=True)
        found.append(pair("QEMU, `return-path` → `whimbrel receive`", lambda cut: to_whimbrel(giving, cut), every))
        giving.drop()
    result = {**report.kept(), "qemu": {"version": version(), "pairs": found}}
    report.RESULTS.write_text(json.dumps(result) + "\n")
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
