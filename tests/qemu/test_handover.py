"""The handover between whimbrel and a real QEMU, over a link that breaks behind every byte that matters.

Never two, and nothing is said that is not so. The guest itself tells whether it ran: it says B as long as it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest

from whimbrel import CapturedMachine, Settings
from whimbrel.capture import taking
from whimbrel.capture.receiving import Reception
from whimbrel.errors import MigrationError, StateError
from whimbrel.machine import RunState
from whimbrel.migration.handover import FIRST_PING, PROOF, ROUND_PING

from .cutting import HOWS, WHOLE, Cut, Wire
from .peer import Qemu
from .qmp import PATIENCE

SHORT = 0.2  # seconds after which a side that waits in a black hole gives up
MESSAGE = 8  # bytes of a PONG, and of a SHUT
GOES_ON = {"connect", "lost", "stream", "cancelled", "handover-timeout"}  # codes of a source that has not let go


def ping(value: int) -> bytes:
    return b"\x08\0\2\0\4" + value.to_bytes(4, "big")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), thread


def waiting(tiny_machine: dict[str, Any]) -> tuple[Qemu, tuple[str, int]]:
    """A QEMU that waits for a machine, and where."""
    fresh = Qemu(**tiny_machine, incoming="defer")
    fresh.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    (address,) = fresh.execute("query-migrate")["socket-address"]
    return fresh, (address["host"], int(address["port"]))


def fate(destination: Qemu) -> str:
    """What becomes of a QEMU that has been hung up on: its guest "runs", or it is "gone" and its guest never ran."""
    pause = threading.Event()
    while destination.process.poll() is None:
        try:
            state = destination.run_state()
        except (EOFError, OSError):
            destination.wait_exit()
            break
        if state == "running":
            destination.serial.wait_more(1)
            return "runs"
        assert state == "inmigrate"
        pause.wait(0.002)
    with pytest.raises(EOFError):
        destination.serial.wait_more()
    assert destination.serial.heard == b""
    assert destination.process.returncode == 1
    return "gone"


def around(offsets: Sequence[int], last: int, *, first: int = 0) -> list[int]:
    """Each offset and its neighbours."""
    return sorted({at + by for at in offsets for by in (-1, 0, 1) if first <= at + by <= last})


def devices(stream: bytes, first: int, number: int) -> list[int]:
    """Where the device sections begin, from byte `first` on, whose ids are `number` and the following in order."""
    found, at = [], first
    while stream[at] == 4:
        found.append(at)
        name = stream[at + 6 : at + 6 + stream[at + 5]]
        assert name.replace(b"/", b"").replace(b"-", b"").replace(b"_", b"").isalnum(), name
        foot = stream.index(b"\x7e" + stream[at + 1 : at + 5], at)
        while stream[foot + 5] not in (0, 4, 8):
            foot = stream.index(b"\x7e" + stream[at + 1 : at + 5], foot + 1)
        at = foot + 5
    assert len(found) > number
    return [*found, at]


# -------------------------------------------------------------------------------------------- ours sends to a QEMU


@attrs.frozen
class End:
    """How a handover ended: the code of our error ("" for none), its words, the QEMU, and what went through."""

    code: str
    words: str
    qemu: str
    forth: bytes = attrs.field(repr=False)
    back: bytes = attrs.field(repr=False)


@attrs.frozen
class Marks:
    """Where in the stream of a proved handover things end: the round, the proof, the whole of it; and all elements."""

    round: int
    proof: int
    end: int
    elements: list[int]

    @classmethod
    def of(cls, forth: bytes) -> Marks:
        first, round_, proof = (forth.index(ping(value)) for value in (FIRST_PING, ROUND_PING, PROOF))
        tail = forth.index(b"\x05timer") - 5
        assert tail > round_
        ram = [first + len(ping(0)), tail]
        at = 0
        while 0 <= (at := forth.find(b"\x7e\0\0\0\1", at + 1)) < tail:
            ram.append(at + 5)
        elements = [0, 4, 8, first - 5, first, *ram, round_, round_ + 9, *devices(forth, tail, 10), proof]
        description = [proof + 10, proof + 11, proof + 15, proof + 115]
        return cls(round_ + 9, proof + 9, len(forth), sorted([*elements, proof + 9, *description, len(forth)]))


@pytest.fixture
def machine(tiny_stream: bytes, tmp_path: Path) -> Iterator[CapturedMachine]:
    """One captured machine, which waits for nobody for long."""
    (tmp_path / "tiny").write_bytes(tiny_stream)
    settings = Settings()
    settings.limits.handover_timeout = SHORT
    settings.parameters.max_bandwidth = 0
    with CapturedMachine.load(tmp_path / "tiny", settings=settings) as loaded:
        yield loaded


@pytest.fixture
def send(machine: CapturedMachine, tiny_machine: dict[str, Any]) -> Callable[..., End]:
    """`send(cut, …)`: how it ends if the machine is sent to a fresh QEMU over a link with a cut.

    The rounds know no deadline: in a black hole of theirs somebody has to `give_up`.
    """

    def run(cut: Cut, *, handover: str = "proof", give_up: bool = False) -> End:
        if machine.run_state is RunState.POSTMIGRATE:
            with pytest.raises(StateError):
                machine.migrate("tcp:127.0.0.1:1")
            machine.reclaim()
        if cut is WHOLE:
            machine.settings.limits.handover_timeout = PATIENCE
        destination, address = waiting(tiny_machine)
        with destination, Wire(address, cut) as wire:
            migration = machine.migrate(wire.uri, handover=handover)
            if give_up:
                wire.wait_cut()
                assert migration.cancel()
            code = words = ""
            try:
                migration.wait(PATIENCE)
            except MigrationError as exc:
                code, words = exc.code, str(exc)
            if cut is not WHOLE:
                wire.wait_cut()  # what it passed on as the last thing may be heard before it says that it is cut
            assert wire.was_cut == (cut is not WHOLE)
            if cut.how == "hole" and code in GOES_ON:
                assert destination.run_state() == "inmigrate"
            wire.end()
            machine.settings.limits.handover_timeout = SHORT
            return End(code, words, fate(destination), bytes(wire.forth), bytes(wire.back))

    return run


def expected(cut: Cut, marks: Marks) -> set[tuple[str, str]]:
    """The ends that a cut may have: our code, and the QEMU."""
    before = {(code, "gone") for code in GOES_ON}
    undecided = {("undecided", "gone"), ("undecided", "runs")}
    if cut.way == "forth":
        if cut.at < marks.proof:
            return before
        if cut.at == marks.proof:  # where only half of the link is gone the PONG comes back, and the order is lost
            return {*before, ("undecided", "gone")} if cut.how == "half" else before
        if cut.at == marks.end and cut.how == "half":
            return {("", "runs")}
        # A reset may overtake the order in the QEMU's own buffers.
        return undecided if cut.how == "reset" else {("undecided", "runs")}
    if cut.at < 3 * MESSAGE:
        return before
    if cut.at == 3 * MESSAGE:  # with the proof, and before the order or behind it
        if cut.how == "hole":
            return {("undecided", "gone")}
        # Half a link carries the order, unless our hanging up overtakes it.
        return before | (undecided if cut.how == "half" else {("undecided", "gone")})
    return {("undecided", "runs")} if cut.at < 4 * MESSAGE else {("", "runs"), ("undecided", "runs")}


def in_a_round(cut: Cut, marks: Marks) -> bool:
    return cut.at <= marks.round if cut.way == "forth" else cut.at < 2 * MESSAGE


def check_sent(send: Callable[..., End], machine: CapturedMachine, choose: Callable[[Marks], list[Cut]]) -> None:
    whole = send(WHOLE)
    assert (whole.code, whole.qemu) == ("", "runs")
    marks = Marks.of(whole.forth)
    assert len(whole.back) == 4 * MESSAGE
    found, wrong = [], []
    for cut in choose(marks):
        end = send(cut, give_up=cut.how == "hole" and in_a_round(cut, marks))
        found.append(f"{cut!s:24} {end.code or 'completed':18} {end.qemu}")
        right = (end.code, end.qemu) in expected(cut, marks)
        if end.code in GOES_ON:
            right = right and machine.run_state is not RunState.POSTMIGRATE
        else:
            right = right and machine.run_state is RunState.POSTMIGRATE and "goes on" not in end.words
        if not right:
            wrong.append(f"{found[-1]} {end.words}")
    print(marks, *found, sep="\n")
    assert not wrong, "\n".join(wrong)
    # After all of that it is the machine that it was.
    again = send(WHOLE)
    assert (again.code, again.qemu, again.forth) == ("", "runs", whole.forth)


def near_the_handover(marks: Marks) -> list[Cut]:
    some = {
        8: ["reset", "hole"],
        marks.proof - 1: ["half", "hole"],
        marks.proof: HOWS,
        marks.proof + 1: HOWS,
        marks.end: ["reset", "half"],
    }
    back: dict[int, Sequence[str]] = {23: ["reset"], 24: HOWS, 31: ["close"], 32: ["reset"]}
    return [
        *(Cut("forth", at, how) for at, hows in some.items() for how in hows),
        *(Cut("back", at, how) for at, hows in back.items() for how in hows),
    ]


@pytest.mark.slow
def test_a_captured_machine_is_never_in_two_places(send, machine):
    check_sent(send, machine, near_the_handover)


@pytest.mark.long
@pytest.mark.parametrize("how", HOWS)
def test_a_captured_machine_is_never_in_two_places_wherever_the_link_breaks(send, machine, how):
    def everywhere(marks: Marks) -> list[Cut]:
        forth = [Cut("forth", at, how) for at in around(marks.elements, marks.end)]
        return forth + [Cut("back", at, how) for at in range(4 * MESSAGE + 1)]

    check_sent(send, machine, everywhere)


@pytest.mark.parametrize("how", ["hole", *(pytest.param(how, marks=pytest.mark.long) for how in HOWS[:3])])
def test_with_qemus_timing_a_machine_may_be_in_no_place(send, how):
    """What `--handover=qemu` costs: the source lets go of a machine that the destination never had whole."""
    whole = send(WHOLE, handover="qemu")
    assert (whole.code, whole.qemu) == ("", "runs")
    tail = whole.forth.index(b"\x05timer") - 5
    assert ping(PROOF) not in whole.forth
    for at in (tail, tail + 1000):
        end = send(Cut("forth", at, how), handover="qemu")
        # Where a link breaks with a sound, whimbrel may hear it before it has written its last byte.
        assert end.code in ({"undecided"} if how == "hole" else {"undecided", "lost"})
        assert end.qemu == "gone"
    assert send(WHOLE).qemu == "runs"


# -------------------------------------------------------------------------------------------- a QEMU sends to ours


@attrs.frozen
class Taken:
    """How a reception ended: the code of our error, whether a file is there, and the source's status."""

    code: str
    file: bool
    source: str
    forth: bytes = attrs.field(repr=False)
    back: bytes = attrs.field(repr=False)


