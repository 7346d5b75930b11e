"""Which events come and in which order, compared with the table of the wire format, section 10.5."""

import socket
import threading
from contextlib import suppress

import pytest

from whimbrel.errors import MonitorError
from whimbrel.migration.handover import PROOF


@pytest.fixture
def crawling(pair, listen, switch_on, hear):
    """A pair whose migration goes on for ever, and the events until it was active."""
    switch_on(pair.at_source, "events")
    pair.at_source.execute("migrate-set-parameters", max_bandwidth=4096)
    uri = listen(pair.at_destination)
    pair.at_source.execute("migrate", uri=uri)
    assert hear(pair.at_source, "active") == ["setup", "PASS 1", "active"]
    return pair


def passes(first, last):
    return [f"PASS {number}" for number in range(first, last + 1)]


def test_a_plain_migration(pair, listen, switch_on, hear):
    switch_on(pair.at_source, "events")
    switch_on(pair.at_destination, "events")
    pair.at_source.execute("migrate", uri=listen(pair.at_destination))
    heard = hear(pair.at_source, "completed")
    count = pair.at_source.execute("query-migrate")["ram"]["dirty-sync-count"]
    assert count >= 3
    assert heard == ["setup", "PASS 1", "active", *passes(2, count - 1), "STOP", f"PASS {count}", "completed"]
    assert hear(pair.at_destination, "completed") == ["setup", "active", "RESUME", "completed"]
    source_info = pair.at_source.execute("query-migrate")
    assert {"status", "setup-time", "total-time", "downtime", "ram"} <= source_info.keys()
    assert "expected-downtime" not in source_info
    assert pair.at_source.execute("query-status")["status"] == "postmigrate"
    assert pair.at_destination.execute("query-status") == {"running": True, "singlestep": False, "status": "running"}
    assert pair.at_source.events() == pair.at_destination.events() == []


def test_without_the_capability_there_are_only_the_guests_own(pair, listen, hear):
    pair.at_source.execute("migrate", uri=listen(pair.at_destination))
    pair.source.migration.wait(20)
    pair.destination.migration.wait(20)
    assert hear(pair.at_source, "STOP") == ["STOP"]
    # A destination's setup is told without it, as in QEMU.
    assert hear(pair.at_destination, "RESUME") == ["setup", "RESUME"]
    assert pair.at_source.events() == pair.at_destination.events() == []


def test_pause_before_switchover(pair, listen, switch_on, hear):
    switch_on(pair.at_source, "events", "pause-before-switchover")
    pair.at_source.execute("migrate", uri=listen(pair.at_destination))
    heard = hear(pair.at_source, "pre-switchover")
    assert pair.at_source.execute("query-migrate")["status"] == "pre-switchover"
    assert pair.at_source.execute("query-status")["status"] == "finish-migrate"
    for command, arguments, text in [
        ("migrate-continue", {"state": "active"}, "Migration not in expected state: pre-switchover"),
        ("cont", {}, "Migration is not finalized yet"),
        ("stop", {}, "Migration is not finalized yet"),
        ("migrate", {"uri": "tcp:127.0.0.1:1"}, "There's a migration process in progress"),
        ("migrate-set-capabilities", {"capabilities": []}, "There's a migration process in progress"),
    ]:
        with pytest.raises(MonitorError) as caught:
            pair.at_source.execute(command, **arguments)
        assert str(caught.value) == text
    pair.at_source.execute("migrate-continue", state="pre-switchover")
    heard += hear(pair.at_source, "completed")
    count = pair.at_source.execute("query-migrate")["ram"]["dirty-sync-count"]
    before = ["setup", "PASS 1", "active", *passes(2, count - 1), "STOP", "pre-switchover"]
    assert heard == [*before, "device", f"PASS {count}", "completed"]


def test_a_cancel(crawling, hear):
    info = crawling.at_source.execute("query-migrate")
    assert info["status"] == "active"
    assert {"setup-time", "total-time", "ram"} <= info.keys()
    assert info["ram"]["total"] == 1 << 20
    assert crawling.at_source.execute("migrate_cancel") == {}
    assert hear(crawling.at_source, "cancelled") == ["cancelling", "cancelled"]
    assert crawling.at_source.execute("query-migrate")["status"] == "cancelled"
    assert crawling.at_source.execute("query-status")["running"]
    assert crawling.at_source.execute("migrate_cancel") == {}


def test_settings_while_a_migration_runs(crawling, until):
    until(lambda: crawling.at_destination.execute("query-migrate").get("status") == "active", "the stream's header")
    with pytest.raises(MonitorError, match="There's a migration process in progress"):
        crawling.at_source.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": False}])
    with pytest.raises(MonitorError, match="There's a migration process in progress"):
        crawling.at_destination.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )
    assert crawling.at_source.execute("migrate-set-parameters", max_bandwidth=0) == {}
    assert crawling.source.migration.wait(20).status == "completed"


