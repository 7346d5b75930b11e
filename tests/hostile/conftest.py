"""What the tests of hostile input share: bytes to a machine, and how much memory they made us take."""

from __future__ import annotations

import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from whimbrel import Settings
from whimbrel.abc import SectionKind
from whimbrel.errors import MigrationError
from whimbrel.migration.loader import StreamLoader
from whimbrel.stream import Reader, Replay
from whimbrel.wire import ram, skeleton

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # `fuzz` is no package of the wheel

from fuzz import machines  # noqa: E402 - the line above is what finds it

PAGE = 4096
BLOCKS = [ram.ListedBlock(name, size) for name, size in machines.BLOCKS.items()]


class Loading:
    """One machine, into which stream after stream is loaded."""

    def __init__(self):
        self.machine = machines.build(Settings(), machines.plugins())
        self.machine.expect_arrival()

    def load(self, data):
        """Load `data` and put the machine back; returns the error, or None."""
        registry, _ = self.machine._register()
        loader = StreamLoader(
            self.machine, registry, Reader(Replay(data)), lambda message: None, on_prepared=lambda: None
        )
        try:
            loader.load_header()
            loader.load()
            loader.load_description()
        except MigrationError as exc:
            return exc
        finally:
            loader.rollback()
            registry.finish()
        return None

    def refuses(self, data, kind, words):
        """Loading `data` fails so, and the machine is as it was."""
        error = self.load(data)
        assert type(error) is kind, repr(error)
        assert words in str(error)
        assert not any(block.view.any() for block in self.machine.ram)
        assert machines.device_of(self.machine) == machines.Rich()
        return error


@pytest.fixture
def loading():
    loading = Loading()
    yield loading
    loading.machine.close()


def head(*elements, name="tiny"):
    """A stream's beginning, and what follows."""
    return skeleton.HEADER + skeleton.configuration(skeleton.Configuration(name)) + b"".join(elements)


def section(kind, body, *, number=1, name="ram", instance=0, version=4):
    """A section with its footer."""
    header = skeleton.SectionHeader(number, name, instance, version)
    return skeleton.section_header(kind, header) + body + skeleton.section_footer(number)


def ram_start(blocks=BLOCKS, eos=ram.EOS_RECORD):
    return section(SectionKind.START, ram.block_list(blocks) + eos)


def ram_part(body):
    return section(SectionKind.PART, body + ram.EOS_RECORD)


def word(value):
    return value.to_bytes(8, "big")


def fed(parser, data):
    """What a parser makes of `data`."""
    return Reader(Replay(data)).parse(parser)


@contextmanager
def at_most(size):
    """Within, no more than so many bytes are taken."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= size
    finally:
        tracemalloc.stop()
