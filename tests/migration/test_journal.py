"""The journal: what a crash leaves of it, what damage does, and what it says of a machine afterwards."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading

import attrs
import pytest

from whimbrel import LoopGuest, Machine, Settings
from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, JournalError, StateError
from whimbrel.migration import journal as journals
from whimbrel.migration.journal import Journal, Record, new_mid
from whimbrel.migration.standing import Standing, Verdict, answer_from
from whimbrel.migration.witnessing import witness_of
from whimbrel.wire import handover
from whimbrel.wire.handover import Word, WordKind

MID = "0f" * 16


def record(**more):
    return attrs.evolve(
        Record(mid=MID, role="source", ownership="frozen", epoch=3, deal="pairwise", peer="x:y"), **more
    )


@pytest.fixture
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def opened(tmp_path):
    made = []

    def make():
        for journal in made:
            journal.close()
        made.append(Journal.open(tmp_path / "j", "heat"))
        return made[-1]

    yield make
    for journal in made:
        journal.close()


def test_what_is_appended_is_there_the_next_time(opened):
    first, second = record(), record(ownership="released")
    journal = opened()
    assert (journal.last, journal.epoch, journal.of(bytes(16))) == (None, 0, None)
    journal.append(first)
    journal.append(second)
    again = opened()
    assert again.last == second
    assert again.of(bytes.fromhex(MID)) == second
    assert again.epoch == 3
    assert [each.ownership for each in journals.read(again.path)] == ["frozen", "released"]
    assert oct(again.path.stat().st_mode & 0o777) == "0o600"
    assert oct(again.path.parent.stat().st_mode & 0o777) == "0o700"


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(opened):
    journal = opened()
    journal.append(record())
    whole = journal.path.read_bytes()
    journal.append(record(ownership="released"))
    both = journal.path.read_bytes()
    for size in range(len(whole), len(both)):
        journal.path.write_bytes(both[:size])
        journal = opened()
        assert journal.last.ownership == "frozen", size
        assert journal.path.read_bytes() == whole
    journal.append(record(ownership="owner"))
    assert opened().last.ownership == "owner"


def test_a_tail_with_a_hole_is_a_torn_one(opened):
    journal = opened()
    journal.append(record())
    size = journal.path.stat().st_size
    journal.append(record(ownership="released"))
    data = bytearray(journal.path.read_bytes())
    data[size : size + 100] = bytes(100)  # the block that its beginning is in was not written
    journal.path.write_bytes(data)
    assert opened().last.ownership == "frozen"


def test_damage_before_the_end_is_refused(opened):
    journal = opened()
    journal.append(record())
    journal.append(record(ownership="released"))
    data = bytearray(journal.path.read_bytes())
    journal.close()
    for at in range(0, data.index(b"\n") + 1, 7):
        damaged = data.copy()
        damaged[at] ^= 1
        journal.path.write_bytes(damaged)
        with pytest.raises(JournalError, match=r"line 1 of the journal .* is damaged"):
            Journal.open(journal.path.parent, "heat")


def test_a_line_without_an_end_is_not_read_for_ever(opened):
    journal = opened()
    journal.append(record())
    with journal.path.open("ab") as file:
        file.write(b"0" * (3 * journals.LONGEST))
    journal.close()
    with pytest.raises(JournalError, match="line 2"):
        Journal.open(journal.path.parent, "heat")


def test_two_processes_cannot_hold_it(opened):
    journal = opened()
    with pytest.raises(JournalError, match="held by another process"):
        Journal.open(journal.path.parent, "heat")
    other = Journal.open(journal.path.parent, "cold")
    other.close()
    journal.close()
    Journal.open(journal.path.parent, "heat").close()


def test_a_name_is_no_path(tmp_path):
    journal = Journal.open(tmp_path, "../etc/x y")
    assert journal.path.parent == tmp_path
    journal.close()


def test_a_record_that_cannot_be_made_durable_is_taken_back(opened, monkeypatch):
    journal = opened()
    journal.append(record())
    whole = journal.path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(JournalError, match="No space left"):
            journal.append(record(ownership="released"))
    assert journal.path.read_bytes() == whole
    assert journal.last.ownership == "frozen"
    journal.append(record(ownership="owner"))
    assert opened().last.ownership == "owner"


def test_a_disk_that_is_full_keeps_the_machine_here(tmp_path, make_pair, churning, monkeypatch):
    pair = make_pair(churning({"a": 4}), handover="auto", uri="tcp:127.0.0.1:0")
    pair.source.keep_journal(tmp_path)
    pair.source.start()
    real = Journal.append

    def append(self, record):
        if record.ownership == "released":
            raise JournalError("the journal cannot be written: No space left on device")
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        _, outgoing = pair.run()
    assert isinstance(outgoing.error, JournalError)
    assert pair.source.run_state == "running"
    assert pair.source.journal.last.ownership == "owner"


def test_a_journal_is_written_anew_when_it_has_grown(opened, monkeypatch):
    monkeypatch.setattr(journals, "COMPACT", 4096)
    monkeypatch.setattr(journals, "REMEMBERED", 8)
    journal = opened()
    mids = [new_mid().hex() for _ in range(40)]
    for number, mid in enumerate(mids):
        journal.append(record(mid=mid, epoch=number))
    assert journal.path.stat().st_size > 4096
    again = opened()
    assert again.path.stat().st_size < 4096
    assert again.last.mid == mids[-1]
    assert again.epoch == 39
    assert again.of(bytes.fromhex(mids[-8])) is not None
    assert again.of(bytes.fromhex(mids[0])) is None
    with pytest.raises(JournalError, match="held by another process"):
        Journal.open(again.path.parent, "heat")


def test_a_journal_that_does_not_fit_written_anew_stays_as_it_was(opened, monkeypatch):
    """A disk that takes a part of it only: the file's size is limited by the kernel meanwhile."""
    journal = opened()
    for number in range(40):
        journal.append(record(mid=new_mid().hex(), epoch=number))
    whole = journal.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(journals, "COMPACT", 4096)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(JournalError, match="cannot be opened"):
                opened()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.path.read_bytes() == whole
    assert opened().epoch == 39


