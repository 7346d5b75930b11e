"""The same questions put to a real QEMU's monitor and to ours: replies, classes and texts of errors.

What is not said to differ (`differences`) must be equal, and what is said to must not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whimbrel.monitor import COMMANDS
from whimbrel.settings import Capabilities, Parameters

from .differences import DIFFERENCES, Question, ask, compare, differs, same
from .ours import Ours
from .peer import Qemu

ROOT = Path(__file__).parents[2]
MORE = {"avail-switchover-bandwidth": 0, "switchover-policy": "wait", "switchover-timeout": 0}
"""Parameters that a QEMU 7.2 does not have, and what they are at first."""


# ---------------------------------------------------------------------------------- a machine that was never started


def one(capability: Any, state: Any) -> Question:
    return ask("migrate-set-capabilities", capabilities=[{"capability": capability, "state": state}])


IDLE = [
    ask("nothing"),
    ask("Migrate"),
    ask("migrate "),
    ask("migrate-cancel"),
    ask("qmp_capabilities"),
    ask("qmp_capabilities", enable=["oob"]),
    ask("qmp_capabilities", enable=["x"]),
    ask("qmp_capabilities", enable=1),
    ask("qmp_capabilities", x=1),
    ask("query-name"),
    ask("query-name", x=1),
    ask("query-status"),
    ask("query-status", x=1),
    ask("query-block"),
    ask("query-migrate"),
    ask("query-migrate", x=1),
    ask("query-migrate-capabilities", x=1),
    ask("query-migrate-parameters", x=1),
    ask("migrate"),
    ask("migrate", uri=1),
    ask("migrate", uri=None),
    ask("migrate", to=1),
    ask("migrate", uri="x:y", to=1),
    *(ask("migrate", uri="tcp:127.0.0.1:1", **{name: 1}) for name in ("blk", "inc", "detach", "resume")),
    ask("migrate", uri="tcp:127.0.0.1:1", resume=True),
    ask("migrate-incoming"),
    ask("migrate-incoming", uri=1),
    ask("migrate-incoming", uri="tcp:127.0.0.1:0", x=1),
    ask("migrate_cancel"),
    ask("migrate_cancel", x=1),
    ask("migrate-continue"),
    ask("migrate-continue", state=1),
    ask("migrate-continue", state="x"),
    ask("migrate-continue", state="pre-switchover"),
    ask("migrate-continue", state="postcopy-recover-setup"),
    ask("migrate-continue", state="none").differs("continue"),
    ask("migrate-pause"),
    ask("migrate-pause", x=1),
    ask("migrate-recover"),
    ask("migrate-recover", uri=1),
    ask("migrate-recover", uri="tcp:0"),
    ask("migrate-start-postcopy"),
    ask("migrate-start-postcopy", x=1),
    ask("migrate-set-capabilities"),
    ask("migrate-set-capabilities", x=1),
    ask("migrate-set-capabilities", capabilities=1),
    ask("migrate-set-capabilities", capabilities={}),
    ask("migrate-set-capabilities", capabilities=[]),
    ask("migrate-set-capabilities", capabilities=[1]),
    ask("migrate-set-capabilities", capabilities=[{}]),
    ask("migrate-set-capabilities", capabilities=[{"capability": "events"}]),
    ask("migrate-set-capabilities", capabilities=[{"state": True}]),
    ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": False, "x": 1}]),
    ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}, {"capability": "x"}]),
    one("events", 1),
    one("events", None),
    one("evnts", True),
    one("EVENTS", True),
    one("", True),
    one(1, True),
    ask("migrate-set-parameters"),
    ask("migrate-set-parameters", x=1),
    Question({"execute": "migrate-set-parameters", "arguments": {"downtime_limit": 1}}),
    ask("migrate_set_speed", value=1 << 27).differs("more"),
    ask("migrate_set_downtime", value=0.3).differs("more"),
    ask("migrate-set-cache-size", value=1 << 26).differs("more"),
    ask("query-migrate-cache-size").differs("more"),
    ask("stop"),
    ask("stop", x=1),
    ask("query-status"),
    ask("cont", x=1),
    ask("migrate-incoming", uri="x:y").differs("no-incoming"),
]


def test_a_machine_that_was_never_started(idle: tuple[Qemu, Ours]) -> None:
    compare(*idle, IDLE)


def test_what_is_refused_changes_nothing_but_a_qemus_status(qemu_7_2: None, qemu: Callable[..., Qemu]) -> None:
    theirs = qemu(1, machine="none")
    with Ours() as ours:
        compare(theirs, ours, [ask("migrate", uri="x:y").differs("unknown-uri")])
        compare(theirs, ours, [ask("query-migrate").differs("refused-migrate")])
        for uri in ("x:y", "nowhere", ""):
            refusals = [side.qmp.ask(ask("migrate", uri=uri).message)["error"] for side in (theirs, ours)]
            assert refusals[0]["class"] == refusals[1]["class"]
            assert refusals[1]["desc"].startswith(f"{refusals[0]['desc']}: ")


@pytest.mark.skipif("getfd" not in COMMANDS, reason="whimbrel takes no descriptors over its monitor yet")
def test_descriptors_that_are_not_there(idle: tuple[Qemu, Ours]) -> None:
    questions = [ask(command, **arguments) for command in ("getfd", "closefd") for arguments in ({}, {"fdname": 1})]
    compare(*idle, [*questions, ask("getfd", fdname="x"), ask("closefd", fdname="x"), ask("closefd", x=1)])


@pytest.mark.skipif("getfd" not in COMMANDS, reason="whimbrel takes no descriptors over its monitor yet")
def test_uris_that_reach_into_the_process(qemu_7_2: None, qemu: Callable[..., Qemu]) -> None:
    theirs = qemu(1, machine="none", stopped=True)
    with Ours() as ours:
        compare(theirs, ours, [ask("migrate", uri=f"fd:{name}") for name in ("nobody", "", "-1", "0", "1000")])
        compare(theirs, ours, [ask("migrate", uri="exec:true").differs("programs")])
        assert ours.execute("query-migrate") == {}


def test_stop_and_cont(qemu_7_2: None, qemu: Callable[..., Qemu]) -> None:
    status = ask("query-status")
    with Ours() as ours:
        theirs = qemu(1, machine="none", stopped=True)
        compare(theirs, ours, [status, ask("stop"), status, ask("cont"), status, ask("cont"), status])
        compare(theirs, ours, [ask("stop"), status, ask("stop"), status, ask("cont"), status])


def test_quit(qemu_7_2: None, qemu: Callable[..., Qemu]) -> None:
    theirs = qemu(1, machine="none")
    with Ours() as ours:
        assert "error" in ours.qmp.ask({"execute": "quit"}), differs("quit")
    with Ours(on_quit=lambda: None) as ours:
        compare(theirs, ours, [ask("quit")])
        ends = [side.qmp.wait("SHUTDOWN") for side in (theirs, ours)]
        assert [end.pop("timestamp").keys() for end in ends] == [{"seconds", "microseconds"}] * 2
        assert ends[0] == ends[1]
    assert theirs.wait_exit() == 0


# ------------------------------------------------------------------------------------------------------------- settings

SWITCHES = [name for name in Capabilities() if name != "switchover-ack"]
TOGETHER = [
    "return-path validate-uuid",
    "multifd compress",
    "postcopy-preempt",
    "postcopy-ram x-ignore-shared",
    "zero-copy-send",
    "background-snapshot postcopy-ram",
    "background-snapshot multifd",
    "background-snapshot events",
]


def not_yet(name: str) -> bool:
    return bool(Capabilities.field(name).metadata["unavailable"])


@pytest.mark.parametrize("names", [*SWITCHES, *TOGETHER])
def test_capabilities(idle: tuple[Qemu, Ours], names: str) -> None:
    wanted = [{"capability": name, "state": True} for name in names.split()]
    question = ask("migrate-set-capabilities", capabilities=wanted)
    compare(*idle, [question.differs("not-yet") if any(map(not_yet, names.split())) else question])
    none = [{"capability": name, "state": False} for name in SWITCHES]
    compare(*idle, [ask("migrate-set-capabilities", capabilities=none)])


def test_the_list_of_capabilities(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = (side.execute("query-migrate-capabilities") for side in idle)
    assert ours == [*theirs, {"capability": "switchover-ack", "state": False}], differs("more")


NUMBERS = [-1, *(0, 1, 9, 10, 20, 21, 99, 100, 101, 255, 256, 1000, 1001, 4096, 5000, 10_000, 10_001, 65_536, 100_000)]
NUMBERS += [100_001, 2_000_000, 2_000_001]
NUMBERS += [2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]
VALUES: list[Any] = [*NUMBERS, 1.0, 1.5, "1", "x", "", "none", "zlib", "zstd", "on", True, False, None, [], {}]


@pytest.mark.parametrize("name", [name for name in (*Parameters(), "block-bitmap-mapping") if name not in MORE])
def test_parameters(idle: tuple[Qemu, Ours], name: str) -> None:
    before = idle[0].execute("query-migrate-parameters").get(name)
    never = name in Parameters.refused
    unavailable = never or bool(Parameters.field(name).metadata["unavailable"])
    wrong, refused = [], 0
    for value in VALUES:
        question = ask("migrate-set-parameters", **{name: value})
        theirs, ours = (side.qmp.ask(question.message) for side in idle)
        if unavailable and "is not available in this version of whimbrel yet" in str(ours):
            assert never or "return" in theirs, differs("not-yet")
            refused += 1
        elif (name, repr(value)) == ("announce-step", "0"):
            assert "error" in theirs, differs("announce-step")
            assert ours == {"return": {}}
        elif not same(theirs, ours):
            wrong.append(f"{value!r}\n  QEMU     {theirs}\n  whimbrel {ours}")
    assert not wrong, "\n".join(wrong)
    assert bool(refused) == unavailable
    if not never:
        compare(*idle, [ask("migrate-set-parameters", **{name: before})])


def test_parameters_are_set_all_or_none(idle: tuple[Qemu, Ours]) -> None:
    pairs: list[dict[str, Any]] = [
        {"max-bandwidth": 1, "downtime-limit": 2_000_001},
        {"max-bandwidth": 1, "x": 1},
        {"max-cpu-throttle": 10},
        {"cpu-throttle-initial": 50, "max-cpu-throttle": 40},
        {"cpu-throttle-initial": 99, "max-cpu-throttle": 98},
    ]
    for parameters in pairs:
        compare(*idle, [ask("migrate-set-parameters", **parameters)])
        test_the_list_of_parameters(idle)


def test_the_list_of_parameters(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = (side.execute("query-migrate-parameters") for side in idle)
    theirs.pop("block-bitmap-mapping", None)  # there once it was set, be it to nothing
    assert {name: ours.pop(name) for name in MORE} == MORE, differs("more")
    assert ours == theirs


def test_the_list_of_commands(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = ({entry["name"] for entry in side.execute("query-commands")} for side in idle)
    older = {"migrate_set_speed", "migrate_set_downtime", "migrate-set-cache-size", "query-migrate-cache-size"}
    assert {name for name in ours - theirs if not name.startswith("x-whimbrel-")} == older, differs("more")
    assert ours == set(COMMANDS)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_differences_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "qmp.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?) \| ", page.partition("\n## Where it differs from QEMU, and why\n")[2], re.MULTILINE)
    assert rows[2:] == list(DIFFERENCES.values()), "tests/qemu/differences.py has a name for each row, in their order"


def test_each_difference_is_shown() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'differs\(\s*"([\w-]+)"\s*\)', shown)) == set(DIFFERENCES)
