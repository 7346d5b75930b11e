"""What the manager remembers of a plugin, and the small questions it asks of an answer or an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

import attrs

from whimbrel.abc import CodecSpec, DirtyTrackerSpec, SaveVMSpec, TransportSpec
from whimbrel.errors import BrokenPlugin, PluginRefused
from whimbrel.plugins.catalogue import KINDS
from whimbrel.verbs import VerbsProviderSpec
from whimbrel.witness import WitnessSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

    import pluggy

__all__ = [
    "ASKED_ONCE",
    "CODECS",
    "SAVEVM",
    "TRACKERS",
    "TRANSPORTS",
    "VERBS",
    "WITNESSES",
    "Offer",
    "Record",
    "Spec",
    "default_name",
    "listed",
    "said",
]


class Spec(Protocol):
    """What all offers have."""

    @property
    def name(self) -> str:
        """What it is asked for by."""


S = TypeVar("S", bound=Spec)
T = TypeVar("T")


@attrs.frozen
class Offer(Generic[S]):
    """One kind of offer: the hook that asks for it and what it answers with."""

    hook: str
    spec: type[S]

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        return KINDS[self.hook]

    def checked(self, answer: object) -> tuple[S, ...]:
        """The specs in a hook's answer. Raises TypeError or ValueError for an answer that is something else."""
        specs = listed(answer, self.spec)
        names = Counter(spec.name for spec in specs)
        for name, count in names.items():
            if not name:
                raise ValueError("one of its offers has no name")
            if count > 1:
                raise ValueError(f"it offers {name!r} {count} times")
        return specs


TRANSPORTS: Final = Offer("whimbrel_transports", TransportSpec)
SAVEVM: Final = Offer("whimbrel_savevm_handlers", SaveVMSpec)
CODECS: Final = Offer("whimbrel_codecs", CodecSpec)
TRACKERS: Final = Offer("whimbrel_dirty_trackers", DirtyTrackerSpec)
VERBS: Final = Offer("whimbrel_verbs_providers", VerbsProviderSpec)
WITNESSES: Final = Offer("whimbrel_witnesses", WitnessSpec)
# Savevm handlers depend on a machine.
ASKED_ONCE: Final[tuple[Offer[Any], ...]] = (TRANSPORTS, CODECS, TRACKERS, VERBS, WITNESSES)


@attrs.define(eq=False)
class Record:
    """A plugin as the manager knows it, whatever became of it. Mappings that change late are replaced, for readers."""

    name: str
    distribution: str
    version: str
    entry: EntryPoint | None = None  # until it has been imported
    by_program: bool = False
    disabled: bool = False
    muted: bool = False
    reason: str = ""  # why nothing of it is registered
    cause: BaseException | None = None
    faults: Mapping[str, str] = attrs.field(factory=dict)  # hook -> what went wrong when it was last called
    hooks: dict[str, pluggy.HookImpl] = attrs.field(factory=dict)
    offers: dict[str, tuple[Spec, ...]] = attrs.field(factory=dict)  # hook -> its answer; asked once

    def whats_wrong(self) -> str:
        """Why it counts as broken, or nothing."""
        return self.reason or "; ".join(self.faults.values())

    def failed(self, hook: str, error: Exception) -> None:
        """Remember that one of its hooks failed."""
        self.cause, self.faults = error, {**self.faults, hook: f"{hook} failed: {said(error)}"}

    def answered(self, hook: str) -> None:
        """Forget that a hook failed: this time it did not."""
        if hook in self.faults:
            self.faults = {name: fault for name, fault in self.faults.items() if name != hook}

    def refused(self, reason: str) -> PluginRefused:
        """The error for breaking the contract, to be raised."""
        return PluginRefused(reason, plugin=self.name, distribution=self.distribution)

    def broken(self) -> BrokenPlugin:
        """The error for asking for it although it is broken, to be raised."""
        error = BrokenPlugin(self.whats_wrong(), plugin=self.name, distribution=self.distribution)
        error.__cause__ = self.cause
        return error

    def __str__(self) -> str:
        return f"plugin {self.name!r} (from {self.distribution})"


def listed(answer: object, expected: type[T]) -> tuple[T, ...]:
    """The items of a hook's answer, if it is a sequence of `expected`. Raises TypeError if it is something else."""
    wanted = f"expected a sequence of {expected.__name__}"
    # A lone string is a sequence of strings, and never what was meant.
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        raise TypeError(f"it answered {_shown(answer)}; {wanted}")
    for item in answer:
        if not isinstance(item, expected):
            raise TypeError(f"its answer has {_shown(item)}; {wanted}")
    return tuple(answer)


def default_name(plugin: object) -> str:
    """What a plugin is called that was given no name: as its module, or its class."""
    return plugin.__name__.rpartition(".")[2] if isinstance(plugin, ModuleType) else type(plugin).__name__


def said(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
