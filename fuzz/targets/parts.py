"""Parts of a stream: devices by their descriptions, drives, words between sections, and the description."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fuzz import machines
from fuzz.target import MIB, Target, expect
from whimbrel import Settings, vmstate
from whimbrel.abc import Parser, SectionKind
from whimbrel.errors import ChannelError, ProtocolError
from whimbrel.machine import BareMachine, RawImage
from whimbrel.machine.drives.marker import SUFFIX
from whimbrel.stream import Reader, Replay
from whimbrel.wire import block as blocks
from whimbrel.wire import commands, description, fields, return_path, skeleton
from whimbrel.wire.primitives import U32
from whimbrel_savevm.block import BlockHandler


class Devices(Target):
    """A device's version, and its body."""

    name = "vmstate"
    longest = 2048

    def seeds(self) -> Iterable[bytes]:
        """Bodies of a device with values, and without."""
        for device in (machines.rich(), machines.Rich()):
            body, _ = vmstate.save(machines.RICH, device)
            for version in (3, 2):
                yield bytes((version,)) + bytes(body) + b"\x7e"

    def try_one(self, data: bytes) -> str:
        """Parse, apply, and take back."""
        device = machines.Rich()
        try:
            loaded = Reader(Replay(data[1:])).parse(vmstate.parse(machines.RICH, data[0] if data else 0, device))
            expect(device == machines.Rich(), "the device was touched by parsing")
            undo = vmstate.apply(loaded, device)
        except (ProtocolError, ChannelError) as exc:
            expect(device == machines.Rich(), "the device was touched by what was refused")
            return exc.code
        expect(0 <= device.small <= 99, "small is out of range")
        expect(len(device.items) == device.count <= 6, "items are not as many as count says")
        expect(len(device.blob) == device.size <= 64, "blob is not as long as size says")
        expect(len(device.many) == device.members <= 3, "many are not as many as members says")
        expect((len(device.fixed), device.ports) == (3, 4), "what never changes has changed")
        expect(not undo(), "it cannot be taken back")
        expect(device == machines.Rich(), "the device is not as it was")
        return "applied"


_EACH_KIND: Final = list(SectionKind)
_LATER: Final = (SectionKind.PART, SectionKind.END)


class Words(Target):
    """What stands between and around bodies: which of them, and its bytes. What has an encoder is written again."""

    name = "words"
    longest = 1024

    def __init__(self) -> None:
        self._parsers: list[tuple[Callable[[], Parser[Any]], Callable[[Any], bytes] | None]] = [
            (skeleton.parse_header, None),
            (skeleton.parse_element, None),
            (skeleton.parse_configuration, None),
            (commands.parse_command, lambda command: commands.encode(command)[1:]),
            (return_path.parse_message, return_path.encode),
            *((self._head(kind), self._written(kind)) for kind in _EACH_KIND),
            (lambda: skeleton.parse_section_footer(5), None),
            (lambda: description.parse_and_skip(256), None),
            (blocks.parse_record, None),
        ]

    @staticmethod
    def _head(kind: SectionKind) -> Callable[[], Parser[Any]]:
        return lambda: skeleton.parse_section_header(kind)

    @staticmethod
    def _written(kind: SectionKind) -> Callable[[Any], bytes] | None:
        if kind in (SectionKind.PART, SectionKind.END):
            return U32.pack
        return lambda header: skeleton.section_header(kind, header)[1:]

    def seeds(self) -> Iterable[bytes]:
        """Each of them."""
        named = skeleton.section_header(
            SectionKind.FULL, skeleton.SectionHeader(5, "rich", 0, 3)
        )[1:]  # fmt: skip
        config = skeleton.Configuration("tiny", ("a", "b"), bytes(range(16)))
        samples = [
            skeleton.HEADER, b"\4", skeleton.configuration(config)[1:] + b"\1",
            commands.encode(commands.Ping(7))[1:], return_path.encode(return_path.Shut(1)),
            *(named if kind in (SectionKind.START, SectionKind.FULL) else U32.pack(5) for kind in _EACH_KIND),
            skeleton.section_footer(5), description.frame(b"{}"), blocks.chunk("disk", 1),
        ]  # fmt: skip
        for number, sample in enumerate(samples):
            yield bytes((number,)) + sample
        yield b"\x03" + commands.encode(commands.OpenReturnPath())[1:]
        yield b"\x04" + return_path.encode(return_path.Pong(9))

    def try_one(self, data: bytes) -> str:
        """Parse it, and write it again."""
        make, encode = self._parsers[data[0] % len(self._parsers) if data else 0]
        reader = Reader(Replay(data[1:]), capacity=1 << 17)
        try:
            value = reader.parse(make())
        except (ProtocolError, ChannelError) as exc:
            return exc.code
        if encode is not None:
            expect(encode(value) == data[1 : 1 + reader.offset], "it is written otherwise than it was read")
        return "parsed"


