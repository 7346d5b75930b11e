"""Questions to real QEMUs and to our machines in each state of a migration.

As in `test_monitor`, what is not said to differ must be equal.
"""

from __future__ import annotations

import pytest

from .beside import CRAWLING, FAST, Beside, compare_info, order, settle
from .differences import ask, compare, differs
from .qmp import spell

RUNNING = [
    ask("migrate", uri="x:y"),
    ask("migrate", uri="unix:/nonexistent/x", resume=True),
    ask("migrate-incoming", uri="x:y").differs("no-incoming"),
    ask("migrate-set-capabilities", capabilities=[]),
    ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": False}]),
    ask("migrate-pause"),
    ask("migrate-recover", uri="x"),
    ask("migrate-start-postcopy"),
    ask("query-status"),
]
STATE = [ask("migrate-continue", state=state) for state in ("none", "setup", "device", "completed")]


def test_a_destination_that_waits(beside: Beside) -> None:
    questions = [
        ask("query-migrate"),
        ask("query-status").differs("no-incoming"),
        ask("migrate-incoming"),
        ask("migrate-incoming", uri="x:y").differs("unknown-uri"),
        ask("migrate-incoming", uri="unix:/nonexistent/x").differs("address"),
        ask("query-migrate"),
    ]
    compare(*beside.destinations, questions)
    assert [spell(side.qmp.events) for side in beside.destinations] == [["setup", "setup"], []], differs(
        "refused-incoming"
    )
    for two in beside.each():
        two.listen()
    questions = [
        ask("query-status"),
        ask("migrate-incoming", uri="x:y"),
        ask("migrate", uri="x:y"),
        ask("stop").differs("stop-incoming"),
        ask("cont").differs("stop-incoming"),
        ask("migrate-continue", state="setup"),
        ask("migrate-continue", state="active"),
        ask("migrate-pause"),
        ask("migrate-recover", uri="x"),
        ask("migrate-start-postcopy"),
        ask("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}]),
        ask("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": False}]),
        ask("migrate_cancel"),
    ]
    compare(*beside.destinations, questions)
    ours = beside.ours.destination
    assert ours.wait_status("cancelled", "failed") == "cancelled", differs("cancel-destination")
    assert "socket-address" in beside.theirs.destination.execute("query-migrate")
    assert spell(beside.theirs.destination.qmp.events) == ["setup"] * 3


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:0", "unix"])
def test_where_a_destination_waits(beside: Beside, uri: str) -> None:
    shapes = []
    for side in beside.destinations:
        side.execute("migrate-incoming", uri=side.uri("stream") if uri == "unix" else uri)
        (address,) = side.execute("query-migrate")["socket-address"]
        if uri == "unix":
            assert f"unix:{address['path']}" == side.uri("stream")
            address["path"] = ""
        else:
            assert 0 < int(address["port"]) < 65536
            address["port"] = ""
        shapes.append(address)
    assert shapes[0] == shapes[1]


def test_a_destination_without_a_host(beside: Beside) -> None:
    hosts = []
    for side in beside.destinations:
        side.execute("migrate-incoming", uri="tcp::0")
        hosts.append([address["host"] for address in side.execute("query-migrate")["socket-address"]])
    assert hosts[0] != hosts[1], differs("loopback")
    assert hosts[1] == ["127.0.0.1"]


def test_while_a_machine_is_sent(beside: Beside) -> None:
    for two in beside.each():
        two.begin(**CRAWLING)
    compare(*beside.sources, [*RUNNING, *STATE, ask("migrate-continue", state="active").differs("continue")])
    compare_info(beside.sources, "active")
    infos = [side.execute("query-migrate") for side in beside.destinations]
    assert [sorted(info) for info in infos] == [["socket-address", "status"]] * 2
    assert [info["status"] for info in infos] == ["active"] * 2
    questions = [
        ask("query-status"),
        ask("migrate-incoming", uri="x:y"),
        ask("migrate", uri="x:y"),
        ask("migrate-continue", state="active"),
        ask("stop").differs("stop-incoming"),
        ask("cont").differs("stop-incoming"),
        ask("migrate-set-capabilities", capabilities=[]).differs("settled"),
    ]
    compare(*beside.destinations, questions)
    compare(*beside.sources, [ask("stop"), ask("query-status"), ask("cont"), ask("query-status")])
    compare(*beside.sources, [ask("migrate-set-parameters", **FAST)])
    for two in beside.each():
        settle(two)
    compare_info(beside.sources, "completed")
    compare(*beside.destinations, [ask("query-migrate"), ask("query-status")])
    assert order(beside.theirs.source) == order(beside.ours.source)


def test_behind_a_migration(beside: Beside) -> None:
    for two in beside.each():
        two.begin(**FAST)
        settle(two)
    questions = [
        ask("query-status"),
        ask("migrate", uri="x:y"),
        ask("migrate-incoming", uri="x:y").differs("no-incoming"),
        ask("migrate_cancel"),
        ask("stop"),
        ask("query-status"),
        *STATE[:-1],
        ask("migrate-continue", state="completed").differs("continue"),
        ask("migrate-set-capabilities", capabilities=[]),
    ]
    compare(*beside.sources, questions)
    compare_info(beside.sources, "completed")
    compare(*beside.sources, [ask("cont").differs("reclaim"), ask("query-status").differs("reclaim")])
    questions = [
        ask("query-status"),
        ask("query-migrate"),
        ask("migrate-incoming", uri="x:y"),
        ask("migrate-continue", state="active"),
        ask("migrate_cancel"),
        ask("query-migrate"),
        ask("stop"),
        ask("query-status"),
        ask("cont"),
    ]
    compare(*beside.destinations, questions)


def test_before_the_switchover(beside: Beside) -> None:
    for two in beside.each():
        for side in two.both():
            side.switch_on("pause-before-switchover")
        two.source.execute("migrate-set-parameters", **FAST)
        two.source.migrate(two.listen())
        two.source.wait_status("pre-switchover")
    questions = [
        *RUNNING,
        *STATE,
        ask("stop").differs("stop-at-the-end"),
        ask("cont"),
        ask("query-status"),
    ]
    compare(*beside.sources, questions)
    compare_info(beside.sources, "pre-switchover")
    compare(*beside.sources, [ask("migrate-continue", state="pre-switchover")])
    for two in beside.each():
        settle(two)
    expected = ["setup", "PASS 1", "active", "STOP", "pre-switchover", "device", "PASS n", "completed"]
    assert [order(side) for side in beside.sources] == [expected, expected]
