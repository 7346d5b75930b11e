"""The machine that arrives: whose it is, and what becomes of it here.

Every move of ownership on this side is made here, and is in the journal before it takes place. That the machine is held
still, taken over or thrown away is done here; when, is decided elsewhere: by how the source lets go
(`whimbrel.migration.takings`), or by an operator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from whimbrel.abc import Channel
from whimbrel.events import Arrived
from whimbrel.machine import BareMachine, RunState
from whimbrel.migration.announce import Announcer
from whimbrel.migration.deadline import Deadline
from whimbrel.migration.globalstate import GlobalStateHandler
from whimbrel.migration.handover import DestinationOwnership, Reason, destination_handover, last_word_timeout
from whimbrel.migration.journal import Journal, new_mid
from whimbrel.migration.keeper import WITNESSED, Keeper
from whimbrel.migration.loader import StreamLoader
from whimbrel.wire.commands import Attempt


class Holding:
    """What there is of one arriving machine. The incoming thread's; an operator's once that has ended.

    `start` is what `IncomingMigration` was told, `peer` the URI that the source connects to.
    """

    def __init__(
        self,
        machine: BareMachine,
        journal: Journal,
        *,
        peer: str,
        start: bool | None,
        on_epoch: Callable[[int], object],
    ) -> None:
        self._machine, self._journal = machine, journal
        self._peer, self._start, self._on_epoch = peer, start, on_epoch
        self._ownership = destination_handover()
        self._ownership.on_move = self._moves
        self._keeper = Keeper(journal, role="destination", mid=new_mid(), peer=peer, epoch=journal.epoch + 1)
        self._loader: StreamLoader | None = None
        self._global_state: GlobalStateHandler | None = None
        self._order: Deadline | None = None
        self._announcer: Announcer | None = None
        self.settled = threading.Event()
        """Set once it is no longer loaded or held: it is this side's, or gone."""

    @property
    def now(self) -> DestinationOwnership:
        """What this side may do with it."""
        return self._ownership.now

    @property
    def epoch(self) -> int:
        """In which it is this side's, once it is."""
        return self._keeper.epoch

    @property
    def overdue(self) -> bool:
        """Whether the order to start has taken longer than it may, and the link was closed for it."""
        return self._order is not None and self._order.passed

    def loaded_by(self, loader: StreamLoader, global_state: GlobalStateHandler) -> None:
        """What brings it here, and can put back what it has brought; and what tells the run state it came in."""
        self._loader, self._global_state = loader, global_state

    def begin(self, attempt: Attempt) -> None:
        """Write down that it arrives in `attempt`. Raises JournalError."""
        self._keeper = Keeper(
            self._journal,
            role="destination",
            mid=attempt.mid,
            peer=self._peer,
            epoch=attempt.epoch + 1,
            deal="pairwise",
        )
        self._keeper.begin(DestinationOwnership.LOADING)

    def prepare(self) -> None:
        """Everything is here: hold it still. Raises JournalError, and what is wrong with the drives."""
        assert self._loader is not None, "prepared before anything was loaded"
        if self._loader.proved:
            self._machine.drives.refuse_unsent()
        if self._loader.witnessed:
            self._keeper.deal = WITNESSED
        self._ownership.move(DestinationOwnership.PREPARED, Reason.LOADED)

    def await_order(self, channel: Channel) -> None:
        """From here on nobody runs: close `channel` unless the order comes soon, and somebody has to decide."""
        seconds = last_word_timeout(self._machine.settings.limits.handover_timeout)
        self._order = Deadline(seconds, channel).start()

    def await_no_order(self) -> None:
        """It has come, or another's word counts. Twice is fine."""
        if self._order is not None:
            self._order.lift()

    def take_drives(self) -> None:
        """Have its drives to write to. Raises StateError while somebody else has them."""
        self._machine.drives.take_over()

    def leave_drives(self) -> None:
        """Let go of them again."""
        self._machine.drives.release()

    def take_over(self, why: Reason) -> None:
        """It is this side's: start it, or leave it paused, as `start` and `why` say.

        Raises StateError if its drives are somebody else's, JournalError; it is held still then.
        """
        assert self._global_state is not None, "taken over before anything was loaded"
        self.await_no_order()
        self.take_drives()
        self._ownership.move(DestinationOwnership.OWNER, why)
        goes_on = self._global_state.run_state if self._may_run(why) else RunState.PAUSED
        self._machine.arrive(goes_on)
        running = goes_on is RunState.RUNNING
        self._machine.notifiers.emit(Arrived(running=running))
        if running:
            self._announcer = Announcer(self._machine.guest, self._machine.settings.parameters)
            self._announcer.start()

    def refuse(self, why: Reason) -> None:
        """Throw away what is here, for good. Raises JournalError; it is gone all the same."""
        if self._loader is not None:
            self._loader.rollback()
        self._ownership.move(DestinationOwnership.REFUSED, why)

    def close(self) -> None:
        """End what still runs for it: the announcing."""
        if self._announcer is not None:
            self._announcer.close()

    def _may_run(self, why: Reason) -> bool:
        if why is Reason.OPERATOR:
            return True
        return self._start is True if why is Reason.UNPROVED else self._start is not False

    def _moves(self, old: DestinationOwnership, new: DestinationOwnership, why: Reason) -> None:
        self._keeper.move(old, new, why)
        if new is DestinationOwnership.OWNER:
            self._on_epoch(self._keeper.epoch)
        if new is not DestinationOwnership.PREPARED:
            self.settled.set()
