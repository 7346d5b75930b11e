"""`whimbrel demo`: a real workload, moved while it runs from one process to another, and checked byte for byte."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from whimbrel.cli._options import json_option, parameter
from whimbrel.cli._output import complain, print_json, print_rows
from whimbrel.errors import MigrationCancelled
from whimbrel.units import parse_seconds, parse_size

if TYPE_CHECKING:
    from whimbrel.cli._demonstration import Result


def _finite(_: click.Context, __: click.Parameter, rate: float | None) -> float | None:
    if rate is not None and not math.isfinite(rate):
        raise click.BadParameter(f"{rate} is not a number of updates.")
    return rate


@click.command()
@click.option("--size", metavar="SIZE", default="512MiB", show_default=True, help="Memory of the machine.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    callback=_finite,
    metavar="NUMBER",
    help="Updates per second, 0 for as many as possible.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=1, show_default=True, help="Of the random updates.")
@click.option(
    "--guest",
    type=click.Choice(["thread", "process"]),
    default="thread",
    show_default=True,
    help="Where the updates are made: on a thread, or in a process of their own.",
)
@click.option("--transport", type=click.Choice(["tcp", "unix", "rdma"]), default="tcp", show_default=True)
@click.option(
    "--max-bandwidth", metavar="RATE", default="0", help="The most that is sent per second; default no limit."
)
@click.option(
    "--downtime-limit", metavar="TIME", default="300ms", show_default=True, help="How long it may stand still."
)
@click.option("--timeout", metavar="TIME", default="60s", show_default=True, help="How long the migration may take.")
@json_option
def demo(
    size: str,
    rate: float | None,
    seed: int,
    guest: str,
    transport: str,
    max_bandwidth: str,
    downtime_limit: str,
    timeout: str,
    as_json: bool,
) -> int:
    """Move a machine under load from one process to another, and check it.

    The machine is a table of records under a stream of random updates. It is moved while they go on; then the same
    number of updates is computed afresh, and every byte compared.
    """
    parameters = {
        "max-bandwidth": parameter("max-bandwidth", max_bandwidth),
        "downtime-limit": parameter("downtime-limit", downtime_limit),
    }
    count, patience = parse_size(size), parse_seconds(timeout)
    from whimbrel.cli._demonstration import check_size, demonstrate

    check_size(count)
    try:
        result = demonstrate(
            size=count,
            rate=rate,
            seed=seed,
            guest=guest,
            transport=transport,
            parameters=parameters,
            timeout=patience,
            quiet=as_json,
        )
    except KeyboardInterrupt:
        raise MigrationCancelled("interrupted; both processes were ended, and the machine with them") from None
    if as_json:
        print_json(result.as_dict())
    else:
        print_rows(result.rows())
    return _conclude(result)


def _conclude(result: Result) -> int:
    if result.problem:
        complain(result.problem)
    return 1 if result.problem else 0
