"""Finds plugins, holds them to the contract and asks them. One manager per machine, or one you pass; never a global.

The rules it lives by:

* **Installed makes a plugin available, named makes it active.** Offers do nothing until somebody asks for their name.
  Checks and choices are heard only from the plugins in `active`, notices only from those in `notifiers`. A plugin that
  the program itself registers is named by that very act: it is active in every family, and the savevm handlers it
  offers are part of every migration.
* **A plugin fails alone.** Every implementation is called by itself, never through pluggy's chain, where one that
  raises silences the rest. What became of it depends on the family (`whimbrel.hookspecs`). Only `Exception` is the
  plugin's; KeyboardInterrupt and its like pass through.
* **Settings break ties, never the order of installation.** Two offers of one name are an error when that name is
  used, unless `prefer` says whose is meant.
* **Nothing is imported before it is needed**: construction reads nothing, `register` reads the names of what is
  installed, and the first question imports every plugin that is not disabled, once.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

import attrs

from whimbrel.errors import DuplicateOffer, PluginError, UnknownNameError, WhimbrelError
from whimbrel.plugins._contract import HOOKS
from whimbrel.plugins._records import (
    ASKED_ONCE,
    CODECS,
    SAVEVM,
    TRACKERS,
    TRANSPORTS,
    VERBS,
    WITNESSES,
    Offer,
    Record,
    Spec,
    default_name,
    listed,
    said,
)
from whimbrel.plugins._registry import Registry
from whimbrel.plugins._tracing import trace_from_environment
from whimbrel.plugins.catalogue import KINDS, Catalogue, PluginRow
from whimbrel.verbs import AUTO, choose

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from whimbrel.abc import CodecSpec, DirtyTrackerSpec, MigrationPlan, SaveVMSpec, TransportSpec
    from whimbrel.events import Event, Round
    from whimbrel.machine import BareMachine
    from whimbrel.plugins.catalogue import State
    from whimbrel.verbs import VerbsProviderSpec
    from whimbrel.witness import WitnessSpec

__all__ = ["Failure", "PluginManager"]

_log = logging.getLogger("whimbrel.plugins")

S = TypeVar("S", bound=Spec)

_CHECK: Final = "whimbrel_check_migration"
_CHOICE: Final = "whimbrel_choose_switchover"
_NOTICE: Final = "whimbrel_on_event"


@attrs.frozen
class Failure:
    """A notifier that raised and is not told anything more; `error` is the exception in one line."""

    plugin: str
    hook: str
    error: str


class PluginManager:
    """The plugins of one machine: registers them, asks them, remembers which are broken and why. Any thread.

    Args:
        disable: names of plugins that are neither imported nor registered. Wins over every other setting.
        active: names of the plugins whose checks and choices are heard, in the order in which choices are made.
        notifiers: names of the plugins that are told of events, in the order in which they are told.
        prefer: for a name that two plugins offer, the plugin whose offer is meant.
        verbs_provider: the name of the verbs provider that transports get, or "auto" for the best that works.
        load_entry_points: whether installed plugins take part; without it only what is registered exists.

    A name in `active` or `notifiers` that is not installed raises UnknownNameError, and one whose plugin is broken
    raises BrokenPlugin, at the first question asked (not at construction: the program may yet register it).
    """

    def __init__(
        self,
        *,
        disable: Collection[str] = (),
        active: Sequence[str] = (),
        notifiers: Sequence[str] = (),
        prefer: Mapping[str, str] | None = None,
        verbs_provider: str = AUTO,
        load_entry_points: bool = True,
    ) -> None:
        self._active = tuple(active)
        self._notifiers = tuple(notifiers)
        self._prefer = dict(prefer or {})
        self._verbs_provider = verbs_provider
        self._registry = Registry(frozenset(disable), load_entry_points=load_entry_points)
        self._lock = threading.RLock()
        self._trace = trace_from_environment()
        self._failures: list[Failure] = []

    def register(self, plugin: object, name: str | None = None, distribution: str = "local") -> str:
        """Register an object or a module of the program's own, which also makes it active; returns its name.

        Without `name` it is called as its module or its class. One that settings disable is listed and otherwise
        ignored. Raises PluginRefused, leaving nothing behind, for a plugin that breaks the contract and for a name
        that is taken, also by an installed plugin.
        """
        return self._registry.register(plugin, name or default_name(plugin), distribution)

    # ------------------------------------------------------------------------------------------- offers

    def transport(self, scheme: str) -> TransportSpec:
        """The transport for URIs of `scheme`.

        Raises UnknownNameError, which lists the schemes there are, DuplicateOffer if two plugins offer it, and
        BrokenPlugin if the plugin of that name could not be imported or asked.
        """
        return self._one(TRANSPORTS, scheme)

    def transports(self) -> list[TransportSpec]:
        """The transports, sorted by name; a name that two plugins offer is missing until settings say whose."""
        return self._all(TRANSPORTS)

    def codec(self, name: str) -> CodecSpec:
        """The codec `name`. Raises as `transport` does."""
        return self._one(CODECS, name)

    def codecs(self) -> list[CodecSpec]:
        """The codecs, sorted by name; a name that two plugins offer is missing until settings say whose."""
        return self._all(CODECS)

    def dirty_tracker(self, name: str) -> DirtyTrackerSpec:
        """The dirty tracker `name`. Raises as `transport` does."""
        return self._one(TRACKERS, name)

    def dirty_trackers(self) -> list[DirtyTrackerSpec]:
        """Every dirty tracker, by name, to choose from by rank.

        That makes use of every name, so one that two plugins offer raises DuplicateOffer.
        """
        return self._every(TRACKERS)

    def verbs_providers(self) -> list[VerbsProviderSpec]:
        """Every provider of verbs, by name, to choose from by rank. Raises as `dirty_trackers` does."""
        return self._every(VERBS)

    def provider(self) -> VerbsProviderSpec:
        """The provider of verbs that settings name, or the best that works (`whimbrel.verbs.VerbsOffers`).

        Raises as `transport` does for the one that is named, and ConnectError where none works here.
        """
        name = self._verbs_provider
        return choose(name, self.verbs_providers() if name == AUTO else [self._one(VERBS, name)])

    def witness(self, kind: str) -> WitnessSpec:
        """The witnesses of a kind. Raises as `transport` does."""
        return self._one(WITNESSES, kind)

    def witnesses(self) -> list[WitnessSpec]:
        """The kinds of witnesses, sorted by name; one that two plugins offer is missing until settings say whose."""
        return self._all(WITNESSES)

    def savevm_handlers(self, machine: BareMachine, names: Iterable[str]) -> list[SaveVMSpec]:
        """The savevm handlers for `machine`: those in `names`, in that order, then those of registered plugins.

        Asks every plugin that offers any, at each call, on the caller's thread. No part of a machine is left behind
        in silence: raises UnknownNameError for a name that nobody offers for this machine, DuplicateOffer, and
        BrokenPlugin for a plugin of that name, or a registered one, that failed when it was asked.
        """
        self._ready()
        offers: list[tuple[Record, SaveVMSpec]] = []
        wanted = dict.fromkeys(names)
        for record in self._asked(SAVEVM.hook, self._registry.plugins, {"machine": machine}):
            specs = self._collect(record, SAVEVM, {"machine": machine})
            if record.by_program and SAVEVM.hook in record.faults:
                raise record.broken()
            offers += [(record, spec) for spec in specs]
            wanted.update(dict.fromkeys(spec.name for spec in specs if record.by_program))
        return [self._pick(SAVEVM, offers, name) for name in wanted]

    def _one(self, offer: Offer[S], name: str) -> S:
        return self._pick(offer, self._offers(offer), name)

    def _every(self, offer: Offer[S]) -> list[S]:
        offers = self._offers(offer)
        return [self._pick(offer, offers, name) for name in sorted({spec.name for _, spec in offers})]

    def _all(self, offer: Offer[S]) -> list[S]:
        offers = self._offers(offer)
        found: list[S] = []
        for name in sorted({spec.name for _, spec in offers}):
            try:
                found.append(self._pick(offer, offers, name))
            except (DuplicateOffer, UnknownNameError) as error:
                _log.debug("left out: %s", error)
        return found

    def _offers(self, offer: Offer[S]) -> list[tuple[Record, S]]:
        """What every plugin offers."""
        self._ready()
        self._gather(offer)
        offers = ((record, record.offers.get(offer.hook, ())) for record in self._registry.plugins)
        return [(record, spec) for record, specs in offers for spec in specs if isinstance(spec, offer.spec)]

    def _gather(self, offer: Offer[Any]) -> None:
        """Ask the plugins that were not yet asked: each once in the manager's life."""
        with self._lock:
            fresh = [one for one in self._registry.plugins if offer.hook in one.hooks and offer.hook not in one.offers]
            arguments = {"verbs": self} if offer is TRANSPORTS else {}
            for record in self._asked(offer.hook, fresh, arguments) if fresh else ():
                record.offers[offer.hook] = self._collect(record, offer, arguments)

    def _collect(self, record: Record, offer: Offer[S], arguments: Mapping[str, object]) -> tuple[S, ...]:
        """What one plugin offers; nothing, and a remembered fault, where it fails or answers with something else."""
        try:
            specs = offer.checked(self._call(record, offer.hook, arguments))
        except Exception as error:  # noqa: BLE001 - the plugin's, and remembered
            record.failed(offer.hook, error)
            _log.warning("the %ss of the %s are left out: %s", offer.kind, record, record.faults[offer.hook])
            return ()
        record.answered(offer.hook)
        return specs

    def _pick(self, offer: Offer[S], offers: Sequence[tuple[Record, S]], name: str) -> S:
        found = [(record, spec) for record, spec in offers if spec.name == name]
        preferred = self._prefer.get(name)
        if preferred is not None and found:
            named = [(record, spec) for record, spec in found if record.name == preferred]
            if not named:
                raise self._unknown(f"plugin for the {offer.kind} {name!r}", preferred, [one.name for one, _ in found])
            found = named
        if not found:
            raise self._unknown(offer.kind, name, {spec.name for _, spec in offers})
        if len(found) > 1:
            first, *others = (record for record, _ in found)
            raise DuplicateOffer(
                f"it offers the {offer.kind} {name!r}, and so does the {' and the '.join(map(str, others))}",
                plugin=first.name,
                distribution=first.distribution,
                hint="say whose is meant under `prefer` in the settings of plugins, or disable one",
            )
        return found[0][1]

    def _unknown(self, kind: str, name: str, known: Iterable[str]) -> WhimbrelError:
        owner = self._registry.owners.get(name)
        if owner is not None and owner.whats_wrong():
            return owner.broken()
        error = UnknownNameError(kind, name, known)
        if owner is not None and owner.disabled:
            error.hint += f". The {owner} is disabled by the settings"
        broken = sorted({record.name for record in self._registry.plugins if record.whats_wrong()})
        if broken:
            error.hint += f". Some plugins are broken: {', '.join(broken)} (`whimbrel plugins` says why)"
        return error

    # ------------------------------------------------------------------------------------------- the other families

    def check_migration(self, plan: MigrationPlan) -> list[str]:
        """What speaks against `plan`, one sentence each, from every active plugin; empty if nothing does.

        A check that raises, or answers with something else than sentences, is a problem that names the plugin.
        """
        self._ready()
        problems: list[str] = []
        for record in self._asked(_CHECK, self._heard(self._active), {"plan": plan}):
            try:
                problems += listed(self._call(record, _CHECK, {"plan": plan}), str)
            except Exception as error:  # noqa: BLE001 - the plugin's, and reported
                problems.append(f"the {record} could not check the migration: {said(error)}")
        return problems

    def choose_switchover(self, round: Round) -> bool | None:  # noqa: A002 - the name authors write
        """The first answer of an active plugin, asked in the order of the settings; None if none of them has one.

        Raises PluginError for one that raises or answers with neither bool nor None; the others are not asked.
        """
        self._ready()
        for record in self._asked(_CHOICE, self._heard(self._active), {"round": round}):
            try:
                answer = self._call(record, _CHOICE, {"round": round})
            except Exception as error:
                message = f"{_CHOICE} failed: {said(error)}"
                raise PluginError(message, plugin=record.name, distribution=record.distribution) from error
            if answer is None or isinstance(answer, bool):
                if answer is not None:
                    return answer
            else:
                message = f"{_CHOICE} answered {answer!r}; expected True, False or None"
                raise PluginError(message, plugin=record.name, distribution=record.distribution)
        return None

    def notify(self, event: Event) -> None:
        """Tell `event` to every notifier, in the order of the settings; returns when all were told.

        Raises nothing of theirs: one that raises is logged, muted from then on and listed in `failures`. Names in
        the settings that do not exist are left to the other methods to complain about.
        """
        if not self._notifiers and not any(record.by_program for record in self._registry.plugins):
            return  # nobody listens: import nothing
        self._registry.load()
        listeners = [record for record in self._heard(self._notifiers) if not record.muted]
        for record in self._asked(_NOTICE, listeners, {"event": event}):
            try:
                self._call(record, _NOTICE, {"event": event})
            except Exception as error:  # noqa: BLE001 - the plugin's; never BaseException
                _log.exception("the %s failed when it was told of %s and is muted", record, type(event).__name__)
                record.muted = True
                record.failed(_NOTICE, error)
                with self._lock:
                    self._failures.append(Failure(record.name, _NOTICE, said(error)))

    @property
    def failures(self) -> list[Failure]:
        """The notifiers that were muted, in the order in which they failed."""
        with self._lock:
            return list(self._failures)

    def _heard(self, names: Iterable[str]) -> list[Record]:
        """The plugins `names` stands for, in that order, then those the program registered in theirs."""
        named = [self._registry.owners[name] for name in names if name in self._registry.owners]
        return list(dict.fromkeys([*named, *(record for record in self._registry.plugins if record.by_program)]))

    def _asked(self, hook: str, candidates: Iterable[Record], arguments: Mapping[str, object]) -> list[Record]:
        """Those of `candidates` that implement `hook`."""
        asked = [record for record in candidates if hook in record.hooks]
        if self._trace is not None:
            self._trace.call(hook, arguments, [record.name for record in asked])
        return asked

    def _call(self, record: Record, hook: str, arguments: Mapping[str, object]) -> object:
        implementation = record.hooks[hook]
        try:
            result = implementation.function(*(arguments[name] for name in implementation.argnames))
        except BaseException as error:
            if self._trace is not None:
                self._trace.error(hook, record.name, error)
            raise
        if self._trace is not None:
            self._trace.result(hook, record.name, result)
        return result

    def _ready(self) -> None:
        """Import what is installed and hold the settings against it."""
        self._registry.load()
        for kind, names, hooks in (("plugin", self._active, HOOKS), ("notifier", self._notifiers, {_NOTICE})):
            fit = {record.name for record in self._registry.plugins if record.hooks.keys() & hooks}
            for name in names:
                record = self._registry.owners.get(name)
                if name not in fit and not (record is not None and record.disabled):
                    raise self._unknown(kind, name, fit)

    # ------------------------------------------------------------------------------------------- the catalogue

    def catalogue(self, *, savevm: Collection[str] = ()) -> Catalogue:
        """What there is and how it does. Imports and asks what has not been yet; raises nothing of the plugins'.

        `savevm` are the handlers that settings name for every machine: their plugins count as active.
        """
        self._registry.load()
        with self._lock:
            for offer in ASKED_ONCE:
                self._gather(offer)
            named, used = {*self._active, *self._notifiers, *savevm}, self._provider_in_use()
            rows = [self._row(record, named, used) for record in self._registry.plugins]
        return Catalogue(tuple(sorted(rows, key=lambda row: row.name)))

    def _provider_in_use(self) -> VerbsProviderSpec | None:
        try:
            return self.provider()
        except WhimbrelError as error:
            _log.debug("no provider of verbs is in use: %s", error)
            return None

    def _row(self, record: Record, named: Collection[str], used: VerbsProviderSpec | None) -> PluginRow:
        state: State = "offered"
        reason = record.whats_wrong()
        if record.disabled:
            state, reason = "disabled", "settings say so"
        elif reason:
            state = "broken"
        elif record.by_program or record.name in named:
            state = "active"
        return PluginRow(
            name=record.name,
            kinds=tuple(kind for hook, kind in KINDS.items() if hook in record.hooks),
            offers=tuple(spec.name for specs in record.offers.values() for spec in specs),
            distribution=record.distribution,
            version=record.version,
            state=state,
            reason=reason,
            in_use=tuple(spec.name for spec in record.offers.get(VERBS.hook, ()) if spec is used),
        )
