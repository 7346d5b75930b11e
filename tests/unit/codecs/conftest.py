"""A slow XBZRLE decoder that is obviously right, to hold the fast one against."""

import hypothesis
import pytest

from whimbrel.errors import StreamError

hypothesis.settings.register_profile("steady", derandomize=True, deadline=None)
hypothesis.settings.load_profile("steady")

PAGE = 4096


class Malformed(Exception):
    """A payload breaks one of the rules of section 3.2."""


def length_at(payload, at):
    """The length at `at`, and where what follows it begins."""
    if len(payload) - at < 2:
        raise Malformed("fewer than 2 bytes remain before a length")
    if payload[at] < 0x80:
        return payload[at], at + 1
    if payload[at + 1] >= 0x80:
        raise Malformed("a length of more than 14 bits")
    return payload[at] & 0x7F | payload[at + 1] << 7, at + 2


def slow_decode(payload, page):
    """The page after the change, as section 3.2 says, one byte after the other."""
    page, at, reach = bytearray(page), 0, 0
    while at < len(payload):
        same, at = length_at(payload, at)
        if same == 0 and reach > 0:
            raise Malformed("0 unchanged bytes behind a run")
        reach += same
        count, at = length_at(payload, at)
        if count == 0:
            raise Malformed("0 changed bytes")
        if count > len(payload) - at:
            raise Malformed("fewer bytes than the run has")
        if reach + count > PAGE:
            raise Malformed("out of the page")
        for _ in range(count):
            page[reach] = payload[at]
            reach, at = reach + 1, at + 1
    return bytes(page)


@pytest.fixture(scope="session", name="slow_decode")
def _slow_decode():
    """`slow_decode(payload, page)`: the page after it, or StreamError."""

    def decode(payload, page):
        try:
            return slow_decode(payload, page)
        except Malformed as exc:
            raise StreamError(str(exc)) from exc

    return decode
