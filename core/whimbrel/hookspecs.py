"""The hooks a plugin may implement, in four families (`docs/plugins.md`).

========= ============= ==================================================================================
family    pluggy        a plugin that fails
========= ============= ==================================================================================
offers    collect       is left out and remembered; the error appears when its name is asked for
checks    collect       counts as a problem that names it
choices   first result  the migration fails, while failing is free
notices   collect       is logged, muted from then on and listed in the result; the migration goes on
========= ============= ==================================================================================

Installed makes a plugin available, named makes it active: offers do nothing until a URI, a capability or a setting
names them; checks, choices and notices are heard only from plugins that `[plugins]` in the settings names.

A hook call costs 1 to 4 µs: there may be one per round, there is never one per page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from whimbrel.abc import CodecSpec, DirtyTrackerSpec, MigrationPlan, SaveVMSpec, TransportSpec
    from whimbrel.events import Event, Round
    from whimbrel.machine import BareMachine
    from whimbrel.verbs import VerbsOffers, VerbsProviderSpec
    from whimbrel.witness import WitnessSpec

PROJECT = "whimbrel"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

OFFERS = frozenset({
    "whimbrel_transports",
    "whimbrel_savevm_handlers",
    "whimbrel_codecs",
    "whimbrel_dirty_trackers",
    "whimbrel_verbs_providers",
    "whimbrel_witnesses",
})  # fmt: skip
CHECKS = frozenset({"whimbrel_check_migration"})
CHOICES = frozenset({"whimbrel_choose_switchover"})
NOTICES = frozenset({"whimbrel_on_event"})


@hookspec
def whimbrel_transports(verbs: VerbsOffers) -> Sequence[TransportSpec]:  # type: ignore[empty-body]
    """Offer transports; a spec's name is the scheme of its URIs. Called once per plugin manager, on any thread.

    `verbs` finds a provider of verbs for those that need one, when a connection is to be made and not before.
    """


@hookspec
def whimbrel_savevm_handlers(machine: BareMachine) -> Sequence[SaveVMSpec]:  # type: ignore[empty-body]
    """Offer handlers for parts of `machine`; `[plugins] savevm` names the active ones.

    Called at the start of every migration: of an outgoing one on the caller's thread, with the machine's lock held; of
    an incoming one on the incoming thread.
    """


@hookspec
def whimbrel_codecs() -> Sequence[CodecSpec]:  # type: ignore[empty-body]
    """Offer codecs. Called once per plugin manager, on any thread."""


@hookspec
def whimbrel_dirty_trackers() -> Sequence[DirtyTrackerSpec]:  # type: ignore[empty-body]
    """Offer dirty trackers; `[backends] dirty-tracker` names one. Called once per plugin manager, on any thread."""


@hookspec
def whimbrel_verbs_providers() -> Sequence[VerbsProviderSpec]:  # type: ignore[empty-body]
    """Offer providers of verbs; `[backends] verbs-provider` names one. Called once per manager, on any thread."""


@hookspec
def whimbrel_witnesses() -> Sequence[WitnessSpec]:  # type: ignore[empty-body]
    """Offer kinds of witnesses; `[backends] witness` names one and its place. Called once per manager, any thread."""


@hookspec
def whimbrel_check_migration(plan: MigrationPlan) -> Sequence[str]:  # type: ignore[empty-body]
    """Say what speaks against `plan`, one sentence each; all are reported together before a byte is sent.

    Called once per outgoing migration, on the caller's thread.
    """


@hookspec(firstresult=True)
def whimbrel_choose_switchover(round: Round) -> bool | None:  # noqa: A002 - the name authors write
    """Decide after a round: True stops the guest and completes, False makes another round, None leaves it to others.

    The core's own rule decides after None from all. Called once per round on the migration thread, guest running.
    """


@hookspec
def whimbrel_on_event(event: Event) -> None:
    """Hear an event. Called in order on the machine's notice thread, never inside the downtime window."""