class Giving:
    """Sources, each used until it has let go of its machine."""

    def __init__(self, tiny_machine: dict[str, Any], folder: Path, stack: ExitStack) -> None:
        self._tiny_machine, self._folder, self._stack = tiny_machine, folder, stack
        self._source: Qemu | None = None

    def source(self) -> Qemu:
        """One whose guest runs."""
        if self._source is None:
            self._source = self._stack.enter_context(Qemu(**self._tiny_machine))
            self._source.switch_on("return-path")
            self._source.execute("migrate-set-parameters", max_bandwidth=1 << 40)
            self._source.serial.wait(b"AB")
        return self._source

    def give(self, cut: Cut, *, ours_ends_first: bool = False) -> Taken:
        """Have it received over a link with a cut; a black hole lasts until our end if `ours_ends_first`."""
        source, file = self.source(), self._folder / "file"
        reception = Reception("tcp:127.0.0.1:0", file)
        host, port = reception.uri.removeprefix("tcp:").split(":")
        codes: list[str] = []

        def run() -> None:
            try:
                reception.run()
                codes.append("")
            except MigrationError as exc:
                codes.append(exc.code)

        thread = threading.Thread(target=run)
        thread.start()
        with Wire((host, int(port)), cut) as wire:
            source.migrate(wire.uri)
            if cut is not WHOLE:
                wire.wait_cut()
                if ours_ends_first:
                    thread.join(PATIENCE)
                    assert codes, "it waits in a black hole"
                    assert source.run_state() == "finish-migrate"
            if cut.how == "hole" and cut is not WHOLE:
                wire.end()
            status = source.wait_status("completed", "failed")
            if reception.peer is None:  # it was gone before it was accepted, and the next one is waited for
                reception.cancel()
            thread.join(PATIENCE)
        source.wait_run_state("postmigrate" if status == "completed" else "running")
        if status == "completed":
            source.close()
            self._source = None
        else:
            source.serial.wait_more()
        (code,) = codes
        there = file.exists()
        assert [each.name for each in self._folder.iterdir()] == (["file"] if there else [])
        if there:
            self._check(file, runs=status == "completed")
            file.unlink()
        return Taken(code, there, status, bytes(wire.forth), bytes(wire.back))

    def _check(self, file: Path, *, runs: bool) -> None:
        """The file is whole, and runs if the source has let go."""
        settings = Settings()
        settings.parameters.max_bandwidth = 0
        with CapturedMachine.load(file, settings=settings) as stored:
            if not runs:
                return
            destination, (host, port) = waiting(self._tiny_machine)
            with destination:
                stored.migrate(f"tcp:{host}:{port}").wait(PATIENCE)
                assert fate(destination) == "runs"