def test_a_peer_that_goes_away(pair, switch_on, hear):
    switch_on(pair.at_source, "events")
    pair.at_source.execute("migrate-set-parameters", max_bandwidth=1 << 18)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pair.at_source.execute("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        peer, _ = listener.accept()
        with peer:
            heard = hear(pair.at_source, "active")
    assert heard + hear(pair.at_source, "failed") == ["setup", "PASS 1", "active", "failed"]
    info = pair.at_source.execute("query-migrate")
    assert info["status"] == "failed"
    assert info["error-desc"]
    assert pair.at_source.execute("query-status")["running"]


def test_nobody_there(pair, switch_on, hear, tmp_path):
    switch_on(pair.at_source, "events")
    assert pair.at_source.execute("migrate", uri=f"unix:{tmp_path}/x") == {}
    assert hear(pair.at_source, "failed") == ["setup", "failed"]
    text = f"Failed to connect to '{tmp_path}/x': No such file or directory"
    assert pair.at_source.execute("query-migrate") == {"status": "failed", "error-desc": text}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    pair.at_source.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
    assert hear(pair.at_source, "failed") == ["setup", "failed"]
    text = f"Failed to connect to '127.0.0.1:{port}': Connection refused"
    assert pair.at_source.execute("query-migrate")["error-desc"] == text


def test_a_machine_that_was_handed_over_and_taken_back(pair, listen, hear):
    pair.at_source.execute("migrate", uri=listen(pair.at_destination))
    pair.source.migration.wait(20)
    with pytest.raises(MonitorError, match="never runs here again by itself"):
        pair.at_source.execute("cont")
    with pytest.raises(MonitorError, match="Can't migrate the vm that was paused due to previous migration"):
        pair.at_source.execute("migrate", uri="tcp:127.0.0.1:1")
    pair.at_destination.execute("stop")
    assert pair.at_source.execute("x-whimbrel-reclaim") == {}
    assert pair.at_source.execute("query-status")["status"] == "paused"
    assert pair.at_source.execute("cont") == {}
    assert pair.at_source.execute("query-status")["running"]


@pytest.fixture
def undecided(pair, listen, hear):
    """A destination that holds a whole machine and waits for the word: the link died right behind its proof."""
    port = int(listen(pair.at_destination).rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=relay_until_proof, args=(listener, port))
        relay.start()
        pair.source.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}", handover="proof")
        relay.join()
    with pytest.raises(Exception, match="whole and stopped"):
        pair.destination.migration.wait(20)
    pair.source.migration.join()
    pair.at_source.execute("stop")
    return pair


def relay_until_proof(listener, port, decided=None):
    here, _ = listener.accept()
    with here, socket.create_connection(("127.0.0.1", port)) as there:
        forth = threading.Thread(target=pump, args=(here, there, None))
        forth.start()
        pump(there, here, PROOF.to_bytes(4, "big"))
        if decided is not None:
            decided.wait(20)
        for end in (here, there):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        forth.join()


def pump(source, sink, until):
    try:
        while data := source.recv(1 << 16):
            if until is not None and until in data:
                return
            sink.sendall(data)
    except OSError:
        return


def test_a_machine_that_waits_for_the_word_is_adopted_and_not_by_cont(undecided, hear):
    info = undecided.at_destination.execute("x-whimbrel-info")
    assert (info["status"], info["ownership"], info["error-code"]) == ("failed", "prepared", "undecided")
    with pytest.raises(MonitorError, match="waits for a decision here: x-whimbrel-adopt or x-whimbrel-discard"):
        undecided.at_destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    with pytest.raises(MonitorError, match="x-whimbrel-adopt if the source does not run and never will"):
        undecided.at_destination.execute("cont")
    assert undecided.at_destination.execute("query-status")["status"] == "inmigrate"
    hear(undecided.at_destination, "setup")
    assert undecided.at_destination.execute("x-whimbrel-adopt") == {}
    assert hear(undecided.at_destination, "RESUME") == ["RESUME"]
    assert undecided.at_destination.execute("query-status")["running"]
    for command in ("x-whimbrel-adopt", "x-whimbrel-discard"):
        with pytest.raises(MonitorError, match="no machine that has arrived here waits for a decision"):
            undecided.at_destination.execute(command)


@pytest.mark.parametrize(("command", "state"), [("x-whimbrel-adopt", "running"), ("x-whimbrel-discard", "inmigrate")])
def test_an_operator_need_not_wait_for_the_order(pair, listen, until, command, state):
    port = int(listen(pair.at_destination).rpartition(":")[2])
    decided = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = threading.Thread(target=relay_until_proof, args=(listener, port, decided))
        relay.start()
        pair.at_source.execute("migrate", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        until(lambda: pair.at_destination.execute("x-whimbrel-info").get("ownership") == "prepared", "the proof")
        with pytest.raises(MonitorError, match="waits for a decision"):
            pair.at_destination.execute("cont")
        assert pair.at_destination.execute(command) == {}
        assert pair.at_destination.execute("query-status")["status"] == state
        decided.set()
        relay.join()


def test_discard_drops_it_and_another_may_come(undecided, listen):
    assert undecided.at_destination.execute("x-whimbrel-discard") == {}
    assert undecided.at_destination.execute("query-status")["status"] == "inmigrate"
    assert listen(undecided.at_destination)
