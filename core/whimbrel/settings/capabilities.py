"""QEMU's migration capabilities, in the order of its enumeration (the wire format, section 10.2).

Those that whimbrel does not have yet are here too, always false: a peer that asks for the list gets QEMU's, and
switching one of them on is refused in a sentence rather than taken and forgotten.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from whimbrel.settings.kinds import Flag, setting
from whimbrel.settings.section import Rule, Section, judged

__all__ = ["Capabilities"]

_FLAG = Flag()


def _works(doc: str, since: str) -> bool:
    switched: bool = setting(_FLAG, False, doc, since=since)
    return switched


def _later(doc: str, since: str, instead: str) -> bool:
    switched: bool = setting(_FLAG, False, doc, since=since, unavailable=instead)
    return switched


@attrs.define(kw_only=True, on_setattr=judged)
class Capabilities(Section):
    """What a migration may make use of; all false at first.

    They count from the start of a migration, and the two ends must agree where the stream depends on them. Whoever
    sets one while a migration runs must refuse it first, as QEMU does ("There's a migration process in progress").
    """

    noun: ClassVar[str] = "capability"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            ("multifd", "compress"),
            lambda multifd, compress: not (multifd and compress),
            "Multifd is not compatible with compress",
        ),
    )

    xbzrle: bool = _works("send what changed within a page that was sent before", "QEMU 1.2")
    rdma_pin_all: bool = _works(
        "with rdma: register all memory at the start, in place of each MiB when it is first sent; counts where it is "
        "on at both ends",
        "QEMU 2.0",
    )
    auto_converge: bool = _works("slow a guest down that writes faster than the link carries", "QEMU 1.6")
    zero_blocks: bool = _works("send chunks of a drive that are all zero as a mark", "QEMU 1.6")
    compress: bool = _later("compress pages one by one with zlib", "QEMU 2.4", "pages are sent as they are")
    events: bool = _works("send the QMP events MIGRATION and MIGRATION_PASS", "QEMU 2.4")
    postcopy_ram: bool = _later(
        "run the guest at the destination before all of its memory is there",
        "QEMU 2.6",
        "the guest runs at the destination when all of its memory is there",
    )
    x_colo: bool = _later("keep a second machine in lock step", "QEMU 2.8", "a migration moves a machine once")
    release_ram: bool = _later(
        "free memory at the source as it is sent in post-copy", "QEMU 2.9", "the source keeps its memory to the end"
    )
    block: bool = _works("send drives along", "QEMU 2.11")
    return_path: bool = _works(
        "insist on a way back from the destination: refuse a transport that has none. Where there is one, it is "
        "always open, so that the source learns whether the destination has loaded everything",
        "QEMU 2.10",
    )
    pause_before_switchover: bool = _works(
        "stop the guest, then wait in pre-switchover for migrate-continue before its devices are sent", "QEMU 2.11"
    )
    multifd: bool = _works(
        "send pages over several connections; must be on at both ends, with the same multifd-channels", "QEMU 4.0"
    )
    dirty_bitmaps: bool = _later("send the dirty bitmaps of drives along", "QEMU 2.12", "drives have no dirty bitmaps")
    postcopy_blocktime: bool = _later(
        "measure how long post-copy blocks the guest", "QEMU 3.0", "there is no post-copy"
    )
    late_block_activate: bool = _later(
        "take drives over only when the guest is told to run",
        "QEMU 3.0",
        "drives are taken over before that",
    )
    x_ignore_shared: bool = _later(
        "leave out memory that both ends share", "QEMU 4.0", "all memory is sent, shared or not"
    )
    validate_uuid: bool = _works("send the machine's UUID, which the destination compares with its own", "QEMU 4.2")
    background_snapshot: bool = _later(
        "save the machine as it is at the start while it runs on",
        "QEMU 6.0",
        "a stream holds the machine as it is at the end",
    )
    zero_copy_send: bool = _later(
        "let the kernel send pages without copying them", "QEMU 7.1", "the kernel copies what is sent"
    )
    postcopy_preempt: bool = _later(
        "give pages that the guest waits for a connection of their own", "QEMU 7.1", "there is no post-copy"
    )
    switchover_ack: bool = _works(
        "let the source wait, before it stops the guest, until the destination says that it is ready; "
        "must be on at both ends, and needs a transport with a way back",
        "QEMU 8.1",
    )
