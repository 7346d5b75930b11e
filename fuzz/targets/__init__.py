"""All targets, by their names."""

from __future__ import annotations

from typing import Final

from fuzz.target import Target
from fuzz.targets.pages import Changes, Packets, Payloads, Records
from fuzz.targets.parts import Description, Devices, Drives, Words
from fuzz.targets.people import Monitor, Uris
from fuzz.targets.remote import Control
from fuzz.targets.streams import Captured, Stream

TARGETS: Final[dict[str, type[Target]]] = {
    target.name: target
    for target in (
        Stream, Captured, Records, Changes, Packets, Payloads, Devices, Words, Description, Drives, Uris, Monitor,
        Control,
    )
}  # fmt: skip
