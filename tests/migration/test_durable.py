"""What a handover with journals makes durable while nobody runs, counted at the system call."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from whimbrel.abc import Guest
from whimbrel.errors import JournalError


class Noting(Guest):
    """Says when it stops and starts."""

    def __init__(self, name, log) -> None:
        self._name, self._log = name, log

    def power_on(self) -> None:
        """It has nothing to prepare."""

    def start(self) -> None:
        self._log.append(f"{self._name} runs")

    def stop(self) -> None:
        self._log.append(f"{self._name} stands")


@pytest.fixture
def happened(make_pair, churning, tmp_path, monkeypatch):
    """What came in which order; who waits for the disk is known by his thread."""
    log = []
    pair = make_pair(churning({"a": 4}), handover="auto", uri="tcp:127.0.0.1:0")
    pair.source.guest, pair.destination.guest = Noting("source", log), Noting("destination", log)
    pair.source.keep_journal(tmp_path / "here")
    pair.destination.keep_journal(tmp_path / "there")
    pair.source.start()
    for call in ("fsync", "fdatasync"):
        real = getattr(os, call)

        def noting(fd, real=real, call=call):
            journal = str(Path(f"/proc/self/fd/{fd}").readlink())
            assert str(tmp_path) in journal
            side = "source" if "/here" in journal else "destination"
            beside = " beside" if threading.current_thread().name == "whimbrel-journal" else ""
            log.append(f"{side} {call}{beside}")
            real(fd)

        monkeypatch.setattr(os, call, noting)
    _, outgoing = pair.run()
    assert outgoing.status == "completed"
    return log


def test_between_stop_and_start_two_records_are_waited_for(happened):
    """RELEASED and OWNER. FROZEN and LOADING are made durable beside the sending and the loading of the rest."""
    between = happened[happened.index("source stands") + 1 : happened.index("destination runs")]
    assert [each for each in between if "beside" not in each] == ["source fdatasync", "destination fdatasync"]
    assert "source fdatasync beside" in between
    assert sorted(each for each in happened if "beside" in each) == [
        "destination fdatasync beside",
        "source fdatasync beside",
    ]


def test_whoever_is_prepared_has_written_down_durably_that_it_was_loading(happened):
    before = happened[: happened.index("source fdatasync")]  # which is RELEASED, behind the proof
    assert "destination fdatasync beside" in before


@pytest.mark.parametrize("how", ["qemu", "proof", "auto"])
def test_a_source_whose_stop_could_not_be_made_durable_does_not_let_go(make_pair, churning, tmp_path, monkeypatch, how):
    """What the disk refuses is refused once: a later call that succeeds says nothing of it."""
    pair = make_pair(churning({"a": 4}), handover=how, uri="tcp:127.0.0.1:0")
    pair.source.keep_journal(tmp_path / "here")
    pair.source.start()
    real, refused = os.fdatasync, threading.Event()

    def refusing(fd):
        if threading.current_thread().name == "whimbrel-journal":
            refused.set()
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fdatasync", refusing)
    incoming, outgoing = pair.run()
    assert refused.is_set()
    assert isinstance(outgoing.error, JournalError)
    assert pair.source.run_state == "running"
    assert pair.source.journal.last.ownership == "owner"
    assert incoming.ownership != "owner"
