"""The order of sections: every pair of state and kind against the table of the format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.abc import SectionKind
from whimbrel.errors import StreamError
from whimbrel.wire.order import SectionOrder, SectionState
from whimbrel.wire.skeleton import SectionHeader

START, PART, END, FULL = SectionKind.START, SectionKind.PART, SectionKind.END, SectionKind.FULL

# How to bring section 7 into each state, and what may come then.
STATES = {
    SectionState.UNKNOWN: ((), {START, FULL}),
    SectionState.STARTED: ((START, PART), {PART, END}),
    SectionState.ENDED: ((START, END), set()),
    SectionState.FULL: ((FULL,), set()),
}


def head(kind, number, name=None):
    return SectionHeader(number, name or f"s{number}", 0, 1) if kind in (START, FULL) else number


@pytest.mark.parametrize("kind", SectionKind)
@pytest.mark.parametrize("state", SectionState)
def test_every_pair(state, kind):
    order = SectionOrder(4096)
    way, legal = STATES[state]
    for step in way:
        order.accept(step, head(step, 7))
    if kind in legal:
        assert order.accept(kind, head(kind, 7)) == SectionHeader(7, "s7", 0, 1)
        return
    with pytest.raises(StreamError) as caught:
        order.accept(kind, head(kind, 7))
    message = str(caught.value)
    assert kind.name in message
    assert state.value in message
    assert ("id 7" if state is SectionState.UNKNOWN else "'s7' (id 7)") in message


@pytest.mark.parametrize("kind", SectionKind)
def test_a_refusal_changes_nothing(kind):
    order = SectionOrder(4096)
    order.accept(START, head(START, 7))
    if kind not in STATES[SectionState.STARTED][1]:
        with pytest.raises(StreamError):
            order.accept(kind, head(kind, 7, "other"))
    assert order.accept(PART, 7).idstr == "s7"
    assert order.accept(END, 7).idstr == "s7"


def test_names_may_repeat_and_ids_may_not():
    order = SectionOrder(4096)
    order.accept(FULL, SectionHeader(1, "isa-ide", 0, 1))
    order.accept(FULL, SectionHeader(2, "isa-ide", 0, 1))
    with pytest.raises(StreamError, match="'isa-ide'"):
        order.accept(FULL, SectionHeader(2, "other", 0, 1))


def test_sections_interleave():
    order = SectionOrder(4096)
    for kind, number in ((START, 1), (START, 2), (PART, 2), (PART, 1), (FULL, 3), (END, 1), (PART, 2), (END, 2)):
        order.accept(kind, head(kind, number))
    assert order.open_sections() == []


def test_what_is_open_is_told():
    order = SectionOrder(4096)
    order.accept(START, head(START, 1))
    order.accept(START, head(START, 2))
    order.accept(FULL, head(FULL, 3))
    order.accept(PART, 1)
    order.accept(END, 2)
    assert order.open_sections() == ["s1"]


@pytest.mark.parametrize("limit", [1, 3, 4096])
def test_the_limit_of_ids(limit):
    order = SectionOrder(limit)
    for number in range(limit):
        kind = FULL if number % 2 else START
        order.accept(kind, head(kind, number * 1_000_003 % 2**32))
    for kind in (START, FULL):
        with pytest.raises(StreamError, match=rf"more than {limit} sections.*\[limits\] sections"):
            order.accept(kind, head(kind, 2**32 - 1))
    assert order.accept(PART, 0).idstr == "s0"


@given(st.lists(st.tuples(st.sampled_from(SectionKind), st.integers(0, 3)), max_size=40))
def test_any_sequence_agrees_with_a_plain_model(steps):
    order = SectionOrder(4096)
    states = {}
    moves = {(None, START): "open", (None, FULL): "closed", ("open", PART): "open", ("open", END): "closed"}
    for kind, number in steps:
        following = moves.get((states.get(number), kind))
        if following is None:
            with pytest.raises(StreamError):
                order.accept(kind, head(kind, number))
        else:
            assert order.accept(kind, head(kind, number)).section_id == number
            states[number] = following
    assert sorted(order.open_sections()) == sorted(f"s{n}" for n, state in states.items() if state == "open")
