"""The words of RAM records: what a record begins with, and how much follows (wire format, section 2.1)."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from whimbrel.wire.primitives import U64

PAGE_SIZE: Final = 4096
WORD: Final = 8
FLAGS_MASK: Final = PAGE_SIZE - 1


class Flag(IntFlag):
    """The low bits of a record's word."""

    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


EOS_RECORD: Final = U64.pack(Flag.EOS)
FLUSH_RECORD: Final = U64.pack(Flag.MULTIFD_FLUSH)
HOOK_RECORD: Final = U64.pack(Flag.HOOK)

PAGE_STRIDE: Final = WORD + PAGE_SIZE
ZERO_STRIDE: Final = WORD + 1

XBZRLE_ENCODING: Final = 1  # the only one there is
XBZRLE_MAX: Final = PAGE_SIZE  # bytes of a payload, which may be empty
COMPRESSED_MAX: Final = 4110  # the most that zlib makes of a page
