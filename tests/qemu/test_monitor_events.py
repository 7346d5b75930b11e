"""Which events come in which order, and how migrations end: of real QEMUs and of our machines.

As in `test_monitor`, what is not said to differ must be equal.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from whimbrel.migration.handover import PROOF

from .beside import CRAWLING, FAST, Beside, Two, compare_info, order, settle
from .differences import ask, compare, differs
from .ours import Ours
from .peer import Qemu
from .qmp import PATIENCE, spell


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
        source.qmp.wait("STOP")
        destination.qmp.wait("RESUME")
        assert [word for word in order(source) if word != "RESUME"] == ["STOP"]
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
    theirs, ours = (order(side) for side in beside.sources)
    assert ours == expected
    # A QEMU may leave pre-switchover for the cancel before it knows of it.
    assert [word for word in theirs if word != "device"] == expected


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


@pytest.mark.slow
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
