"""One source and one destination of a tiny machine, an attempt after another over links that are cut.

Who has the machine behind an attempt is the source of the next; what was not harmed is used again.
"""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from whimbrel import Machine, PluginManager, RunState, Settings, hookimpl, vmstate
from whimbrel.errors import HandoverUndecided
from whimbrel.events import Round
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.migration import IncomingMigration, OutgoingMigration
from whimbrel.stream import Writer
from whimbrel.testing.cutwire import Action, Cut, CutNetwork, Way
from whimbrel_codecs import xbzrle
from whimbrel_savevm import block, devices, ram

from .moves import DESTINATION, RUNS, SOURCE, STANDS, Recorder, Step, check, recording
from .oracle import Oracle, TinyGuest
from .virtual_time import VirtualTime

PAGES: Final = 8
LONG: Final = 4000.0  # virtual seconds after which an operator comes
URI: Final = "memory:sweep-{}"


class _Patient(threading.Condition):
    """Whoever looks again every so often looks the more seldom the longer he has waited: who wakes him notifies."""

    def __init__(self) -> None:
        super().__init__()
        self._waited = threading.local()

    def wait(self, timeout: float | None = None) -> bool:
        waited = getattr(self._waited, "seconds", 0.0)
        if timeout is not None:
            timeout = max(timeout, waited / 4)
        woken = super().wait(timeout)
        self._waited.seconds = 0.0 if woken else waited + (timeout or 0.0)
        return woken


@attrs.define
class Dial:
    """A device that the guest turns."""

    turned: int = 0


@attrs.define
class Lamp:
    """Another one, which is as it is."""

    colours: bytes = bytes(40)


DIAL: Final = vmstate.VMStateDescription("dial", 1, fields=[vmstate.uint32("turned")])
LAMP: Final = vmstate.VMStateDescription("lamp", 2, fields=[vmstate.buffer("colours", size=40)])


@attrs.frozen
class Mode:
    """A way to move the machine; what the sweep has its table of.

    `connections` is how many a migration makes at once, `rounds` how many there are with the guest running. `prepare`
    is given the settings of both sides. With `first` every link has that cut on connection 0, by what an undisturbed
    one measured, and the cuts that are swept are on the next connection, over which words are said again.
    """

    name: str
    summary: str
    connections: int = 1
    rounds: int = 1
    prepare: Callable[[Settings], object] = lambda settings: None
    handover: str = "proof"
    first: Callable[[Measured], Cut] | None = None


def _lanes(settings: Settings) -> None:
    settings.capabilities.multifd = True


def _xbzrle(settings: Settings) -> None:
    settings.capabilities.xbzrle = True


def _first(way: Way, behind_the_end: int, action: Action) -> Callable[[Measured], Cut]:
    """A cut so many bytes in front of the end of connection 0."""
    return lambda measured: Cut(way, measured.sizes[0, way] - behind_the_end, action)


MODES: Final = {
    mode.name: mode
    for mode in (
        Mode("proof", "PING, PONG, end of stream, SHUT"),
        Mode("xbzrle", "the same, with pages as changes", rounds=3, prepare=_xbzrle),
        Mode("lanes", "the same, with two lanes beside the main channel", connections=3, prepare=_lanes),
        Mode("h1", "in pairs: PING, PONG, end of stream, COMMIT until it is answered", handover="auto"),
        Mode(
            "answer",
            "in pairs, RUNNING cut off; cut again while COMMIT is repeated",
            handover="auto",
            first=_first(Way.BACK, 40, Action.RESET),
        ),
        Mode(
            "order",
            "in pairs, silent from the proof on; cut again while COMMIT is repeated",
            handover="auto",
            first=_first(Way.BACK, 44, Action.DETOUR),
        ),
        Mode(
            "proof-cut",
            "in pairs, the proof cut off; cut again while ABORT is said",
            handover="auto",
            first=_first(Way.BACK, 48, Action.RESET),
        ),
        Mode(
            "proof-dark",
            "the same, with the first connection silent",
            handover="auto",
            first=_first(Way.BACK, 48, Action.DETOUR),
        ),
    )
}


