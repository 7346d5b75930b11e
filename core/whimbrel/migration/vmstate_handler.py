"""A declared device as a savevm handler: one FULL section, parsed whole before anything is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whimbrel import vmstate
from whimbrel.abc import SaveVMHandler, SectionKind, StreamReader, StreamWriter
from whimbrel.errors import StreamError


class VMStateHandler(SaveVMHandler):
    """Saves and loads `obj` through `description`."""

    def __init__(
        self,
        idstr: str,
        obj: object,
        description: vmstate.VMStateDescription,
        *,
        instance_id: int = 0,
        priority: int = 0,
    ) -> None:
        self.idstr, self.instance_id, self.priority = idstr, instance_id, priority
        self.version_id = description.version_id
        self._obj, self._description = obj, description
        self._loaded: vmstate.Loaded | None = None
        self._undo: Callable[[], object] | None = None

    def problems(self) -> Sequence[str]:
        """A device declared unmigratable refuses by its name."""
        if self._description.unmigratable:
            return (f"device {self.idstr!r} cannot be migrated: its description says so",)
        return ()

    def save(self, out: StreamWriter) -> Mapping[str, Any]:
        """Write the state and return its description."""
        body, described = vmstate.save(self._description, self._obj)
        out.write(body)
        return {"name": self.idstr, "instance_id": self.instance_id, **described}

    def load(self, reader: StreamReader, kind: SectionKind, version_id: int) -> None:
        """Parse the state; the device is not touched."""
        if kind is not SectionKind.FULL:
            raise StreamError(f"device {self.idstr!r} came as {kind.name}, expected FULL")
        self._loaded = reader.parse(vmstate.parse(self._description, version_id, self._obj))

    def commit(self) -> None:
        """Put the state into the device and let it check itself."""
        assert self._loaded is not None, "committed before it was loaded"
        self._undo = vmstate.apply(self._loaded, self._obj)

    def rollback(self) -> None:
        """Put the device back as it was."""
        if self._undo is not None:
            self._undo()
            self._undo = None
