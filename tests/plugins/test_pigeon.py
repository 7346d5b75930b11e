"""The example of a third party's plugin, held to the contract by the suite that ships."""

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from whimbrel.abc import Patience
from whimbrel.errors import ConfigError, ConnectError, MigrationCancelled
from whimbrel.plugins import PluginManager
from whimbrel.testing.transports import TransportConformance


@pytest.fixture(autouse=True, scope="module")
def source():
    """The plugin as its author has it, not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).with_name("whimbrel-pigeon") / "src")
        yield
        for name in [name for name in sys.modules if name.partition(".")[0] == "whimbrel_pigeon"]:
            patch.delitem(sys.modules, name)


def pigeons():
    from whimbrel_pigeon import PigeonTransport

    return PigeonTransport()


class TestPigeon(TransportConformance):
    bad_addresses = ("", "loft\0")

    def make(self):
        return pigeons()

    def address(self, tmp_path):
        return f"{tmp_path}/loft"


def test_it_is_a_plugin():
    import whimbrel_pigeon

    manager = PluginManager(load_entry_points=False)
    manager.register(whimbrel_pigeon, "pigeon")
    assert type(manager.transport("pigeon").create()) is type(pigeons())


def test_a_loft_is_its_owners_alone_and_gone_afterwards(tmp_path):
    loft = tmp_path / "loft"
    listener = pigeons().listen(str(loft))
    assert stat.S_IMODE(loft.stat().st_mode) == 0o700
    assert stat.S_ISFIFO((loft / "door").stat().st_mode)
    listener.close()
    assert not loft.exists()


def test_pipes_are_taken_away_once_both_ends_have_them(tmp_path):
    listener = pigeons().listen(str(tmp_path / "loft"))
    far = []
    accepting = threading.Thread(target=lambda: far.append(listener.accept(Patience(10))))
    accepting.start()
    near = pigeons().connect(str(tmp_path / "loft"), Patience(10))
    accepting.join()
    assert [path.name for path in (tmp_path / "loft").iterdir()] == ["door"]
    for made in (near, *far, listener):
        made.close()


def test_a_loft_that_was_left_behind_is_used_again(tmp_path):
    loft = tmp_path / "loft"
    loft.mkdir()
    os.mkfifo(loft / "door")
    with pytest.raises(ConnectError, match="nobody listens there"):
        pigeons().connect(str(loft), Patience(10))
    listener = pigeons().listen(str(loft))
    listener.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["loft", "loft/door"])
def test_what_is_no_loft_is_left_alone(tmp_path, what):
    precious = tmp_path / what
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises((ConfigError, ConnectError)):
        pigeons().listen(str(tmp_path / "loft"))
    with pytest.raises(ConnectError):
        pigeons().connect(str(tmp_path / "loft"), Patience(10))
    assert precious.read_text() == "precious"


def test_a_pigeon_that_nobody_lets_in_can_be_called_back(tmp_path):
    listener = pigeons().listen(str(tmp_path / "loft"))
    patience = Patience(10)
    timer = threading.Timer(0.05, patience.cancelled.set)
    timer.start()
    with pytest.raises(MigrationCancelled):
        pigeons().connect(str(tmp_path / "loft"), patience)
    timer.join()
    assert [path.name for path in (tmp_path / "loft").iterdir()] == ["door"]
    # It had knocked; whoever comes next is let in all the same.
    far = []
    accepting = threading.Thread(target=lambda: far.append(listener.accept(Patience(10))))
    accepting.start()
    near = pigeons().connect(str(tmp_path / "loft"), Patience(10))
    accepting.join()
    for made in (near, *far, listener):
        made.close()


def test_a_pigeon_that_waits_is_told_when_the_door_closes(tmp_path):
    listener = pigeons().listen(str(tmp_path / "loft"))
    timer = threading.Timer(0.05, listener.close)
    timer.start()
    with pytest.raises(ConnectError, match="nobody listens any more"):
        pigeons().connect(str(tmp_path / "loft"), Patience(10))
    timer.join()


def test_a_pigeon_that_dies_on_the_threshold_is_forgotten(tmp_path):
    """It has made its pipes and knocked, and is never heard of again."""
    loft = tmp_path / "loft"
    listener = pigeons().listen(str(loft))
    for name in ("a" * 32, "b" * 32):
        for way in ("there", "back"):
            os.mkfifo(loft / f"{name}.{way}")
    reader = os.open(loft / f"{'a' * 32}.back", os.O_RDONLY | os.O_NONBLOCK)
    (loft / "door").write_bytes(b"a" * 32 + b"b" * 32 + b"not the name of any pigeon......")
    with pytest.raises(ConnectError, match="no answer within"):
        listener.accept(Patience(1.2))
    os.close(reader)
    listener.close()