STANDINGS = [
    ("machine", "owner", "", Verdict.LOST),
    ("source", "owner", "pairwise", Verdict.LOST),
    ("source", "frozen", "pairwise", Verdict.ASK),
    ("source", "frozen", "proof", Verdict.LOST),
    ("source", "prepared", "pairwise", Verdict.ASK),
    ("source", "released", "pairwise", Verdict.ASK),
    ("source", "released", "proof", Verdict.UNKNOWN),
    ("source", "released", "one-way", Verdict.UNKNOWN),
    ("source", "frozen", "witness", Verdict.LOST),
    ("source", "released", "witness", Verdict.ASK_WITNESS),
    ("source", "done", "pairwise", Verdict.AWAY),
    ("destination", "loading", "pairwise", Verdict.ELSEWHERE),
    ("destination", "prepared", "pairwise", Verdict.ELSEWHERE),
    ("destination", "prepared", "witness", Verdict.ASK_WITNESS),
    ("destination", "refused", "pairwise", Verdict.ELSEWHERE),
    ("destination", "owner", "pairwise", Verdict.LOST),
]


@pytest.mark.parametrize(("role", "ownership", "deal", "verdict"), STANDINGS)
def test_what_a_journal_says_after_a_crash(opened, tmp_path, role, ownership, deal, verdict):
    journal = opened()
    journal.append(record(role=role, ownership=ownership, deal=deal))
    standing = Standing.of(journal)
    assert standing.verdict is verdict
    assert standing.sentence
    journal.close()
    with Machine("heat") as machine:
        machine.ram.add("a", 4096)
        machine.keep_journal(tmp_path / "j")
        if verdict is Verdict.LOST:
            machine.start()
            assert (machine.epoch, machine.journal.last.ownership) == (4, "owner")
            return
        with pytest.raises(StateError, match=r"handed over|has moved|on its way|be asked"):
            machine.start()
        assert machine.run_state == "prelaunch"
        machine.start_afresh()
        assert machine.run_state == "running"
        assert (machine.epoch, machine.journal.last.ownership) == (4, "owner")


