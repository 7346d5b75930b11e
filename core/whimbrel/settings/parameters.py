"""QEMU's migration parameters with its defaults, ranges and error texts (the wire format, sections 10.2 and 10.3).

Kept as QEMU has them, odd as they look: a negative size wraps around, so that ``max-bandwidth`` -1 is as good as no
limit; a ``multifd-zlib-level`` of 10 and a ``multifd-zstd-level`` of 21 pass. Parameters of capabilities that
whimbrel does not have yet are stored and otherwise unused; those that would change what is sent are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import attrs

from whimbrel import units
from whimbrel.settings.kinds import Choice, Flag, Method, Number, StringOrNull, rate, setting, size
from whimbrel.settings.section import Rule, Section, judged

__all__ = ["Parameters"]

_PAGE_SIZE: Final = 4096  # of every target whose stream whimbrel speaks


def _bounded(low: int, high: int, *, unit: str = "", bits: int = 64) -> Number:
    unit_text = f" {unit}" if unit else ""
    return Number(
        bits=bits,
        low=low,
        high=high,
        unit=unit,
        parse=units.parse_milliseconds if unit == "ms" else None,
        range_text=f"a value between {low} and {high}",
        expects=f"a whole number from {low} to {high}{unit_text}",
    )


def _percent(low: int, high: int) -> Number:
    return Number(
        bits=8,
        low=low,
        high=high,
        unit="%",
        range_text=f"an integer in the range of {low} to {high}",
        expects=f"a whole number from {low} to {high}",
    )


_FLAG: Final = Flag()
_LEVEL: Final = Number(bits=8, expects="a whole number from 0 to 255")
_COUNT: Final = _bounded(1, 255, bits=8)
_DOWNTIME: Final = Number(
    high=2000 * 1000,
    unit="ms",
    parse=units.parse_milliseconds,
    range_text="an integer in the range of 0 to (2000 * 1000) ms",
    expects='milliseconds from 0 to 2000000, such as 300 or "300ms"',
)
_DELAY: Final = Number(
    bits=32, unit="ms", parse=units.parse_milliseconds, expects='milliseconds, such as 20000 or "20s"'
)
_TIMEOUT: Final = Number(
    unit="ms",
    parse=units.parse_milliseconds,
    range_text="a number of milliseconds",
    expects='milliseconds such as 60000 or "60s"; 0 for ever',
)
_CACHE: Final = size(
    'a power of two from 4096 up, such as 67108864 or "64MiB"',
    low=_PAGE_SIZE,
    accepts=lambda count: count.bit_count() == 1,
    range_text="a power of two no less than the target page size",
)
_MOST_THROTTLE: Final = Number(
    bits=8,
    high=99,
    unit="%",
    range_text="an integer in the range of cpu_throttle_initial to 99",
    expects="a whole number from cpu-throttle-initial to 99",
)


@attrs.define(kw_only=True, on_setattr=judged)
class Parameters(Section):
    """The numbers and names that steer a migration; they may be changed by any thread while one runs.

    Bandwidths are in bytes per second and times in milliseconds. From Python, files and the command line a string
    with a unit does too: ``parameters.set("max-bandwidth", "1GiB")``.
    """

    noun: ClassVar[str] = "parameter"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            ("cpu_throttle_initial", "max_cpu_throttle"),
            lambda initial, most: initial <= most,
            f"Parameter 'max_cpu_throttle' expects {_MOST_THROTTLE.range_text}",
        ),
    )
    refused: ClassVar[Mapping[str, str]] = {"block-bitmap-mapping": "drives have no dirty bitmaps"}

    announce_initial: int = setting(
        _bounded(0, 100_000, unit="ms"),
        50,
        "delay between the first announcement of an arrived guest, which is made at once, and the second",
        since="QEMU 4.0",
    )
    announce_max: int = setting(
        _bounded(0, 100_000, unit="ms"), 550, "longest delay between two announcements", since="QEMU 4.0"
    )
    announce_rounds: int = setting(_bounded(0, 1000), 5, "how often an arrived guest is announced", since="QEMU 4.0")
    announce_step: int = setting(
        _bounded(0, 10_000, unit="ms"),
        100,
        "by how much the delay grows from one announcement to the next",
        since="QEMU 4.0",
    )
    block_incremental: bool = setting(
        _FLAG,
        False,
        "send only what is allocated of a drive: the destination has the rest",
        since="QEMU 2.10",
    )
    compress_level: int = setting(
        _bounded(0, 9, bits=8), 1, "zlib level of `compress`: 1 is quick, 9 is small", since="QEMU 2.4"
    )
    compress_threads: int = setting(_COUNT, 8, "threads that compress for `compress`", since="QEMU 2.4")
    compress_wait_thread: bool = setting(
        _FLAG, True, "whether a page waits for a free thread of `compress` or is sent as it is", since="QEMU 3.1"
    )
    cpu_throttle_increment: int = setting(
        _percent(1, 99), 10, "by how much `auto-converge` slows the guest down each time", since="QEMU 2.7"
    )
    cpu_throttle_initial: int = setting(
        _percent(1, 99), 20, "how much of its time `auto-converge` takes from the guest at first", since="QEMU 2.7"
    )
    cpu_throttle_tailslow: bool = setting(
        _FLAG, False, "whether `auto-converge` takes smaller steps towards its end", since="QEMU 5.1"
    )
    decompress_threads: int = setting(_COUNT, 2, "threads that unpack for `compress`", since="QEMU 2.4")
    downtime_limit: int = setting(
        _DOWNTIME, 300, "how long the guest may stand still at the switchover", since="QEMU 2.8"
    )
    max_bandwidth: int = setting(rate(), 128 << 20, "the most that is sent while the guest runs", since="QEMU 2.8")
    max_cpu_throttle: int = setting(
        _MOST_THROTTLE, 99, "the most of its time that `auto-converge` takes from the guest", since="QEMU 3.1"
    )
    max_postcopy_bandwidth: int = setting(
        rate(), 0, "the most that is sent in the background of post-copy", since="QEMU 3.0"
    )
    multifd_channels: int = setting(_COUNT, 2, "connections of `multifd`; both ends need the same", since="QEMU 4.0")
    multifd_compression: str = setting(
        Method("none", "zlib", "zstd"), "none", "how `multifd` compresses; both ends need the same", since="QEMU 5.0"
    )
    multifd_zlib_level: int = setting(_LEVEL, 1, "zlib level of `multifd`, 0 to 9", since="QEMU 5.0")
    multifd_zstd_level: int = setting(_LEVEL, 1, "Zstandard level of `multifd`, 0 to 20", since="QEMU 5.0")
    throttle_trigger_threshold: int = setting(
        _percent(1, 100),
        50,
        "share of what a round sent that may be dirty again before `auto-converge` steps in",
        since="QEMU 5.0",
    )
    tls_authz: str = setting(
        StringOrNull(),
        "",
        "whose certificates may connect to a destination: names with commas between them, `*` for any part, or the "
        "path of a file with one a line; empty for whoever has one of the authority's",
        since="QEMU 4.0",
    )
    tls_creds: str = setting(
        StringOrNull(),
        "",
        "a folder with ca-cert.pem, and with server-cert.pem and server-key.pem at a destination, client-cert.pem and "
        "client-key.pem at a source: all connections are encrypted then, and both ends show who they are",
        since="QEMU 2.7",
    )
    tls_hostname: str = setting(
        StringOrNull(),
        "",
        "the name that the destination's certificate must bear; that of the URI if it is empty",
        since="QEMU 2.7",
    )
    x_checkpoint_delay: int = setting(_DELAY, 20_000, "time between two checkpoints of `x-colo`", since="QEMU 2.8")
    xbzrle_cache_size: int = setting(
        _CACHE, 64 << 20, "memory for the pages that `xbzrle` compares with", since="QEMU 2.11"
    )
    avail_switchover_bandwidth: int = setting(
        rate('bytes per second such as 125000000 or "1GiB/s"; 0 to measure it'),
        0,
        "the bandwidth to reckon with when the moment for the switchover is chosen; limits nothing",
        since="QEMU 8.2",
    )
    switchover_policy: str = setting(
        Choice("wait", "stop", "cancel"),
        "wait",
        "what becomes of a migration that does not meet `downtime-limit` within `switchover-timeout`: it goes on, the "
        "guest is stopped for longer than the limit, or the migration is given up and the guest runs on",
    )
    switchover_timeout: int = setting(
        _TIMEOUT,
        0,
        "how long `downtime-limit` may remain out of reach, from the end of the first round on, before "
        "`switchover-policy` counts; 0 for ever",
    )
