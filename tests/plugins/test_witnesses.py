"""The bundled witnesses: the conformance suite over each, and what is their own."""

import errno
import os
import sqlite3
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, WitnessError
from whimbrel.plugins import PluginManager
from whimbrel.testing.witnesses import WitnessConformance
from whimbrel.witness import CELL_MAX, cell, meeting, owner
from whimbrel_witnesses.folder import FolderWitness
from whimbrel_witnesses.sql import SqlWitness

MID = bytes(range(16))


def patience():
    return Patience(20)


class TestFolder(WitnessConformance):
    factory = "whimbrel_witnesses.folder:FolderWitness"

    def address(self, folder):
        return str(folder)

    def unreachable(self, folder):
        return str(folder / "not mounted")

    def read_only(self, folder):
        return "/proc/self/task"

    def spoil(self, address, mid, data):
        Path(address, f"{mid.hex()}.owner").write_bytes(data)


class TestSql(WitnessConformance):
    factory = "whimbrel_witnesses.sql:SqlWitness"
    modules = ("sqlite3", "posix")

    @pytest.mark.slow
    def test_a_claim_that_is_killed_leaves_its_cell_free_or_whole(self, tmp_path):
        super().test_a_claim_that_is_killed_leaves_its_cell_free_or_whole(tmp_path)

    @pytest.mark.slow
    def test_a_claim_whose_call_fails_raises_or_tells_the_truth(self, tmp_path):
        super().test_a_claim_whose_call_fails_raises_or_tells_the_truth(tmp_path)

    def address(self, folder):
        return f"sqlite:///{folder}/witness.db"

    def unreachable(self, folder):
        return f"sqlite:///{folder}/not mounted/witness.db"

    def read_only(self, folder):
        witness = SqlWitness(self.address(folder))
        witness.probe(patience())
        witness.close()
        return f"sqlite:///file:{folder}/witness.db?mode=ro&uri=true"

    def spoil(self, address, mid, data):
        with sqlite3.connect(address.removeprefix("sqlite:///")) as database:
            database.execute("INSERT INTO whimbrel_witness VALUES (?, ?)", (mid.hex(), data))
        database.close()


# ----------------------------------------------------------------------------------------------------- the cell


def test_a_cell_is_one_line():
    assert cell(MID, "source") == b"whimbrel 000102030405060708090a0b0c0d0e0f source 083e03dc\n"
    assert owner(MID, cell(MID, "source"), "here") == "source"
    assert meeting(MID).hex() == "38f262c9fa0fc150f2c1a788e6d3220f"
    assert len(cell(MID, "a" * 64)) <= CELL_MAX


@given(st.integers(0, 70), st.integers(1, 255))
def test_a_cell_with_a_flipped_bit_is_nobodys(at, bits):
    data = bytearray(cell(MID, "source"))
    data[at % len(data)] ^= bits
    with pytest.raises(WitnessError, match="the cell of attempt 000102"):
        owner(MID, bytes(data), "here")


@given(st.binary(max_size=300))
def test_what_is_not_a_cell_is_nobodys(data):
    with pytest.raises(WitnessError):
        owner(MID, data, "here")


# ----------------------------------------------------------------------------------------------------- the offer


def test_both_are_offered():
    manager = PluginManager()
    assert [spec.name for spec in manager.witnesses()] == ["folder", "sql"]
    assert isinstance(manager.witness("folder").create("/mnt"), FolderWitness)
    rows = {row.name: row for row in manager.catalogue()}
    assert [(rows[name].kinds, rows[name].offers) for name in ("folder", "sql")] == [
        (("witness",), ("folder",)),
        (("witness",), ("sql",)),
    ]


@pytest.mark.parametrize("path", ["", "relative", "./x", "/a\0b"])
def test_a_folder_is_named_by_its_absolute_path(path):
    with pytest.raises(ConfigError, match="absolute path"):
        FolderWitness(path)


@pytest.mark.parametrize("url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "sqlite:///relative.db",
                                 "sqlite:///file:x?mode=memory&uri=true", "nosuch://u:secret@h/d"])  # fmt: skip
def test_an_url_that_cannot_be_shared_is_refused_and_no_password_told(url):
    with pytest.raises(ConfigError) as caught:
        SqlWitness(url)
    assert "secret" not in str(caught.value)


def test_a_database_needs_sqlalchemy(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    assert PluginManager().witness("sql").name == "sql"
    with pytest.raises(ConfigError, match=r"whimbrel\[sql\]"):
        SqlWitness("sqlite:////mnt/w.db")


# ------------------------------------------------------------------------------------- what only a folder has


@pytest.mark.parametrize("first", [None, "destination"])
def test_a_link_whose_answer_was_lost_was_made(tmp_path, monkeypatch, first):
    """As over NFS: the server linked it, and the retry of the client finds it there."""
    witness, link = FolderWitness(str(tmp_path)), os.link
    if first is not None:
        witness.claim(MID, first, patience())

    def twice(*args, **kwargs):
        link(*args, **kwargs)
        link(*args, **kwargs)

    monkeypatch.setattr(os, "link", twice)
    assert witness.claim(MID, "source", patience()) == (first or "source")


def test_a_file_system_without_links_is_found_by_the_probe(tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    with pytest.raises(WitnessError, match=r"cannot be probed: Operation not permitted; see that it is mounted"):
        FolderWitness(str(tmp_path)).probe(patience())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_the_second_writer_wins_is_found_by_the_probe(tmp_path, monkeypatch):
    def replaces(new, name, *, src_dir_fd, dst_dir_fd, follow_symlinks):
        (tmp_path / name).write_bytes((tmp_path / new).read_bytes())

    monkeypatch.setattr(os, "link", replaces)
    with pytest.raises(WitnessError, match="lets the second of two writers win"):
        FolderWitness(str(tmp_path)).probe(patience())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_cell_that_is_no_file_is_an_error(tmp_path, kind):
    path = tmp_path / f"{MID.hex()}.owner"
    other = tmp_path / "other"
    other.write_bytes(cell(MID, "destination"))
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(other)}[kind]()
    witness = FolderWitness(str(tmp_path))
    with pytest.raises(WitnessError):
        witness.read(MID, patience())
    with pytest.raises(WitnessError):
        witness.claim(MID, "source", patience())


def test_a_folder_that_answers_late_keeps_nobody_waiting_and_no_second_thread(tmp_path, monkeypatch):
    """As a mount whose server is gone: the call that was given up is waited for before the next."""
    answers, real, calls = threading.Event(), os.fsync, []

    def hangs(fd):
        calls.append(fd)
        answers.wait(20)
        real(fd)

    monkeypatch.setattr(os, "fsync", hangs)
    witness = FolderWitness(str(tmp_path))
    for _ in range(3):
        with pytest.raises(WitnessError, match=r"no answer within .* while the witness in the folder"):
            witness.claim(MID, "source", Patience(0.01))
    assert len(calls) == 1
    answers.set()
    assert witness.claim(MID, "destination", patience()) == "source"  # the one that was given up took effect
