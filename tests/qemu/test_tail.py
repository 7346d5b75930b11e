"""The device sections of real machines: split in each way with one result, and decoded to the last byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from whimbrel.wire import description, fields
from whimbrel.wire.description import Description
from whimbrel.wire.skeleton import Element, SectionHeader
from whimbrel.wire.tail import (
    DeviceSection,
    FooterWalk,
    Split,
    section_at,
    split_by_description,
    split_by_footers,
    split_by_headers,
)

from .peer import Qemu, capture

VIRTIO = [
    "blk-pci,drive=d0",
    "net-pci,netdev=n0",
    "rng-pci",
    "balloon-pci",
    "scsi-pci",
    "serial-pci",
    "gpu-pci",
    "iommu-pci",
]
DISK = "if=none,file=null-co://,file.size=1M,format=raw"


def options(*devices: str, rest: str = "") -> list[str]:
    return [word for device in devices for word in ("-device", device)] + rest.split()


MACHINES: dict[str, tuple[str, list[str]]] = {
    "pc": ("pc", options("VGA", "e1000", "piix3-usb-uhci", "usb-tablet", "rtl8139", "lsi53c895a", "i6300esb")),
    "q35": (
        "q35",
        options(
            *(f"virtio-{device}" for device in VIRTIO),
            *("scsi-hd,drive=d1", "virtserialport,chardev=c0", "e1000e", "qemu-xhci", "usb-kbd", "intel-hda"),
            *("ich9-ahci", "pcie-root-port,chassis=3", "usb-ehci", "VGA", "vmgenid"),
            rest=f"-drive {DISK},id=d0 -drive {DISK},id=d1 -netdev user,id=n0 -chardev null,id=c0 -smp 2",
        ),
    ),
    "isapc": ("isapc", options("isa-vga")),
    "microvm": ("microvm", options("virtio-net-device", "virtio-rng-device")),
    "no description": ("q35,suppress-vmdesc=on", options("VGA")),
    "2.4": ("pc-i440fx-2.4", options("VGA", "virtio-net-pci")),
    "2.3": ("pc-i440fx-2.3", options("VGA", "e1000", "virtio-net-pci")),
    "2.2": ("pc-i440fx-2.2", options("VGA", "e1000", "virtio-net-pci")),
}
NO_FOOTERS = {"2.3", "2.2"}
NO_DESCRIPTION = {"no description", "2.2"}


@pytest.fixture(scope="module", params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stream(real_qemu: None, machine: str) -> bytes:
    type_, extra = MACHINES[machine]
    with Qemu(16, machine=type_, stopped=True, extra=extra) as source:
        return capture(source)


@pytest.fixture(scope="module")
def tail(stream: bytes) -> bytes:
    """From the first FULL section on: that of `timer`, or of a device that is saved before its turn."""
    found = description.find(stream)
    first: Mapping[str, Any] = found.description.devices[0] if found else {"name": "timer", "instance_id": 0}
    name = first["name"].encode()
    header = bytes([len(name)]) + name + first["instance_id"].to_bytes(4, "big")
    return stream[stream.rindex(header, 0, found.eof_offset if found else len(stream)) - 5 :]


def plain(sections: tuple[DeviceSection, ...]) -> list[tuple[SectionHeader, bytes, int]]:
    return [(each.header, each.body, each.offset) for each in sections]


def checked(split: Split, tail: bytes, said: Description | None) -> list[tuple[SectionHeader, bytes, int]]:
    assert split.error is None
    assert tail[split.end] == Element.EOF
    if said:
        names = [(each.header.idstr, each.header.instance_id) for each in split.sections]
        assert names == [(each["name"], each["instance_id"]) for each in said.devices]
    return plain(split.sections)


def heads(shown: Any) -> int:
    """Bytes of the heads of all subsections in a decoded device: mark, name, version."""
    if isinstance(shown, list):
        return sum(map(heads, shown))
    if not isinstance(shown, dict):
        return 0
    own = sum(1 + 1 + len(part["vmsd_name"]) + 4 for part in shown.get("subsections", ()))
    return own + sum(map(heads, shown.values()))


def test_every_way_to_split_gives_the_same(machine: str, tail: bytes) -> None:
    found = description.find(tail)
    said = found.description if found else None
    assert (said is None) == (machine in NO_DESCRIPTION)
    end = found.eof_offset if found else len(tail) - 1
    results = []
    if said:
        results.append(checked(split_by_description(tail, said, footers=machine not in NO_FOOTERS), tail, said))
    if machine in NO_FOOTERS:
        guess = split_by_headers(tail[: end + 1])
        assert guess.guessed
        results.append(checked(guess, tail, said))
    else:
        results.append(checked(split_by_footers(tail), tail, said))
        results.append(checked(split_by_footers(tail[:end]) if said else split_by_footers(tail), tail, said))
    assert all(result == results[0] for result in results)
    footer = 0 if machine in NO_FOOTERS else 5
    sections = results[0]
    offsets = [offset for _, _, offset in sections]
    for (header, body, offset), following in zip(sections, [*offsets[1:], end], strict=True):
        assert offset + 14 + len(header.idstr) + len(body) + footer == following, "a byte belongs to nobody"


def test_every_device_is_decoded_to_the_last_byte(machine: str, tail: bytes) -> None:
    found = description.find(tail)
    if found is None:
        assert machine in NO_DESCRIPTION
        return
    assert found.end == len(tail)
    devices = split_by_description(tail, found.description, footers=machine not in NO_FOOTERS).sections
    for section in devices:
        assert section.described is not None
        decoded = fields.decode(section.described, section.body)
        assert decoded.name == section.header.idstr
        shown = decoded.as_dict()
        json.dumps(shown, allow_nan=False)
        covered = sum(leaf.size for _, leaf in decoded.leaves())
        assert covered + heads(shown) == len(section.body), "a byte belongs to nobody"
    (processor, *_) = [section for section in devices if section.header.idstr == "cpu"]
    values: dict[str, Any] = {
        path: leaf.value for path, leaf in fields.decode(processor.described or {}, processor.body).leaves()
    }
    assert values["env.eip"] == 0xFFF0, "it has not run"
    assert values["env.regs"][2] != 0, "EDX has the processor's signature"
    assert values["env.cr[0]"] & 1 == 0, "it begins in real mode"


def test_as_it_comes(machine: str, tail: bytes) -> None:
    """In pieces of all sizes, with a source that waits for an answer behind the devices."""
    if machine in NO_FOOTERS:
        return
    whole = split_by_footers(tail)
    ping = bytes.fromhex("08 0002 0004 cafecafe")
    live = tail[: whole.end] + ping
    for size in (1, 7, 4096, len(live)):
        walk, taken = FooterWalk(), bytearray()
        pieces = [live[at : at + size] for at in range(0, len(live), size)]
        if size == 1:
            # Byte by byte where it matters: about the end of each section.
            taken += live[: whole.sections[-1].offset]
            pieces = [live[at : at + 1] for at in range(len(taken), len(live))]
        behind = walk.feed(taken)
        for piece in pieces:
            assert behind is None
            taken += piece
            behind = walk.feed(taken)
        assert behind is not None
        assert behind.element is Element.COMMAND
        assert plain(tuple(section_at(taken, span) for span in walk.spans)) == plain(whole.sections)
