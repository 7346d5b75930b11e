"""The registry: a machine's handlers in order, with their section ids, and sections around their bodies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import attrs

from whimbrel.abc import IterableHandler, SaveVMHandler, SectionKind
from whimbrel.errors import ConfigError, MigrationError, Place
from whimbrel.migration.quietly import quietly
from whimbrel.stream import Writer
from whimbrel.wire import skeleton

T = TypeVar("T")


@attrs.frozen(eq=False)
class Entry:
    """One handler with its section id in this stream."""

    handler: SaveVMHandler
    section_id: int

    @property
    def place(self) -> Place:
        """Where messages say that it is."""
        return Place(section=f"{self.handler.idstr!r} (id {self.section_id})")

    def head(self, kind: SectionKind) -> bytes:
        """The section's head."""
        handler = self.handler
        header = skeleton.SectionHeader(self.section_id, handler.idstr, handler.instance_id, handler.version_id)
        return skeleton.section_header(kind, header)

    def foot(self) -> bytes:
        """The section's footer."""
        return skeleton.section_footer(self.section_id)


class Registry:
    """The handlers of one machine for one migration, by priority (higher first), then by name."""

    def __init__(self, handlers: Iterable[SaveVMHandler]) -> None:
        ordered = sorted(handlers, key=lambda h: (-h.priority, h.idstr, h.instance_id))
        # From 1: in a QEMU every handler that has not been heard of yet answers to id 0.
        self.entries = [Entry(handler, number) for number, handler in enumerate(ordered, 1)]
        self._by_name: dict[tuple[str, int], Entry] = {}
        for entry in self.entries:
            name = (entry.handler.idstr, entry.handler.instance_id)
            self._by_name.setdefault(name, entry)

    @property
    def iterable(self) -> list[tuple[Entry, IterableHandler]]:
        """The entries that are saved in rounds."""
        return [(entry, entry.handler) for entry in self.entries if isinstance(entry.handler, IterableHandler)]

    @property
    def full(self) -> list[Entry]:
        """The entries that are saved once, with the guest stopped."""
        return [entry for entry in self.entries if not entry.handler.iterable]

    def find(self, idstr: str, instance_id: int) -> Entry | None:
        """The (first) entry of that name, or None."""
        return self._by_name.get((idstr, instance_id))

    def refuse_namesakes(self) -> None:
        """Raise ConfigError if two handlers want the same section: a stream could not be loaded by their names."""
        for entry in self.entries:
            name = (entry.handler.idstr, entry.handler.instance_id)
            if self._by_name[name] is not entry:
                raise ConfigError(f"two savevm handlers want section {name[0]!r} with instance id {name[1]}")

    def names(self) -> tuple[str, ...]:
        """The names of all sections, in order."""
        return tuple(entry.handler.idstr for entry in self.entries)

    def problems(self) -> list[str]:
        """What every handler has against being migrated."""
        return [problem for entry in self.entries for problem in entry.handler.problems()]

    def pending(self) -> int:
        """Bytes known to be dirty and not sent."""
        return sum(handler.pending() for _, handler in self.iterable)

    def sync(self) -> None:
        """Let every handler learn what has changed."""
        for _, handler in self.iterable:
            handler.sync()

    def rollback(self) -> None:
        """Let every handler put the machine back; one that fails does not keep the others from it."""
        for entry in self.entries:
            quietly(entry.handler.rollback, f"the rollback of section {entry.handler.idstr!r}")

    def finish(self) -> None:
        """Let every handler release what belongs to this migration; one that fails does not keep the others from it."""
        for entry in self.entries:
            quietly(entry.handler.finish, f"the end of section {entry.handler.idstr!r}")


def write_section(entry: Entry, kind: SectionKind, out: Writer, body: Callable[[], T], *, footer: bool = True) -> T:
    """Write a section of `entry` round what `body` writes; returns what `body` returns. Errors are told their place.

    `footer` is false for the streams of machine types from before there were any.
    """
    try:
        out.write(entry.head(kind))
        value = body()
        if footer:
            out.write(entry.foot())
    except MigrationError as exc:
        raise exc.at(entry.place) from exc.__cause__
    return value
