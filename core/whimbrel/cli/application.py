"""The command group, and the one place where an error becomes a sentence and an exit status.

Whatever a command raises ends here: one line on standard error, `whimbrel: …`, that says what to do; with `--json` an
object with `error-code` and `error-desc` on standard output as well; a traceback only with `--debug`.

====== ================================================================================
status means
====== ================================================================================
0      it was done
1      it failed
2      it was asked for wrongly: usage, settings, addresses; nothing has changed
3      a machine was let go of, and the destination's last word is missing
130    interrupted or cancelled (143: terminated, 129: hung up); a machine that was not let go of goes on
====== ================================================================================
"""

from __future__ import annotations

import re
import resource
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

import attrs
import click

from whimbrel.cli._output import complain, print_json
from whimbrel.cli.cancel import cancel
from whimbrel.cli.demo import demo
from whimbrel.cli.inspect import inspect
from whimbrel.cli.migrate import migrate
from whimbrel.cli.plugins import plugins
from whimbrel.cli.receive import receive
from whimbrel.cli.run import run
from whimbrel.cli.send import send
from whimbrel.cli.set import set_value
from whimbrel.cli.status import status
from whimbrel.errors import UnknownNameError, WhimbrelError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "whimbrel"]

INTERRUPTED: Final = 130
USAGE: Final = 2
MANY: Final = 20  # names


@attrs.define
class Invocation:
    """What an error needs to know of the command that raised it."""

    debug: bool = False


class Application(click.Group):
    """A group that reports errors as this module says, also when a test's runner calls it."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; exits the process unless `standalone_mode` is off."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        invocation = extra.setdefault("obj", Invocation())
        given = list(sys.argv[1:] if args is None else args)
        try:
            status = super().main(given, prog_name, complete_var, standalone_mode=False, **extra)
        except Exception as exc:  # noqa: BLE001 - the last line of defence, which tells instead of showing a traceback
            if invocation.debug:
                traceback.print_exception(exc)
            sys.exit(_report(exc, as_json="--json" in given))
        sys.exit(status if isinstance(status, int) else 0)


def _report(exc: Exception, *, as_json: bool) -> int:
    """Say what is wrong and return the exit status for it."""
    if isinstance(exc, click.Abort):
        code, status, text = "cancelled", INTERRUPTED, "interrupted"
    elif isinstance(exc, WhimbrelError):
        code, status, text = exc.code, exc.exit_code, _sentence(exc)
    elif isinstance(exc, click.ClickException):
        code, status, text = "usage", USAGE, _usage(exc)
    else:
        code, status, text = "bug", 1, f"unexpected {type(exc).__name__}: {exc}; --debug shows where it comes from"
    complain(text)
    if as_json:
        print_json({"error-code": code, "error-desc": text})
    return status


def _sentence(exc: WhimbrelError) -> str:
    """What the error says; a list of names that is no sentence any more is left out where there is a better hint."""
    text = str(exc)
    if isinstance(exc, UnknownNameError) and len(exc.known) > MANY:
        text = re.sub(r"\? There are: .*", "?", text)
    return text


def _usage(exc: click.ClickException) -> str:
    text = exc.format_message().rstrip(".")
    if isinstance(exc, click.UsageError) and exc.ctx is not None:
        return f"{text}; `{exc.ctx.command_path} --help` tells how"
    return text


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Invocation).debug = value


@click.group(
    name="whimbrel",
    cls=Application,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug, help="Show tracebacks.")
@click.version_option(package_name="whimbrel", message="%(prog)s %(version)s")
@click.pass_context
def whimbrel(ctx: click.Context) -> int:
    """Live migration for Python: run machines, and move them while they run."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
    return USAGE


for _command in (run, migrate, status, cancel, set_value, receive, send, inspect, plugins, demo):
    whimbrel.add_command(_command)


def main() -> None:
    """Run the command line of this process, and exit. Neither it nor its children leave a core: a guest is in those."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whimbrel.main(prog_name="whimbrel")