@attrs.frozen
class Outcome:
    """What became of an attempt.

    `verdict` is "source", "destination", "nobody" (and both say so), or what must not be: "both", "travel", "torn",
    "lost" (nobody has it, or one does not say so), "undecided" (in pairs, where a new connection goes through),
    "model", "leak". `told` says who had to be told to stop waiting, `cut` whether the link came to its cut.
    """

    verdict: str
    mine: str
    theirs: str
    told: str
    why: tuple[str, ...] = ()
    cut: bool = True


GOOD: Final = frozenset({"source", "destination", "nobody"})
SETTLED: Final = frozenset({("owner", "refused"), ("done", "owner")})


@attrs.frozen
class Measured:
    """A whole, undisturbed migration: for each connection, and each way, its bytes and where pieces of it begin.

    `window` is where each connection was when the guest stood still.
    """

    sizes: dict[tuple[int, Way], int]
    marks: dict[tuple[int, Way], list[int]]
    window: dict[int, int]


class _Rounds:
    """The guest makes a step behind each round, and stands still behind the last."""

    def __init__(self, rounds: int) -> None:
        self.guest: TinyGuest | None = None
        self._rounds = rounds

    @hookimpl
    def whimbrel_choose_switchover(self, round: Round) -> bool:  # noqa: A002
        assert self.guest is not None
        self.guest.step()
        return round.number >= self._rounds


class _Watched(TinyGuest):
    """Tells the recorder, too."""

    def __init__(self, world: World, host: int, machine: Machine) -> None:
        super().__init__(world.oracle, host, machine)
        self._world = world

    def start(self) -> None:
        self._world.recorder.add(Step(self._side, "", RUNS))
        super().start()

    def stop(self) -> None:
        super().stop()
        self._world.recorder.add(Step(self._side, "", STANDS))
        self._world.on_freeze()

    @property
    def _side(self) -> str:
        return SOURCE if self is self._world.source.guest else DESTINATION


