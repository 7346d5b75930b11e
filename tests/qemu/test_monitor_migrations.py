"""Migrations of real QEMUs and of our machines beside each other: states, answers in each, and the order of events.

As in `test_monitor`, what is not said to differ must be equal.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import attrs
import pytest

from whimbrel.migration.handover import PROOF

from .differences import ask, compare, differs
from .ours import Ours
from .peer import Qemu
from .qmp import PATIENCE, Monitored, spell

Side = Qemu | Ours


@attrs.frozen
class Two:
    """A source that runs and a destination, of one make."""

    source: Side
    destination: Side

    def listen(self) -> str:
        """Let the destination wait; the URI to go to."""
        uri = self.destination.uri("stream")
        self.destination.execute("migrate-incoming", uri=uri)
        return uri

    def begin(self, **parameters: Any) -> None:
        """Begin to migrate, with `parameters`, until both sides are active."""
        self.source.execute("migrate-set-parameters", **parameters)
        self.source.migrate(self.listen())
        self.source.wait_status("active")
        self.destination.wait_status("active")

    def both(self) -> tuple[Side, Side]:
        return self.source, self.destination


@attrs.frozen
class Beside:
    """Real QEMUs, and machines of ours in the same place."""

    theirs: Two
    ours: Two

    @property
    def sources(self) -> tuple[Side, Side]:
        return self.theirs.source, self.ours.source

    @property
    def destinations(self) -> tuple[Side, Side]:
        return self.theirs.destination, self.ours.destination

    def each(self) -> tuple[Two, Two]:
        return self.theirs, self.ours


CRAWLING = {"max_bandwidth": 4096}
"""Never done; there is no way to be done but another bandwidth."""
FAST = {"max_bandwidth": 1 << 40, "downtime_limit": 2000}


@pytest.fixture
def make_qemu(qemu: Callable[..., Qemu], tiny_machine: dict[str, Any]) -> Callable[..., Qemu]:
    return lambda **options: qemu(**tiny_machine, **options)


@pytest.fixture
def beside(make_qemu: Callable[..., Qemu], ours: Callable[..., Ours]) -> Beside:
    """Sources whose guests run, and fresh destinations; the events of the start are behind us."""
    made = Beside(Two(make_qemu(), make_qemu(incoming="defer")), Two(ours(), ours()))
    assert isinstance(made.theirs.source, Qemu)
    made.theirs.source.wait_started()
    made.ours.source.execute("cont")
    made.ours.source.qmp.wait("RESUME")
    made.ours.source.qmp.forget()
    return made


def order(side: Monitored) -> list[str]:
    """The events in a word each; of those passes that depend on how fast it went only the last, as PASS n.

    Passes must be counted from 1, one by one.
    """
    words = spell(side.qmp.events)
    passes = [word for word in words if word.startswith("PASS ")]
    expected = 0
    for word in passes:
        expected = 1 if word == "PASS 1" else expected + 1
        assert word == f"PASS {expected}"
    kept = ["PASS n" if re.fullmatch(r"PASS (?!1$)\d+", word) else word for word in words]
    end = kept.index("STOP") if "STOP" in kept else len(kept)
    return [word for at, word in enumerate(kept) if word != "PASS n" or at > end]


def settle(two: Two) -> None:
    """Wait until both are where they stay."""
    assert two.source.wait_status("completed", "failed") == "completed"
    two.source.wait_run_state("postmigrate")
    assert two.destination.wait_status("completed", "failed") == "completed"


def shape(value: Any) -> Any:
    """Keys, and types of values; words as they are."""
    if isinstance(value, dict):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [shape(each) for each in value]
    return value if isinstance(value, str) else type(value).__name__


def compare_info(sides: tuple[Monitored, Monitored], status: str) -> None:
    """query-migrate of both: the same keys, with values of the same types; numbers may be of any kind."""
    shapes = []
    for side in sides:
        info = side.execute("query-migrate")
        assert info["status"] == status
        if "ram" in info:
            info["ram"]["mbps"] = float(info["ram"]["mbps"])  # 0 at first, and a fraction later
        shapes.append(shape(info))
    assert shapes[0] == shapes[1]


# ----------------------------------------------------------------------------------------------- each state, questioned

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


def test_a_destination_that_waits(beside: Beside, tmp_path: Any) -> None:
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


# ----------------------------------------------------------------------------------------------------- orders of events


def test_a_plain_migration(beside: Beside) -> None:
    for two in beside.each():
        two.source.execute("migrate-set-parameters", **FAST)
        two.source.migrate(two.listen())
        settle(two)
    expected = ["setup", "PASS 1", "active", "STOP", "PASS n", "completed"]
    assert [order(side) for side in beside.sources] == [expected, expected]
    stops = [spell(side.qmp.events).index("STOP") for side in beside.sources]
    assert stops[0] == 3, differs("passes")
    assert stops[1] > 3
    assert [order(side) for side in beside.destinations] == [["setup", "active", "RESUME", "completed"]] * 2


def test_without_the_capability(make_qemu: Callable[..., Qemu], ours: Callable[..., Ours]) -> None:
    for make in (make_qemu, ours):
        source = make(events=False)
        destination = make(events=False, **({"incoming": "defer"} if make is make_qemu else {}))
        if isinstance(source, Qemu):
            source.wait_started()
        else:
            source.execute("cont")
            source.qmp.wait("RESUME")
        destination.execute("migrate-incoming", uri=destination.uri("stream"))
        source.migrate(destination.uri("stream"))
        source.wait_run_state("postmigrate")
        destination.qmp.wait("RESUME")
        assert order(source)[-1:] == ["STOP"]
        assert order(destination) == ["setup", "RESUME"]


def test_a_machine_that_does_not_run(beside: Beside) -> None:
    for two in beside.each():
        two.source.execute("stop")
        two.source.qmp.wait("STOP")
        two.source.execute("migrate-set-parameters", **FAST)
        two.source.migrate(two.listen())
        settle(two)
    for two in beside.each():
        words = spell(two.source.qmp.events)
        assert words[:4] == ["STOP", "setup", "PASS 1", "active"]
        assert words[-1] == "completed"
        assert words.count("STOP") == 1
        assert spell(two.destination.qmp.events) == ["setup", "active", "completed"]
    compare(*beside.sources, [ask("query-status")])
    compare(*beside.destinations, [ask("query-status"), ask("cont"), ask("query-status")])


def test_a_machine_that_was_never_started(make_qemu: Callable[..., Qemu], ours: Callable[..., Ours]) -> None:
    theirs = Two(make_qemu(stopped=True), make_qemu(incoming="defer"))
    both = Beside(theirs, Two(ours(), ours()))
    for two in both.each():
        two.source.migrate("unix:/nonexistent/x")
        two.source.wait_status("failed")
    compare(*both.sources, [ask("query-status").differs("powered"), ask("query-migrate")])
    for two in both.each():
        two.source.migrate(two.listen())
        settle(two)
    compare(*both.sources, [ask("query-status")])
    compare(*both.destinations, [ask("query-status").differs("powered"), ask("cont"), ask("query-status")])


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("uri", ["unix:/nonexistent/x", "tcp:127.0.0.1:1"])
def test_nobody_there(beside: Beside, uri: str) -> None:
    compare(*beside.sources, [ask("migrate", uri=uri)])
    for side in beside.sources:
        side.wait_status("failed")
        side.wait_run_state("running")
        assert order(side) == ["setup", "failed"]
    compare(*beside.sources, [ask("query-migrate"), ask("query-status"), ask("migrate_cancel"), ask("query-migrate")])


@pytest.mark.parametrize("uri", ["tcp:127.0.0.1:x", "tcp:127.0.0.1:99999", "tcp:[::1]:1", f"unix:{'x' * 200}"])
def test_an_address_that_fails(beside: Beside, uri: str) -> None:
    compare(*beside.sources, [ask("migrate", uri=uri)])
    for side in beside.sources:
        side.wait_status("failed")
    compare(*beside.sources, [ask("query-migrate").differs("address")])


@pytest.mark.parametrize("uri", ["tcp:", "tcp:127.0.0.1", "tcp:127.0.0.1:", "tcp:[::1", "unix:"])
def test_an_address_that_cannot_be_read(beside: Beside, uri: str) -> None:
    compare(*beside.sources, [ask("migrate", uri=uri).differs("address")])
    beside.ours.source.wait_status("failed")
    assert order(beside.theirs.source) == order(beside.ours.source) == ["setup", "failed"]
    compare(*beside.destinations, [ask("migrate-incoming", uri=uri).differs("address")])


def test_a_cancel(beside: Beside) -> None:
    for two in beside.each():
        two.begin(**CRAWLING)
    compare(*beside.sources, [ask("migrate_cancel")])
    for side in beside.sources:
        side.wait_status("cancelled")
        side.wait_run_state("running")
    expected = ["setup", "PASS 1", "active", "cancelling", "cancelled"]
    assert [order(side) for side in beside.sources] == [expected, expected]
    infos = [side.execute("query-migrate") for side in beside.sources]
    assert infos[0] == {"status": "cancelled"}, differs("error-desc")
    assert infos[1].keys() == {"status", "error-desc"}
    compare(*beside.sources, [ask("migrate_cancel"), ask("query-status")])
    theirs, ours = beside.destinations
    assert isinstance(theirs, Qemu)
    assert theirs.wait_exit() == 1, differs("failed-destination")
    assert ours.wait_status("failed", "completed") == "failed"
    assert order(ours) == [*order(theirs), "failed"]
    ours.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    assert ours.run_state() == "inmigrate"


def test_a_cancel_before_the_switchover(beside: Beside) -> None:
    for two in beside.each():
        two.source.switch_on("pause-before-switchover")
        two.source.execute("migrate-set-parameters", **FAST)
        two.source.migrate(two.listen())
        two.source.wait_status("pre-switchover")
    compare(*beside.sources, [ask("migrate_cancel")])
    for side in beside.sources:
        side.wait_status("cancelled")
        side.wait_run_state("running")
    expected = ["setup", "PASS 1", "active", "STOP", "pre-switchover", "cancelling", "RESUME", "cancelled"]
    assert [order(side) for side in beside.sources] == [expected, expected]


def test_a_second_attempt(beside: Beside, make_qemu: Callable[..., Qemu], ours: Callable[..., Ours]) -> None:
    for two in beside.each():
        two.begin(**CRAWLING)
        two.source.execute("migrate_cancel")
        two.source.wait_status("cancelled")
    other = Beside(Two(beside.theirs.source, make_qemu(incoming="defer")), Two(beside.ours.source, ours()))
    for two in other.each():
        two.begin(**FAST)
        settle(two)
    expected = ["setup", "PASS 1", "active", "cancelling", "cancelled"]
    expected += ["setup", "PASS 1", "active", "STOP", "PASS n", "completed"]
    assert [order(side) for side in beside.sources] == [expected, expected]
    compare_info(other.sources, "completed")


def test_a_destination_that_goes_away(beside: Beside) -> None:
    for two in beside.each():
        two.begin(**CRAWLING)
        two.destination.close()
        two.source.execute("migrate-set-parameters", **FAST)
        two.source.wait_status("failed")
        two.source.wait_run_state("running")
    expected = ["setup", "PASS 1", "active", "failed"]
    assert [order(side) for side in beside.sources] == [expected, expected]
    infos = [side.execute("query-migrate") for side in beside.sources]
    assert [sorted(info) for info in infos] == [["error-desc", "status"]] * 2
    assert infos[0] != infos[1], differs("error-desc")


def test_a_source_that_goes_away(beside: Beside) -> None:
    for two in beside.each():
        two.begin(**CRAWLING)
        two.source.close()
    theirs, ours = beside.destinations
    assert isinstance(theirs, Qemu)
    assert theirs.wait_exit() == 1, differs("failed-destination")
    assert ours.wait_status("failed", "completed") == "failed"
    assert order(ours) == [*order(theirs), "failed"] == ["setup", "active", "failed"]


@contextmanager
def silent_behind_proof(two: Two) -> Iterator[str]:
    """A URI that leads to `two.destination`; what comes back is lost from the proof of our handover on."""
    path = two.destination.uri("relay").removeprefix("unix:")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.settimeout(PATIENCE)
        listener.bind(path)
        listener.listen()
        there = stack.enter_context(socket.socket(socket.AF_UNIX))
        there.connect(two.listen().removeprefix("unix:"))

        def relay() -> None:
            here, _ = listener.accept()
            here.settimeout(None)
            with here:
                back = threading.Thread(target=pump, args=(there, here, PROOF.to_bytes(4, "big")))
                back.start()
                pump(here, there, None)
                with suppress(OSError):
                    there.shutdown(socket.SHUT_RDWR)
                back.join()

        thread = threading.Thread(target=relay)
        thread.start()
        try:
            yield f"unix:{path}"
        finally:
            two.source.close()
            thread.join(PATIENCE)


def pump(source: socket.socket, sink: socket.socket, until: bytes | None) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if until is not None and until in data:
                return
            sink.sendall(data)


def test_a_source_that_falls_silent_behind_the_proof(beside: Beside) -> None:
    theirs, ours = beside.destinations
    with silent_behind_proof(beside.theirs) as uri:
        beside.theirs.source.migrate(uri)
        assert theirs.wait_status("completed", "failed") == "completed"
        assert theirs.run_state() == "running", differs("adopt")
    with silent_behind_proof(beside.ours) as uri:
        beside.ours.source.migrate(uri)
        deadline = threading.Event()
        while ours.execute("x-whimbrel-info").get("ownership") != "prepared":
            deadline.wait(0.01)
        assert "x-whimbrel-adopt" in ours.qmp.ask({"execute": "cont"})["error"]["desc"]
        assert ours.run_state() == "inmigrate"
