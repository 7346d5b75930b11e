"""A file as a channel: what can be opened, and in what words it is said what cannot."""

import os

import pytest

from whimbrel.capture.files import open_stream
from whimbrel.errors import ConfigError, ConnectError, UnknownNameError
from whimbrel.migration.machine import manager_for
from whimbrel.settings import Settings


def opened(path):
    settings = Settings()
    return open_stream(path, settings, manager_for(settings))


def everything(channel):
    data, buffer = bytearray(), bytearray(7)
    while count := channel.recv_into(buffer):
        data += buffer[:count]
    channel.close()
    return bytes(data)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "stored"
    path.write_bytes(b"0123456789")
    return path


def test_a_file_as_path_and_as_text(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (stored, str(stored), "stored", "./stored"):
        channel = opened(path)
        assert channel.peer == f"file:{stored}"
        assert not channel.duplex
        assert everything(channel) == b"0123456789"


def test_a_link_is_followed(stored, tmp_path):
    (tmp_path / "link").symlink_to("stored")
    (tmp_path / "folder").symlink_to(tmp_path)
    assert everything(opened(tmp_path / "link")) == b"0123456789"
    assert everything(opened(tmp_path / "folder" / "link")) == b"0123456789"


def test_an_offset(stored):
    assert everything(opened(f"{stored},offset=4")) == b"456789"
    assert everything(opened(f"{stored},offset=0xa")) == b""
    with pytest.raises(ConfigError, match="has 10 bytes, so there is nothing at offset 11"):
        opened(f"{stored},offset=11")
    with pytest.raises(ConfigError, match="bad offset 'x'"):
        opened(f"{stored},offset=x")


def test_a_name_that_looks_like_an_offset(stored):
    odd = stored.with_name("stored,offset=4")
    odd.write_bytes(b"odd")
    with pytest.raises(ConfigError, match="cannot be told from an offset"):
        opened(odd)


def test_what_is_not_there(tmp_path):
    for path in (tmp_path / "none", tmp_path / "no" / "folder", f"{tmp_path / 'none'},offset=3"):
        with pytest.raises(ConnectError) as caught:
            opened(path)
        named = str(path).partition(",")[0]
        assert str(caught.value) == f"{named!r} cannot be read: No such file or directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(stored):
    stored.chmod(0)
    with pytest.raises(ConnectError) as caught:
        opened(stored)
    assert str(caught.value) == f"{str(stored)!r} cannot be read: Permission denied"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match="is a folder, expected a file with a stream in it"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="is no regular file"):
        opened(tmp_path / "pipe")
    with pytest.raises(ConnectError, match="cannot be read: Too many levels of symbolic links"):
        opened(tmp_path / "round")
    for path in ("a\0b", "\ud800"):
        with pytest.raises(ConfigError, match="names no file"):
            opened(path)
    with pytest.raises(ConnectError, match="cannot be read"):
        opened("")


def test_a_folder_that_is_none(stored):
    with pytest.raises(ConnectError, match="cannot be read: Not a directory"):
        opened(stored / "more")


def test_without_the_plugin(stored):
    settings = Settings()
    settings.plugins.disable = ["file"]
    with pytest.raises(UnknownNameError, match="unknown transport 'file'"):
        open_stream(stored, settings, manager_for(settings))
