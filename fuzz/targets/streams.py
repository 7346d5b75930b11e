"""Whole streams: into the machine they are of (`stream`), and into none (`capture`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import attrs

from fuzz import machines
from fuzz.target import MIB, Target, expect
from whimbrel import Settings
from whimbrel.capture.taking import Capture
from whimbrel.errors import ChannelError, ProtocolError
from whimbrel.migration.loader import StreamLoader
from whimbrel.stream import Reader, Replay


class Stream(Target):
    """The loader of a destination. After each input the machine is as it was, and takes the next."""

    name = "stream"

    def __init__(self) -> None:
        self._machine = machines.build(Settings(), machines.plugins())
        self._machine.expect_arrival()

    def seeds(self) -> Iterable[bytes]:
        """Recorded streams."""
        return machines.streams()

    def try_one(self, data: bytes) -> str:
        """Load, look, and put everything back."""
        registry, _ = self._machine._register()
        loader = StreamLoader(
            self._machine,
            registry,
            Reader(Replay(data), capacity=1 << 14),
            lambda _: None,
            on_prepared=lambda: None,
        )
        try:
            loader.load_header()
            loader.load()
            outcome = "loaded"
            loader.load_description()
        except (ProtocolError, ChannelError) as exc:
            expect(exc.place.offset is not None, "an error does not say where")
            outcome = exc.code
        finally:
            loader.rollback()
            registry.finish()
        expect(not any(block.view.any() for block in self._machine.ram), "memory is not as it was")
        expect(self._device() == machines.Rich(), "a device is not as it was")
        return outcome

    def close(self) -> None:
        """Close the machine."""
        self._machine.close()

    def _device(self) -> machines.Rich:
        return attrs.evolve(machines.device_of(self._machine))


class Captured(Target):
    """A machine that is taken out of a stream without knowing its devices."""

    name = "capture"
    room = 8 * MIB
    _max_ram = 64 << 10

    def __init__(self) -> None:
        self._settings, self._plugins = Settings(), machines.plugins()

    def seeds(self) -> Iterable[bytes]:
        """Recorded streams; without their descriptions as well, and cut within them."""
        for stream in machines.streams():
            yield stream
            yield stream[: stream.rindex(b"\0\x06") + 1]
            yield stream[:-5]

    def try_one(self, data: bytes) -> str:
        """Take it, and look at all there is."""
        capture = Capture(Replay(data), settings=self._settings, plugins=self._plugins, max_ram=self._max_ram)
        try:
            machine = capture.run()
        except (ProtocolError, ChannelError) as exc:
            left = capture.machine
            expect(left is None or left.run_state == "shutdown", "a machine is left")
            return exc.code
        with machine:
            expect(machine.ram.total <= self._max_ram, "more memory than may be")
            for device in machine.captured:
                with suppress(ProtocolError):
                    device.decode().as_dict()
        return "taken"
