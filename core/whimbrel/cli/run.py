"""`whimbrel run`: a machine in the foreground, until it has moved away or somebody ends it."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from whimbrel.cli._options import capability_option, config_option, overrides, plaintext_option, set_option
from whimbrel.cli._output import note

if TYPE_CHECKING:
    from whimbrel.cli._foreground import Foreground
    from whimbrel.migration import Machine


@click.command()
@click.argument("app")
@click.option(
    "--incoming", metavar="URI|defer", help="Wait for a machine there; `defer` waits to be told where by QMP."
)
@click.option("--qmp", metavar="ADDRESS", help="Serve a monitor at unix:PATH or tcp:HOST:PORT.")
@click.option("--allow-exec", is_flag=True, help="Let the monitor's clients name programs to run (exec:).")
@click.option("--paused", is_flag=True, help="Do not start the machine; QMP's `cont` does.")
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

    Behind a monitor the process lingers for two seconds after a move or a failure, so that the monitor's clients learn
    how it ended; `quit` or Ctrl-C ends that. After a move the monitor takes no new clients, and its address is free.
    """
    if incoming == "defer" and qmp is None:
        raise click.UsageError("--incoming defer is told where to wait by QMP; give it --qmp as well")
    if allow_exec and qmp is None:
        raise click.UsageError("--allow-exec is about the monitor's clients; give it --qmp as well")
    from whimbrel.cli._foreground import Foreground
    from whimbrel.cli._machines import build, check_names
    from whimbrel.cli._signals import Signals

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what the notifier `log` says goes here

    with ExitStack() as stack:
        machine = build(app, config, overrides(capabilities, assignments))
        foreground = stack.enter_context(Foreground(machine, stay=stay))
        stack.enter_context(Signals(foreground.interrupt))
        stack.enter_context(machine)  # behind it, so that signals are in its hands until the machine is closed
        check_names(machine)
        if qmp is not None:
            from whimbrel.monitor import MonitorServer

            server = stack.enter_context(MonitorServer(machine, qmp, on_quit=foreground.quit, allow_exec=allow_exec))
            foreground.monitored_by(server)
            note(f"monitor on {server.address}")
        _begin(machine, foreground, incoming, paused=paused)
        return foreground.stay_until_the_end()


def _begin(machine: Machine, foreground: Foreground, incoming: str | None, *, paused: bool) -> None:
    if incoming == "defer":
        machine.expect_arrival()
        note("waiting to be told where a machine arrives")
    elif incoming is not None:
        arriving = machine.incoming(incoming, start=False if paused else None)
        foreground.expect(arriving)
        note(f"listening on {arriving.uri}")
    elif paused:
        note(f"machine {machine.name!r} is ready and paused")
    else:
        machine.start()
        note(f"machine {machine.name!r} runs")
