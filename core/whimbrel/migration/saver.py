"""Writes one machine's stream: what comes in which order, and in which form.

The mirror of `loader`. Knows no thread, socket or status; who calls it decides when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from whimbrel.abc import IterableHandler, SectionKind, Slice
from whimbrel.migration.digest import StreamDigest
from whimbrel.migration.savevm import Entry, Registry, write_section
from whimbrel.migration.turns import Turns
from whimbrel.stream import TappedWriter, Writer
from whimbrel.wire import commands, description, skeleton
from whimbrel.wire.commands import AnyCommand
from whimbrel.wire.form import Form

PAGE_SIZE: Final = 4096  # what the description tells; the wire format knows no other here

T = TypeVar("T")


class StreamSaver:
    """Saves a stream of the given form; one thread, one use. Methods are called in their order, `part` in rounds.

    All raise what the handlers and the writer raise, with the section's place.
    """

    def __init__(self, registry: Registry, form: Form, out: Writer) -> None:
        self._registry, self._form, self._out = registry, form, out
        self._described: list[Mapping[str, Any]] = []
        self._turns = Turns()
        self.digest = StreamDigest(registry)

    def header(self) -> None:
        """Write the file header and the configuration."""
        self._out.write(skeleton.HEADER)
        if self._form.configuration is not None:
            self._out.write(skeleton.configuration(self._form.configuration))

    def command(self, command: AnyCommand) -> None:
        """Write a command; between any two sections."""
        self._out.write(commands.encode(command))

    def start(self) -> None:
        """Write the START sections. The guest runs."""
        for entry, handler in self._registry.iterable:
            self._section(entry, SectionKind.START, partial(handler.save_start, self._out))

    def part(self, slice_: Slice) -> None:
        """Write PARTs of the handlers with anything pending, in turns, as far as the slice goes. The guest runs."""
        entries = {handler: entry for entry, handler in self._registry.iterable}
        while waiting := [handler for handler in entries if handler.pending()]:
            handler, turn = self._turns.next(waiting, slice_)
            self._section(entries[handler], SectionKind.PART, partial(handler.save_part, self._out, turn))
            self._turns.taken(handler, turn)
            if slice_.over():
                break

    def end(self, done: Callable[[IterableHandler], object]) -> None:
        """Write the END sections, and say of each that it is `done`. The guest stands still; everything was synced."""
        for entry, handler in self._registry.iterable:
            self._section(entry, SectionKind.END, partial(handler.save_end, self._out))
            done(handler)

    def devices(self) -> None:
        """Write the FULL sections. The guest stands still."""
        out = TappedWriter(self._out, self.digest.devices)
        for entry in self._registry.full:
            described = self._section(entry, SectionKind.FULL, partial(entry.handler.save, out))
            if described is not None:
                self._described.append(described)

    def finish(self) -> None:
        """Write EOF, and the description that follows it."""
        self._out.write(bytes((skeleton.Element.EOF,)))
        if self._form.text is not None:
            self._out.write(description.frame(self._form.text))
        elif self._form.description:
            self._out.write(description.encode(self._described, page_size=PAGE_SIZE))

    def _section(self, entry: Entry, kind: SectionKind, body: Callable[[], T]) -> T:
        return write_section(entry, kind, self._out, body, footer=self._form.footers)