class Description(Target):
    """The JSON behind a stream, and behind a zero byte a body that its first device has."""

    name = "description"
    longest = 1 << 15
    room = 8 * MIB

    def seeds(self) -> Iterable[bytes]:
        """The description of the machine, with the body of its device."""
        for device in (machines.rich(), machines.Rich()):
            body, entry = vmstate.save(machines.RICH, device)
            text = description.encode([{"name": "rich", "instance_id": 0, **entry}], page_size=4096)[5:]
            yield text + b"\0" + bytes(body)
        yield b'{"page_size": 4096, "devices": []}\0'

    def try_one(self, data: bytes) -> str:
        """Parse it, decode the body by it, and look for it among other bytes."""
        text, _, body = data.partition(b"\0")
        description.find(b"\0" + description.frame(text) + body)
        description.find(data)
        try:
            parsed = description.parse(text)
        except ProtocolError as exc:
            return exc.code
        outcome = "parsed"
        for device in parsed.devices[:2]:
            with suppress(ProtocolError):
                decoded = fields.decode(device, body)
                expect(sum(field.size for field in decoded.fields) <= len(body), "it has more bytes than there are")
                decoded.as_dict()
                list(decoded.leaves())
                outcome = "decoded"
        return outcome


class Drives(Target):
    """Bodies of the block section, each behind a byte that says which; chunks beyond the last byte are zeros."""

    name = "block"
    longest = 4096
    room = 16 * MIB
    sizes: Final = {"disk": 3 * MIB // 2, "other": MIB}

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        quick = shared.is_dir() and os.access(shared, os.W_OK)
        self._folder = tempfile.TemporaryDirectory(dir=shared if quick else None)
        self._paths = {name: Path(self._folder.name) / name for name in self.sizes}
        self._machine = BareMachine("drives", settings=Settings())
        for name, path in self._paths.items():
            with path.open("wb") as file:
                file.truncate(self.sizes[name])
            self._machine.drives.add(name, RawImage(path))
        self._machine.expect_arrival()

    def seeds(self) -> Iterable[bytes]:
        """A START, PARTs with chunks of both drives, and an END."""
        chunks = blocks.chunk("disk", 0, zero=True) + blocks.chunk("other", 0, zero=True) + blocks.progress(50)
        end = blocks.EOS_RECORD
        yield b"\0" + end + b"\0" + chunks + end + b"\1" + blocks.chunk("disk", 1, zero=True) + end
        yield b"\0" + end + b"\1" + blocks.progress(100) + end
        yield b"\0" + end + b"\0" + blocks.chunk("disk", 1)

    def try_one(self, data: bytes) -> str:
        """Load them, and let the images go."""
        reader = Reader(Replay(data + bytes(MIB)), capacity=1 << 16)
        handler = BlockHandler(self._machine)
        bodies = 0
        try:
            while reader.offset < len(data) and bodies < 64:
                # Order is the loader's business: a START is first, and only first.
                which = reader.window(1)[0]
                reader.advance(1)
                kind = _LATER[which % 2] if bodies else SectionKind.START
                handler.load(reader, kind, blocks.VERSION_ID)
                bodies += 1
            handler.commit()
            outcome = "loaded"
        except (ProtocolError, ChannelError) as exc:
            outcome = exc.code
        finally:
            handler.rollback()
            handler.finish()
        for name, path in self._paths.items():
            expect(path.stat().st_size == self.sizes[name], "an image has another size")
            # What was written into stays marked, as it must; the next input begins with a whole one.
            path.with_name(path.name + SUFFIX).unlink(missing_ok=True)
        return outcome

    def close(self) -> None:
        """Close the machine and remove the images."""
        self._machine.close()
        self._folder.cleanup()
