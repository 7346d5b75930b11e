"""`whimbrel run`: a machine in the foreground, until it has moved away or somebody ends it."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from whimbrel.cli._options import capability_option, config_option, overrides, plaintext_option, set_option
from whimbrel.cli._output import note

if TYPE_CHECKING:
    from whimbrel.cli._foreground import Foreground
    from whimbrel.migration import Machine
    from whimbrel.migration.standing import Standing


@click.command()
@click.argument("app")
@click.option(
    "--incoming", metavar="URI|defer", help="Wait for a machine there; `defer` waits to be told where by QMP."
)
@click.option("--qmp", metavar="ADDRESS", help="Serve a monitor at unix:PATH or tcp:HOST:PORT.")
@click.option("--allow-exec", is_flag=True, help="Let the monitor's clients name programs to run (exec:).")
@click.option("--paused", is_flag=True, help="Do not start the machine; QMP's `cont` does.")
@click.option(
    "--journal",
    metavar="DIR",
    help="Write down there, durably, who owns the machine, and heed what is written there already.",
)
@click.option(
    "--afresh",
    is_flag=True,
    help="Start the machine whatever its journal says: your word that no other copy of it runs or ever will.",
)
@click.option("--stay", is_flag=True, help="Stay after the machine has moved away, until told to quit.")
@config_option
@capability_option
@set_option
@plaintext_option
def run(
    app: str,
    incoming: str | None,
    qmp: str | None,
    allow_exec: bool,
    paused: bool,
    stay: bool,
    journal: str | None,
    afresh: bool,
    config: str | None,
    capabilities: tuple[str, ...],
    assignments: tuple[str, ...],
) -> int:
    """Run the machine that APP returns, in the foreground.

    APP is MODULE:FACTORY or PATH.py:FACTORY. A factory with a parameter `settings` is given the settings of the command
    line, the environment and the file, in this order of precedence. Without one, capabilities, parameters and limits
    that are set there are set on the machine it returns; for backends and plugins it needs the parameter.

    When the machine has moved away, the process ends with status 0; one that waits for a machine becomes it. Ctrl-C
    stops the machine and ends the process with status 130. When the guest fails, it ends with status 1.

    With --journal a crash on either side does not make two of the machine, nor lose track of it. Started again, this
    says in one sentence where the machine is: if it ran here, it starts afresh, since what it held in memory is gone;
    if it was being handed over, the destination is asked until it answers, and runs it if it holds it whole; if it is
    elsewhere, nothing starts here, unless --afresh says so.

    Behind a monitor the process lingers for two seconds after a move or a failure, so that the monitor's clients learn
    how it ended; `quit` or Ctrl-C ends that. After a move the monitor takes no new clients, and its address is free.
    """
    if incoming == "defer" and qmp is None:
        raise click.UsageError("--incoming defer is told where to wait by QMP; give it --qmp as well")
    if afresh and (journal is None or incoming is not None):
        raise click.UsageError("--afresh is about what a journal says of a machine that is to start here")
    if allow_exec and qmp is None:
        raise click.UsageError("--allow-exec is about the monitor's clients; give it --qmp as well")
    from whimbrel.cli._foreground import Foreground
    from whimbrel.cli._machines import build, check_names
    from whimbrel.cli._signals import Signals

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the notifier `log` says goes here

    with ExitStack() as stack:
        machine = build(app, config, overrides(capabilities, assignments))
        foreground = stack.enter_context(Foreground(machine, stay=stay))
        interrupted = threading.Event()

        def interrupt(number: signal.Signals) -> None:
            interrupted.set()
            foreground.interrupt(number)

        stack.enter_context(Signals(interrupt))
        stack.enter_context(machine)  # behind it, so that signals are in its hands until the machine is closed
        check_names(machine)
        if qmp is not None:
            from whimbrel.monitor import MonitorServer

            server = stack.enter_context(MonitorServer(machine, qmp, on_quit=foreground.quit, allow_exec=allow_exec))
            foreground.monitored_by(server)
            note(f"monitor on {server.address}")
        if journal is not None:
            standing = _heed(machine, journal, interrupted)
            if not afresh and (status := _ended_by(standing, incoming)) is not None:
                return status
        _begin(machine, foreground, incoming, paused=paused, afresh=afresh)
        return foreground.stay_until_the_end()


def _heed(machine: Machine, folder: str, interrupted: threading.Event) -> Standing:
    """Open the journal, say what it says, and ask whoever has to be asked."""
    from whimbrel.migration.standing import Verdict

    standing = machine.keep_journal(folder)
    if standing.verdict is not Verdict.FRESH:
        note(standing.sentence)
    settled = machine.settle_standing(interrupted)
    if standing.must_ask:
        note(settled.sentence)
    return settled


def _ended_by(standing: Standing, incoming: str | None) -> int | None:
    """The exit status where the journal leaves nothing to run here; None where it does. Raises what there is to do."""
    from whimbrel.errors import HandoverUndecided, StateError
    from whimbrel.migration.standing import Verdict

    word = "--afresh starts it here, which is your word that no other copy of it runs or ever will"
    match standing.verdict:
        case Verdict.ASK | Verdict.ASK_WITNESS:
            return 130  # nobody has answered before it was interrupted
        case Verdict.LOST if incoming is not None:
            raise StateError(
                "the machine is this side's, and none can arrive", hint="without --incoming it starts afresh"
            )
        case Verdict.UNKNOWN:
            raise HandoverUndecided("nothing starts here", hint=f"look whether it runs there; {word}")
        case Verdict.AWAY | Verdict.ELSEWHERE if incoming is None:
            raise StateError("nothing starts here", hint=f"--incoming waits for it; {word}")
    return None


def _begin(machine: Machine, foreground: Foreground, incoming: str | None, *, paused: bool, afresh: bool) -> None:
    if incoming == "defer":
        machine.expect_arrival()
        note("waiting to be told where a machine arrives")
    elif incoming is not None:
        arriving = machine.incoming(incoming, start=False if paused else None)
        foreground.expect(arriving)
        note(f"listening on {arriving.uri}")
    elif afresh:
        machine.start_afresh()
        note(f"machine {machine.name!r} runs")
    elif paused:
        note(f"machine {machine.name!r} is ready and paused")
    else:
        machine.start()
        note(f"machine {machine.name!r} runs")
