"""Every error that whimbrel raises, in one tree, each class with a stable code.

::

    WhimbrelError                      error
    ├── StateError                     state             you called this too early or too late
    ├── ConfigError                    config            a setting, a URI or a description is wrong
    │   └── UnknownNameError           unknown-name      there is nothing of that name; says what there is
    ├── PluginError                    plugin            a plugin is at fault; says which, and from where
    │   ├── PluginRefused              plugin-refused    it broke the contract at registration
    │   ├── DuplicateOffer             plugin-duplicate  two plugins offer one name
    │   └── BrokenPlugin               plugin-broken     it could not be imported, or its hook raised
    ├── TrackerUnavailable             tracker           a dirty tracker cannot work here; says why
    ├── WitnessError                   witness           a witness cannot say whose an attempt is
    ├── GuestError                     guest             the guest's own code raised
    ├── MonitorError                   monitor           the other side of a QMP connection said no
    ├── JournalError                   journal           a machine's journal cannot be kept
    └── MigrationError                 migration         a migration ended without success
        ├── MigrationRefused           refused           before a byte was sent: blockers, checks, devices
        ├── MigrationCancelled         cancelled         somebody asked for it
        ├── ChannelError               channel           the path, not the peer's words
        │   ├── ConnectError           connect           it never came to be
        │   ├── ChannelClosed          closed            we closed it
        │   └── ChannelLost            lost              it broke, or ended before its time
        ├── ProtocolError              protocol          (abstract) what the peer sent
        │   ├── StreamError            stream            malformed, out of order or out of bounds
        │   ├── IncompatibleError      incompatible      well formed, but it does not fit this machine
        │   └── PeerRefused            peer-refused      the peer says that it failed
        ├── NotConverged               not-converged     the guest writes too fast; the source runs on
        ├── HandoverTimeout            handover-timeout  no proof in time; the source runs on
        └── HandoverUndecided          undecided         let go of, and the peer's last word is missing

Codes are part of the API: programs may compare them, `--json` prints them, and they never change. ``exit_code`` is
what the command line exits with.

A message says what was expected, what came and what to do; *where* is a :class:`Place`, filled in from the inside
out by whoever knows a part of it (:meth:`MigrationError.at`).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, ClassVar

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

__all__ = [
    "BrokenPlugin",
    "ChannelClosed",
    "ChannelError",
    "ChannelLost",
    "ConfigError",
    "ConnectError",
    "DuplicateOffer",
    "GuestError",
    "HandoverTimeout",
    "HandoverUndecided",
    "IncompatibleError",
    "JournalError",
    "MigrationCancelled",
    "MigrationError",
    "MigrationRefused",
    "MonitorError",
    "NotConverged",
    "PeerRefused",
    "Place",
    "PluginError",
    "PluginRefused",
    "ProtocolError",
    "StateError",
    "StreamError",
    "TrackerUnavailable",
    "UnknownNameError",
    "WhimbrelError",
    "WitnessError",
]


class WhimbrelError(Exception):
    """The root of the tree: catch this to catch everything that whimbrel raises on purpose."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class StateError(WhimbrelError):
    """The call is legal, but not now; nothing has changed."""

    code = "state"


class ConfigError(WhimbrelError):
    """A setting, a URI or a description is wrong; nothing has changed."""

    code = "config"
    exit_code = 2


class UnknownNameError(ConfigError):
    """There is nothing of that name; the message offers the nearest one and lists what there is."""

    code = "unknown-name"

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1)
        there_are = f"did you mean {close[0]!r}? There are: " if close else "there are: "
        super().__init__(f"unknown {kind} {name!r}", hint=there_are + (", ".join(names) or "none"))
        self.kind, self.name, self.known = kind, name, names


class PluginError(WhimbrelError):
    """A plugin is at fault; `plugin` and `distribution` say which one."""

    code = "plugin"

    def __init__(self, message: str, *, plugin: str = "?", distribution: str = "?", hint: str = "") -> None:
        super().__init__(f"plugin {plugin!r} (from {distribution}): {message}", hint=hint)
        self.plugin, self.distribution, self.reason = plugin, distribution, message


class PluginRefused(PluginError):
    """It broke the contract at registration; nothing of it is registered."""

    code = "plugin-refused"


class DuplicateOffer(PluginError):
    """Two plugins offer one name and no setting says whose is meant."""

    code = "plugin-duplicate"