@pytest.fixture
def giving(tiny_machine: dict[str, Any], tmp_path: Path) -> Iterator[Giving]:
    (tmp_path / "files").mkdir()
    with ExitStack() as stack:
        yield Giving(tiny_machine, tmp_path / "files", stack)


@attrs.frozen
class Tail:
    """The end of a source's stream: how it begins, its elements from there, and its size."""

    mark: bytes
    elements: list[int]
    size: int

    @classmethod
    def of(cls, forth: bytes) -> Tail:
        begins = forth.index(b"\x05timer") - 5
        found = devices(forth, begins, 10)
        eof = found[-1]
        elements = [at - begins for at in (*found, eof + 1, eof + 2, eof + 6, eof + 100, len(forth))]
        return cls(forth[begins : begins + 11], elements, len(forth) - begins)


def deceived(cut: Cut) -> bool:
    """A link that swallows our word and then ends in order, as if the source had: nothing tells that from success.

    TCP never does so; something between the two must.
    """
    return cut.way == "back" and cut.how in ("close", "half")


def check_given(giving: Giving, cuts: Callable[[Tail], list[Cut]], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = giving.give(WHOLE)
    assert (whole.code, whole.file, whole.source) == ("", True, "completed")
    tail = Tail.of(whole.forth)
    assert len(whole.back) == 2 * MESSAGE
    found, wrong = [], []
    for cut in cuts(tail):
        in_our_word = cut.way == "back" and cut.at > MESSAGE
        with monkeypatch.context() as patch:
            if cut.how == "hole":
                patch.setattr(taking, "ORDER", SHORT)
            taken = giving.give(cut, ours_ends_first=cut.how == "hole" and in_our_word and cut.at < 2 * MESSAGE)
        found.append(f"{cut!s:30} {taken.code or 'success':10} {'file' if taken.file else '-':5} source {taken.source}")
        if taken.source == "completed":
            right = taken.file and taken.code in ("", "undecided") and cut.way == "back" and cut.at == 2 * MESSAGE
        elif taken.file:  # a copy from the past of a machine that goes on
            last = in_our_word or (cut.way == "forth" and cut.at == tail.size)
            right = (taken.code == "undecided" and last) or (taken.code == "" and deceived(cut))
        else:
            right = taken.code in GOES_ON and not in_our_word
        if not right:
            wrong.append(found[-1])
    print(tail, *found, sep="\n")
    assert not wrong, "\n".join(wrong)


def around_our_word(tail: Tail) -> list[Cut]:
    eof = tail.elements[-5]
    forth = [(0, "reset"), (eof - 1, "half"), (eof, "reset"), (tail.size - 1, "half")]
    back = [(8, "reset"), (9, "reset"), (15, "hole"), (15, "close"), (16, "reset"), (16, "hole")]
    return [Cut("forth", at, how, tail.mark) for at, how in forth] + [Cut("back", at, how) for at, how in back]


@pytest.mark.slow
def test_a_machine_of_a_qemus_is_never_nowhere(giving, monkeypatch):
    check_given(giving, around_our_word, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("how", HOWS)
def test_a_machine_of_a_qemus_is_never_nowhere_wherever_the_link_breaks(giving, monkeypatch, how):
    def everywhere(tail: Tail) -> list[Cut]:
        head = [Cut("forth", at, how) for at in (0, 8, 9, 1000)]
        devices = tail.elements[:-7] if how == "reset" else []
        at_the_end = around(tail.elements[-7:], tail.size)
        forth = [Cut("forth", at, how, tail.mark) for at in (-1, *devices, *at_the_end)]
        return head + forth + [Cut("back", at, how) for at in range(2 * MESSAGE + 1)]

    check_given(giving, everywhere, monkeypatch)