def build(settings, plugins):
    machine = Machine("heat", settings=settings, plugins=plugins)
    plate = machine.ram.array("plate", (4, 1024), "uint32")
    ran = threading.Event()
    machine.guest = LoopGuest(ran.set, power_on=lambda: plate.fill(7))
    machine.plate, machine.ran = plate, ran
    return machine


@pytest.fixture
def pair(make_pair, tmp_path):
    settings = Settings()
    settings.limits.handover_timeout = 0.5
    pair = make_pair(build, handover="auto", uri="tcp:127.0.0.1:0", settings=settings)
    pair.source.keep_journal(tmp_path / "here")
    pair.destination.keep_journal(tmp_path / "there")
    pair.source.start()
    return pair


def test_a_source_that_crashes_in_the_blackout_is_saved_by_its_destination(pair, tmp_path, monkeypatch):
    """It froze, the destination is prepared, and the source's process is gone before it could say COMMIT."""
    from whimbrel.migration import deals

    gone = threading.Event()

    def crash(self, error=None):
        self._link.channel.close()
        gone.set()
        raise SystemExit  # what is left of the source's process knows nothing more

    frozen = tmp_path / "frozen"

    def prove(self):
        real_prove(self)
        frozen.write_bytes(pair.source.journal.path.read_bytes())
        crash(self)

    real_prove = deals.Pairwise.prove
    monkeypatch.setattr(deals.Pairwise, "prove", prove)
    monkeypatch.setattr(deals.Pairwise, "thawed", lambda self: None)  # nor tells anybody
    incoming, outgoing = pair.migrate()
    assert gone.wait(30)
    outgoing.join()
    with pytest.raises(TimeoutError):
        incoming.wait(0.3)
    assert incoming.ownership == "prepared"

    after = tmp_path / "after"
    after.mkdir(mode=0o700)
    (after / "heat.journal").write_bytes(frozen.read_bytes())
    with build(Settings(), pair.source.plugins) as restarted:
        standing = restarted.keep_journal(after)
        # The address that the destination listens at is in the journal.
        assert standing.verdict is Verdict.ASK
        assert incoming.uri in standing.sentence
        with pytest.raises(StateError, match="may hold it whole"):
            restarted.start()
        assert restarted.settle_standing(threading.Event()).verdict is Verdict.AWAY
        with pytest.raises(StateError, match="has moved to"):
            restarted.start()
    incoming.wait(30)
    assert pair.destination.run_state == "running"
    assert (pair.destination.plate == 7).all()


def test_a_destination_that_crashed_has_nothing_and_says_so(pair, tmp_path):
    """Its journal says LOADING and PREPARED: what it held is gone with it, and it has never run."""
    mid = new_mid()
    pair.destination.journal.append(record(mid=mid.hex(), role="destination", ownership="prepared"))
    for kind in (WordKind.COMMIT, WordKind.ABORT):
        assert answer_from(pair.destination.journal, Word(kind, mid, 1)).kind is WordKind.REFUSE
    pair.destination.journal.append(record(mid=mid.hex(), role="destination", ownership="owner", epoch=9))
    assert answer_from(pair.destination.journal, Word(WordKind.COMMIT, mid, 1)) == Word(WordKind.RUNNING, mid, 9)
    assert answer_from(pair.destination.journal, Word(WordKind.COMMIT, new_mid(), 1)).kind is WordKind.UNKNOWN


def heard(uri, word):
    """The answer to one word over a connection of its own."""
    host, port = uri.removeprefix("tcp:").rsplit(":", 1)
    with socket.create_connection((host, int(port)), 30) as link:
        link.settimeout(30)
        link.sendall(handover.encode(word))
        answer = link.recv(handover.SIZE, socket.MSG_WAITALL)
        return handover.decode(answer) if answer else None