class BrokenPlugin(PluginError):
    """It could not be imported, or a hook of it raised while it was asked for its offers."""

    code = "plugin-broken"


class TrackerUnavailable(WhimbrelError):
    """A dirty tracker cannot work here; the message is the one sentence that says why."""

    code = "tracker"


class WitnessError(WhimbrelError):
    """A witness cannot be reached or written, or what it holds makes no sense; nothing may be concluded from that."""

    code = "witness"


class GuestError(WhimbrelError):
    """The guest's own code raised; the machine is in `internal-error`."""

    code = "guest"


class MonitorError(WhimbrelError):
    """The other side of a QMP connection answered with an error, or went away."""

    code = "monitor"

    def __init__(self, message: str, *, error_class: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.error_class = error_class


class JournalError(WhimbrelError):
    """A machine's journal cannot be opened, read or written; what was to be recorded has not happened."""

    code = "journal"


@attrs.frozen
class Place:
    """Where in a migration something happened; an unknown part is None."""

    section: str | None = None
    block: str | None = None
    offset: int | None = None
    peer: str | None = None

    def filled_from(self, outer: Place) -> Place:
        """This place, with what it does not know taken from `outer`: the innermost word wins."""
        return Place(
            section=outer.section if self.section is None else self.section,
            block=outer.block if self.block is None else self.block,
            offset=outer.offset if self.offset is None else self.offset,
            peer=outer.peer if self.peer is None else self.peer,
        )

    def __str__(self) -> str:
        parts = [
            f"section {self.section}" if self.section is not None else "",
            f"block {self.block!r}" if self.block is not None else "",
            f"byte {self.offset} of the stream" if self.offset is not None else "",
            f"peer {self.peer}" if self.peer is not None else "",
        ]
        return ", ".join(part for part in parts if part)


class MigrationError(WhimbrelError):
    """A migration ended without success; `place` says where in the stream, as far as that is known."""

    code = "migration"

    def __init__(self, message: str, *, hint: str = "", place: Place | None = None) -> None:
        super().__init__(message, hint=hint)
        self.place = place or Place()

    def at(self, outer: Place) -> Self:
        """Fill in what is not known yet of the place; returns itself, to be raised."""
        self.place = self.place.filled_from(outer)
        return self

    def __str__(self) -> str:
        where = str(self.place)
        text = f"{self.message} ({where})" if where else self.message
        return f"{text}; {self.hint}" if self.hint else text


class MigrationRefused(MigrationError):
    """Refused before a byte was sent; the machine was not touched."""

    code = "refused"


class MigrationCancelled(MigrationError):
    """Somebody asked for it; the source's guest runs on."""

    code = "cancelled"
    exit_code = 130


class ChannelError(MigrationError):
    """The path failed, not the peer's words."""

    code = "channel"


class ConnectError(ChannelError):
    """The connection never came to be."""

    code = "connect"


class ChannelClosed(ChannelError):
    """Used after we closed it ourselves."""

    code = "closed"


class ChannelLost(ChannelError):
    """It broke, or ended before its time."""

    code = "lost"


class ProtocolError(MigrationError):
    """What the peer sent is at fault. Abstract: one of its subclasses is raised."""

    code = "protocol"

    def __init__(self, message: str, *, hint: str = "", place: Place | None = None) -> None:
        if type(self) is ProtocolError:
            raise TypeError("ProtocolError is abstract: raise StreamError, IncompatibleError or PeerRefused")
        super().__init__(message, hint=hint, place=place)


class StreamError(ProtocolError):
    """The stream is malformed, out of order or out of bounds."""

    code = "stream"


class IncompatibleError(ProtocolError):
    """The stream is well formed, but it does not fit this machine."""

    code = "incompatible"


class PeerRefused(ProtocolError):
    """The peer says that it failed; its own log has the reason."""

    code = "peer-refused"


class NotConverged(MigrationError):
    """The downtime limit could not be met in time (`switchover-timeout`); the source has not stopped and runs on."""

    code = "not-converged"


class HandoverTimeout(MigrationError):
    """The destination gave no proof in time; the source has not let go and runs on."""

    code = "handover-timeout"


class HandoverUndecided(MigrationError):
    """The link broke in the middle of the handover, and an operator must say who owns the machine.

    At the source: it has let go, and the destination's last word is missing; the machine may run there, it never runs
    here by itself. At the destination: it holds the machine whole and stopped, and the order to start is missing.
    """

    code = "undecided"
    exit_code = 3
