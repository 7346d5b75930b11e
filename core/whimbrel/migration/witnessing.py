"""How two sides come to use a witness, and how either asks it.

They use one only if both can reach it, and the same one, before the guest stops: the source probes it and claims the
cell in which they meet; the destination probes its own and must find it there. Otherwise they hand over pairwise.
Which of the two it is, the source says in the stream behind everything else, once it has let go.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from whimbrel.abc import Patience
from whimbrel.errors import MigrationCancelled, WitnessError
from whimbrel.migration.messenger import FIRST_PAUSE, LONGEST_PAUSE
from whimbrel.plugins import PluginManager
from whimbrel.settings import Settings
from whimbrel.witness import Witness, meeting

_log = logging.getLogger("whimbrel")

SOURCE: Final = "source"
DESTINATION: Final = "destination"
TRY: Final = 5.0  # seconds for one call


def witness_of(settings: Settings, plugins: PluginManager) -> Witness | None:
    """The witness that settings name, if any. Raises ConfigError and PluginError."""
    kind, _, place = settings.backends.witness.partition(":")
    return plugins.witness(kind).create(place) if kind else None


def source_meets(witness: Witness, mid: bytes, cancelled: threading.Event) -> bool:
    """Whether the source can use it; then the destination can see that it is the same."""
    try:
        witness.probe(Patience(TRY, cancelled))
        return witness.claim(meeting(mid), SOURCE, Patience(TRY, cancelled)) == SOURCE
    except WitnessError as exc:
        _log.warning("the machine is handed over without the witness: %s", exc)
        return False


def destination_meets(witness: Witness, mid: bytes, cancelled: threading.Event) -> bool:
    """Whether the destination can use it, and the source has been there."""
    try:
        witness.probe(Patience(TRY, cancelled))
        found = witness.read(meeting(mid), Patience(TRY, cancelled))
    except WitnessError as exc:
        _log.warning("the machine is taken over without the witness: %s", exc)
        return False
    if found != SOURCE:
        _log.warning("the machine is taken over without the witness: the source has not been at this one")
    return found == SOURCE


def ask(witness: Witness, mid: bytes, who: str, stopped: threading.Event) -> str | None:
    """Claim the attempt until it is known whose it is; None once `stopped`."""
    pause = FIRST_PAUSE
    while not stopped.is_set():
        try:
            return witness.claim(mid, who, Patience(TRY, stopped))
        except MigrationCancelled:
            return None
        except WitnessError as exc:
            _log.warning("the witness cannot be asked whose the machine is, and nobody runs it meanwhile: %s", exc)
        stopped.wait(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return None
