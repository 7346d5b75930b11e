"""The small machine that streams are loaded into, and streams of it that were recorded from migrations."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import attrs
import numpy as np

from whimbrel import Machine, PluginManager, Settings, vmstate
from whimbrel.machine.dirty import plugin as trackers
from whimbrel.testing.pair import Pair
from whimbrel_codecs import xbzrle, zlib, zstd
from whimbrel_savevm import block, devices, ram

PAGE: Final = 4096
BLOCKS: Final = {"a": 3 * PAGE, "b": 4 * PAGE}


@attrs.define
class Inner:
    """A struct within a device."""

    x: int = 0
    y: float = 0.0


@attrs.define
class Rich:
    """A device with a field of every kind."""

    small: int = 0
    flag: bool = False
    count: int = 0
    items: list[int] = attrs.field(factory=list)
    size: int = 0
    blob: bytes = b""
    fixed: bytes = bytes(3)
    inner: Inner = attrs.field(factory=Inner)
    many: list[Inner] = attrs.field(factory=list)
    members: int = 0
    ports: int = 4
    extra: int = 0


INNER: Final = vmstate.VMStateDescription("inner", 1, fields=[vmstate.int32("x"), vmstate.float64("y")])
EXTRA: Final = vmstate.VMStateDescription(
    "rich/extra", 1, fields=[vmstate.uint32("extra", high=9)], needed=lambda rich: rich.extra > 0
)
RICH: Final = vmstate.VMStateDescription(
    "rich",
    3,
    minimum_version_id=2,
    fields=[
        vmstate.uint8("small", low=0, high=99),
        vmstate.bool_("flag"),
        vmstate.uint32("count", high=6),
        vmstate.uint16("items", count="count", maximum=6),
        vmstate.uint32("size"),
        vmstate.buffer("blob", count="size", maximum=64),
        vmstate.buffer("fixed", size=3),
        vmstate.struct("inner", INNER),
        vmstate.uint32("members"),
        vmstate.struct("many", INNER, count="members", maximum=3, factory=Inner),
        vmstate.uint8("ports", equal=True),
    ],
    subsections=[EXTRA],
)


def build(settings: Settings, plugins: PluginManager) -> Machine:
    """The machine, empty."""
    machine = Machine("tiny", settings=settings, plugins=plugins)
    for name, size in BLOCKS.items():
        machine.ram.add(name, size)
    machine.devices.add("rich", Rich(), RICH)
    return machine


def rich() -> Rich:
    """Its device, with values."""
    return Rich(
        small=77, flag=True, count=2, items=[1, 65535], size=5, blob=b"hello", fixed=b"xyz", inner=Inner(-5, 2.5),
        many=[Inner(1, 1.0), Inner(2, -0.0)], members=2, extra=7,
    )  # fmt: skip


def plugins() -> PluginManager:
    """What the machine needs, and nothing that leads out of the process."""
    manager = PluginManager(load_entry_points=False)
    for plugin in (trackers, ram, block, devices, xbzrle, zlib, zstd):
        manager.register(plugin)
    return manager


@cache
def streams() -> tuple[bytes, ...]:
    """Streams of the machine, each as it went from a source to a destination that took it."""
    return tuple(_recorded(duplex=duplex, values=values) for duplex in (True, False) for values in (True, False))


def _recorded(*, duplex: bool, values: bool) -> bytes:
    settings = Settings()
    settings.backends.dirty_tracker = "manual"

    def filled(**named: Any) -> Machine:
        machine = build(**named)
        if values and not made:
            machine.ram["b"].view[PAGE : 2 * PAGE] = np.random.default_rng(3).integers(1, 255, PAGE, np.uint8)
            for name, value in attrs.asdict(rich(), recurse=False).items():
                setattr(device_of(machine), name, value)
        made.append(machine)
        return machine

    made: list[Machine] = []
    with Pair(filled, settings=settings, duplex=duplex) as pair:
        pair.source.start()
        pair.source.stop()
        incoming, outgoing = pair.run()
        assert incoming.error is None
        assert outgoing.error is None
        assert pair.recorded is not None
        return bytes(pair.recorded.sent)


def device_of(machine: Machine) -> Rich:
    """The machine's device."""
    device = machine.devices["rich"].obj
    assert isinstance(device, Rich)
    return device