class World:
    """Made by `world`."""

    def __init__(self, mode: Mode, folder: Path, clock: VirtualTime) -> None:
        self.mode, self._clock = mode, clock
        self.oracle = Oracle(folder)
        self.recorder = Recorder()
        self.network = CutNetwork()
        self.network.changed = _Patient()
        self.first: Cut | None = None
        self.on_freeze: Callable[[], object] = lambda: None
        self._switch = _Rounds(mode.rounds)
        self.plugins = PluginManager(load_entry_points=False)
        for plugin in (trackers, ram, block, devices, xbzrle, self._switch, self.network.plugin()):
            self.plugins.register(plugin)
        self.settings = Settings()
        self.settings.backends.dirty_tracker = "manual"
        self.settings.backends.memory = "memfd"
        self.settings.parameters.update({"max_bandwidth": 0, "announce_rounds": 0, "xbzrle_cache_size": 65536})
        mode.prepare(self.settings)
        self._hosts = 0
        self._turn = 0
        self._attempts = 0
        self.source = self._machine()
        self.destination = self._machine()
        self.source.lamp.colours = bytes(range(40))
        self.source.start()
        self.oracle.entries()
        self.recorder.take()
        self.source.notifiers.drain(60.0)
        gc.collect()  # what others have left behind may go at any time, and is not this world's
        self._at_rest = self._held()

    def _machine(self) -> Any:
        machine: Any = Machine("tiny", settings=self.settings.copy(), plugins=self.plugins)
        # Nobody hears of events: a thread that tells them would be started some ten times an attempt.
        machine.notifiers.remove(self.plugins.notify)
        machine.ram.add("tiny", PAGES * 4096)
        machine.dial, machine.lamp = Dial(), Lamp()
        machine.devices.add("dial", machine.dial, DIAL)
        machine.devices.add("lamp", machine.lamp, LAMP)
        self._hosts += 1
        machine.guest = _Watched(self, self._hosts, machine)
        return machine

    # ---------------------------------------------------------------------------------------------- an attempt

    def attempt(self, *cuts: Cut) -> Outcome:
        """Migrate over a link with `cuts`, judge what became of it, and set the stage for the next attempt."""
        self._attempts += 1
        self._switch.guest = self.source.guest
        self._in_vain: list[str] = []
        self.network.lay(*(() if self.first is None else (self.first,)), *cuts)
        incoming = self.destination.incoming(URI.format(self._attempts))
        outgoing = self.source.migrate(incoming.uri, handover=self.mode.handover)
        told = [side for side, one in ((SOURCE, outgoing), (DESTINATION, incoming)) if self._end(one)]
        outcome = self._judge(incoming, outgoing, " and ".join(told))
        if self.mode.handover == "auto" and all(cut.action is not Action.HOLE for cut in cuts):
            outcome = self._settled(outcome)
        self._decide(incoming, outcome)
        outgoing.close()
        incoming.close()
        outcome = attrs.evolve(outcome, cut=self.network.was_cut.is_set())
        if outcome.verdict not in GOOD:
            return outcome  # this world is not what it was
        problems = [*self._left(), *(how for _, how in self.oracle.take_wrong())]
        self.recorder.take()
        return attrs.evolve(outcome, verdict="leak", why=tuple(problems)) if problems else outcome

    def _end(self, migration: IncomingMigration | OutgoingMigration) -> bool:
        """Wait for its end; whether an operator had to say that it is in vain."""
        told = False
        try:
            migration.wait(LONG)
        except TimeoutError:
            told = True
            if migration.cancel():
                with _no_matter():
                    migration.wait(LONG)
            elif self.mode.handover != "auto":
                raise  # only in pairs one may ask, or wait to be asked, for ever
            else:
                self._in_vain.append(migration.role)
        except Exception:
            if migration.error is None:
                raise
        return told

    def _settled(self, outcome: Outcome) -> Outcome:
        """In pairs, over a link on which a new connection goes through, nobody who has proved is left to an operator.

        Whoever loads may wait for more of the stream until he is told: the source has its machine then.
        """
        if outcome.verdict not in GOOD or not (self._in_vain or (outcome.mine, outcome.theirs) not in SETTLED):
            return outcome
        why = f"{' and '.join(self._in_vain)} waited for an operator" if self._in_vain else ""
        return attrs.evolve(outcome, verdict="undecided", why=(why or f"{outcome.mine}, {outcome.theirs}",))

    def _judge(self, incoming: IncomingMigration, outgoing: OutgoingMigration, told: str) -> Outcome:
        mine, theirs = outgoing.info.ownership, incoming.info.ownership
        entries = self.oracle.entries()
        wrong = self.oracle.take_wrong()
        model = check(self.recorder.take(), source=mine, destination=theirs)
        here, there = self.source.guest, self.destination.guest
        if here.runs != (self.source.run_state is RunState.RUNNING) or (here.runs and there.runs):
            wrong.append(("both", "the run states are not what the guests do"))
        if self.oracle.running() != (here.runs or there.runs):
            wrong.append(("both", "the lock is not held by who runs"))
        hosts = {host for host, _, _ in entries}
        if hosts - {here.host, there.host}:
            wrong.append(("travel", f"hosts {hosts} have run"))
        if wrong:
            return Outcome(wrong[0][0], mine, theirs, told, tuple(how for _, how in wrong))
        if model:
            return Outcome("model", mine, theirs, told, tuple(model))
        if here.runs or there.runs:
            return Outcome(SOURCE if here.runs else DESTINATION, mine, theirs, told)
        # Who asks or waits to be asked until an operator comes has said no more than that.
        undecided = all(
            isinstance(one.error, HandoverUndecided) or not one.status.finished for one in (incoming, outgoing)
        )
        stands = self.source.run_state in (RunState.POSTMIGRATE, RunState.FINISH_MIGRATE)
        if undecided and stands and theirs == "prepared":
            return Outcome("nobody", mine, theirs, told)
        return Outcome("lost", mine, theirs, told, (repr(outgoing.error), repr(incoming.error)))

    def _decide(self, incoming: IncomingMigration, outcome: Outcome) -> None:
        """Be the operator, who knows both sides; whoever runs then is the source, beside a clean destination."""
        if outcome.verdict not in GOOD:
            return
        if outcome.theirs == "prepared":
            self._turn += 1
            if outcome.verdict == "nobody" and self._turn % 2:
                incoming.adopt()
            else:
                incoming.discard()
                if outcome.verdict == "nobody":
                    self.source.reclaim()
                    self.source.start()
        if self.destination.guest.runs:
            self.source.close()
            self.source, self.destination = self.destination, self._machine()
        self.oracle.entries()

    # ------------------------------------------------------------------------------------------ what is left behind

    def _held(self) -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(threading.enumerate())  # noqa: PTH208

    def _left(self) -> Iterator[str]:
        """What an attempt has left behind."""
        if (held := self._held()) != self._at_rest:
            gc.collect()  # what only a traceback holds is not lost
            held = self._held()
        if held != self._at_rest:
            threads = [each.name for each in threading.enumerate()]
            yield f"descriptors and threads: {held}, were {self._at_rest}; {threads}"
        if self._clock.pending:
            yield f"timers: {self._clock.pending}"
        if self._attempts % 500 == 0:
            yield from self._left_in_the_process()

    def _left_in_the_process(self) -> Iterator[str]:
        gc.collect()
        maps = sum("memfd:whimbrel" in line for line in Path("/proc/self/maps").read_text().splitlines())
        if maps > 2:
            yield f"{maps} mappings of machines, expected 2"
        if children := Path(f"/proc/self/task/{os.getpid()}/children").read_text():
            yield f"children: {children}"

    # -------------------------------------------------------------------------------------------------- measuring

    def measure(self) -> Measured:
        """An undisturbed migration, and where everything is in it."""
        starts: dict[int, list[int]] = {}
        window: dict[int, int] = {}
        writers: list[Writer] = []
        real = Writer.write

        def write(self: Writer, data: Any) -> None:
            if self not in writers:
                writers.append(self)
            starts.setdefault(writers.index(self), []).append(self.offset)
            real(self, data)

        def on_freeze() -> None:
            window.update({number: line.forth.passed for number, line in enumerate(self.network.lines)})
            window[0] = writers[0].offset

        if (first := self.mode.first) is not None:
            self.first = None
            with self._undisturbed():
                undisturbed = self.measure()
            self.first = first(undisturbed)
        Writer.write = write  # type: ignore[method-assign]
        self.on_freeze = on_freeze
        try:
            outcome = self.attempt()
        finally:
            Writer.write = real  # type: ignore[method-assign]
            self.on_freeze = lambda: None
        assert outcome.verdict == "destination" or self.first is not None, outcome
        assert outcome.verdict in GOOD, outcome
        sizes, marks = {}, {}
        for number, line in enumerate(self.network.lines):
            for pipe in (line.forth, line.back):
                key = number, pipe.way
                if self.first is not None and number == 0:
                    continue  # its cut is made
                sizes[key] = pipe.passed
                pieces = starts.get(number, []) if pipe.way is Way.FORTH else []
                marks[key] = sorted({0, *pieces, *pipe.sent, pipe.passed})
        return Measured(sizes, marks, window)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        mode, self.mode = self.mode, attrs.evolve(self.mode, first=None)
        try:
            yield
        finally:
            self.mode = mode

    def close(self) -> None:
        """Close both machines, and the oracle."""
        self.source.close()
        self.destination.close()
        self.oracle.close()


@contextmanager
def _no_matter() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise
    except Exception:
        return  # the migration has it as its error


@contextmanager
def world(mode: str, folder: Path) -> Iterator[World]:
    """A world in virtual time. Nothing of it is left behind it."""
    with VirtualTime() as clock:
        made = World(MODES[mode], folder, clock)
        try:
            with recording(made.recorder):
                yield made
        finally:
            made.close()
            deque(iter(made.recorder.take()), maxlen=0)
