"""A tail that grows: at each byte the walk says what it can, and in the end the same as of the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire.footers import FooterWalk
from whimbrel.wire.skeleton import Element
from whimbrel.wire.tail import section_at, split_by_footers

from . import tails
from .tails import EOF, plain_device, u32

PING = b"\x08\0\x02\0\x04abcd"
START = b"\x01" + u32(900) + b"\x03ram" + u32(0) + u32(4)


def found(walk, tail):
    return [section_at(tail, span) for span in walk.spans]


@given(tails.devices(depth=1), st.data())
def test_in_pieces_as_whole(devices, data):
    """What is certain stays, and what is likely is made up for by the bytes behind it."""
    behind = data.draw(st.sampled_from([EOF, b"", PING, START, b"\x02" + u32(999), tails.ending(devices)]))
    whole = tails.tail(devices, behind=behind)
    size = data.draw(st.integers(1, 40))
    walk, tail, certain, element = FooterWalk(started=[999]), bytearray(), [], None
    for at in range(0, len(whole), size):
        tail += whole[at : at + size]
        element = walk.feed(tail)
        now = found(walk, tail)
        assert now[: len(certain)] == certain
        certain = now if walk.certain else now[:-1]
        assert certain == list(split_by_footers(whole, started=[999]).sections)[: len(certain)]
        assert element is None or element.offset == walk.end
    split = split_by_footers(whole, started=[999])
    assert found(walk, tail) == list(split.sections)
    assert [each.body for each in split.sections] == [each.body for each in devices]
    assert walk.end == split.end == len(whole) - len(behind)
    assert (element.element if element else None) == (behind[0] if behind else None)


@settings(max_examples=20)
@given(tails.devices(most=2, depth=1))
def test_byte_by_byte_with_a_ping_behind(devices):
    """The source waits for its answer, so its last byte must be enough; and nothing else may pass for it."""
    whole = tails.tail(devices, behind=PING)
    walk, tail = FooterWalk(), bytearray()
    for number, byte in enumerate(whole, 1):
        tail.append(byte)
        element = walk.feed(tail)
        if element and element.element is Element.COMMAND:
            assert number == len(whole)
    assert element.element is Element.COMMAND
    assert tail[element.offset : element.end] == PING
    assert [each.body for each in found(walk, tail)] == [each.body for each in devices]
    walk.pass_over(element.end)
    assert walk.feed(tail) is None
    tail += EOF
    assert walk.feed(tail).element is Element.EOF
    assert not walk.certain or walk.end == len(whole)
    tail += b"\x06\0\0\1\0{"
    assert walk.feed(tail) is None, "it may still be something else"
    tail += b'"'
    assert walk.feed(tail).element is Element.EOF
    assert len(walk.spans) == len(devices)


def test_a_ping_behind_what_may_yet_be_a_command():
    """The end of a body may look like a long command; the ping behind the true footer must not wait for the rest."""
    footer = b"\x7e" + u32(1)
    device = plain_device("a", 1, b"body" + footer + b"\x08\0\x06\1\0" + bytes(9))
    whole = bytearray(tails.tail([device], behind=PING))
    walk = FooterWalk()
    element = walk.feed(whole)
    assert (element.element, walk.certain) == (Element.COMMAND, False)
    assert found(walk, whole)[0].body == device.body
    walk.pass_over(element.end)
    whole += EOF
    assert walk.feed(whole).element is Element.EOF
    assert found(walk, whole)[0].body == device.body


def test_what_was_likely_is_taken_back():
    footer = b"\x7e" + u32(1)
    device = plain_device("a", 1, b"body" + footer + EOF + b"more")
    whole = tails.tail([device], behind=EOF)
    walk = FooterWalk()
    first = device.whole.index(footer)
    for size, ends in [(first, []), (first + 5, [first]), (first + 6, [first]), (first + 7, []), (len(whole), [-6])]:
        walk.feed(whole[:size])
        assert [span.end for span in walk.spans] == [end % len(whole) for end in ends]
        assert walk.certain == (not ends)
        assert (walk.inside is None) == bool(ends)


def test_parts_of_known_sections_and_new_ones():
    device = plain_device("a", 5, b"body")
    for behind, element in [(b"\x02" + u32(2), 2), (b"\x03" + u32(2), 3), (START, 1)]:
        walk = FooterWalk(started=[2])
        shown = walk.feed(tails.tail([device], behind=behind))
        assert (shown.element, walk.certain, len(walk.spans)) == (element, True, 1)
        assert shown.section_id == (900 if element == 1 else 2)
        assert (shown.header is not None) == (element == 1)
    walk = FooterWalk()
    assert walk.feed(tails.tail([device], behind=b"\x02" + u32(2))) is None
    assert walk.inside.idstr == "a"


def test_it_goes_on_behind_other_elements():
    devices = [plain_device("a", 5, b"body"), plain_device("b", 6, b"and"), plain_device("c", 7, b"soul")]
    whole = b"".join(tails.tail([each], behind=PING) for each in devices) + EOF
    walk = FooterWalk()
    for count in (1, 2, 3):
        element = walk.feed(whole)
        assert (element.element, len(walk.spans)) == (Element.COMMAND, count)
        walk.pass_over(element.end)
    assert walk.feed(whole).element is Element.EOF
    assert [each.body for each in found(walk, whole)] == [each.body for each in devices]


def test_what_is_no_section_is_refused_for_ever():
    walk = FooterWalk()
    assert walk.feed(b"") is None
    for _ in range(2):
        with pytest.raises(StreamError, match="byte 0 of the tail is 0x07"):
            walk.feed(b"\x07")


def test_a_footer_that_does_not_come():
    device = plain_device("a", 5, b"x" * 100)
    walk, tail = FooterWalk(body_limit=100), bytearray(device.whole)
    assert walk.feed(tail) is None
    tail += b"x" * 4
    assert walk.feed(tail) is None
    tail += b"x"
    with pytest.raises(StreamError, match="no footer within 100 bytes"):
        walk.feed(tail)


def test_the_tail_may_grow_between_two_looks():
    """No view of it is kept, since a bytearray with views cannot grow."""
    tail = bytearray(tails.tail([plain_device("a", 5, b"body")]))
    walk = FooterWalk()
    element = walk.feed(tail)
    sections = found(walk, tail)
    tail += b"x" * 10_000
    del tail[:]
    assert sections[0].body == b"body"
    assert element.element is Element.EOF