def test_a_destination_that_is_back_answers_a_source_that_asks_still(opened, tmp_path, free_port):
    """At the address at which the machine arrived, until the source has heard it."""
    uri, mid = f"tcp:127.0.0.1:{free_port}", bytes.fromhex(MID)
    opened().append(record(role="destination", ownership="owner", peer=uri))
    opened().close()
    with Machine("heat") as machine:
        machine.ram.add("a", 4096)
        assert machine.keep_journal(tmp_path / "j").verdict is Verdict.LOST
        assert machine.settle_standing(threading.Event()).verdict is Verdict.LOST
        machine.start()
        assert heard(uri, Word(WordKind.COMMIT, bytes(16), 1)).kind is WordKind.UNKNOWN
        assert heard(uri, Word(WordKind.DONE, bytes(16), 1)) is None
        for _ in range(2):
            assert heard(uri, Word(WordKind.COMMIT, mid, 2)) == Word(WordKind.RUNNING, mid, 3)
        assert heard(uri, Word(WordKind.DONE, mid, 2)) is None
        machine._desk._thread.join(30)
        with pytest.raises(ConnectionRefusedError):
            heard(uri, Word(WordKind.COMMIT, mid, 2))


def test_a_destination_whose_address_is_taken_runs_all_the_same(opened, tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as other:
        opened().append(record(role="destination", ownership="owner", peer=f"tcp:127.0.0.1:{other.getsockname()[1]}"))
        opened().close()
        with Machine("heat") as machine:
            machine.ram.add("a", 4096)
            machine.keep_journal(tmp_path / "j")
            machine.settle_standing(threading.Event())
            machine.start()
            assert "cannot be answered" in caplog.text


WITNESSED = [
    ("source", "released", None, Verdict.LOST, "owner", 5),
    ("source", "released", "source", Verdict.LOST, "owner", 5),
    ("source", "released", "destination", Verdict.AWAY, "done", 3),
    ("destination", "prepared", None, Verdict.ELSEWHERE, "refused", 3),
    ("destination", "prepared", "source", Verdict.ELSEWHERE, "refused", 3),
    ("destination", "prepared", "destination", Verdict.LOST, "owner", 3),
]


@pytest.mark.parametrize(("role", "ownership", "claimed", "verdict", "written", "epoch"), WITNESSED)
def test_a_witness_says_behind_a_crash_whose_it_is(
    opened, tmp_path, role, ownership, claimed, verdict, written, epoch, free_port
):
    """Nobody who held it whole had not claimed it: a cell that is free goes to the source."""
    peer = f"tcp:127.0.0.1:{free_port}"
    opened().append(record(role=role, ownership=ownership, deal="witness", peer=peer))
    opened().close()
    place = tmp_path / "witness"
    place.mkdir()
    settings = Settings()
    with Machine("heat", settings=settings) as machine:
        machine.ram.add("a", 4096)
        machine.keep_journal(tmp_path / "j")
        with pytest.raises(StateError, match="has to be asked"):
            machine.start()
        with pytest.raises(ConfigError, match="none is named"):
            machine.settle_standing(threading.Event())
        settings.backends.witness = f"folder:{place}"
        witness = witness_of(settings, machine.plugins)
        if claimed:
            witness.claim(bytes.fromhex(MID), claimed, Patience(5.0))
        stopped = threading.Event()
        stopped.set()
        assert machine.settle_standing(stopped).must_ask
        assert machine.settle_standing(threading.Event()).verdict is verdict
        assert witness.read(bytes.fromhex(MID), Patience(5.0)) == (claimed or "source")
        witness.close()
        assert (machine.journal.last.ownership, machine.journal.last.epoch) == (written, epoch)
        if verdict is Verdict.LOST:
            machine.start()
            assert machine.epoch == epoch + 1
        else:
            with pytest.raises(StateError):
                machine.start()


def test_a_page_that_never_came_is_noticed(pair, monkeypatch):
    from whimbrel_savevm._ram_saver import RamSaver

    real = RamSaver._send_pages
    monkeypatch.setattr(
        RamSaver, "_send_pages", lambda self, out, tracked, indices: real(self, out, tracked, indices[1:])
    )
    _, outgoing = pair.run()
    assert outgoing.status == "failed"
    assert "digest" in str(pair.destination.migration.error) or "pages" in str(pair.destination.migration.error)
    assert pair.source.run_state == "running"
