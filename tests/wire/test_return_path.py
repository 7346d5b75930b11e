"""Messages of the return path: golden bytes, and which may come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import return_path
from whimbrel.wire.return_path import MessageType, Pong, Shut, SwitchoverAck

GOLDEN = {
    "shut 0": (Shut(0), "00 01  00 04  00 00 00 00"),
    "shut 1": (Shut(1), "00 01  00 04  00 00 00 01"),
    "pong": (Pong(0xDEADBEEF), "00 02  00 04  de ad be ef"),
    "ack": (SwitchoverAck(), "00 07  00 00"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_messages(three_ways, case):
    value, data = GOLDEN[case][0], bytes.fromhex(GOLDEN[case][1])
    assert return_path.encode(value) == data
    three_ways(return_path.parse_message, data, value)


def test_the_numbers_are_those_of_the_format():
    assert {kind.name: int(kind) for kind in MessageType} == {
        "SHUT": 1,
        "PONG": 2,
        "REQ_PAGES_ID": 3,
        "REQ_PAGES": 4,
        "RECV_BITMAP": 5,
        "RESUME_ACK": 6,
        "SWITCHOVER_ACK": 7,
        "WORD": 0x7701,
    }


@pytest.mark.parametrize("number", [3, 4, 5, 6])
@pytest.mark.parametrize("length", ["00 00", "00 0c", "ff ff"])
def test_what_belongs_to_postcopy_is_refused_by_its_name(refused, number, length):
    message = refused(return_path.parse_message, bytes([0, number]) + bytes.fromhex(length))
    assert MessageType(number).name in message
    assert "postcopy" in message


@pytest.mark.parametrize("number", [0, 8, 256, 65535])
def test_unknown_messages_are_refused(refused, number):
    assert f"unknown return-path message {number}" in refused(
        return_path.parse_message, number.to_bytes(2, "big") + b"\0\0"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("00 01  00 00", "SHUT is 0 bytes long, expected 4"),
        ("00 01  ff ff", "SHUT is 65535 bytes long, expected 4"),
        ("00 02  00 05", "PONG is 5 bytes long, expected 4"),
        ("00 07  00 01", "SWITCHOVER_ACK is 1 bytes long, expected 0"),
    ],
)
def test_a_wrong_length_is_refused_before_the_payload_is_asked_for(refused, data, words):
    assert words in refused(return_path.parse_message, bytes.fromhex(data))


@given(st.data())
def test_damaged_bytes(outcome, mutated, data):
    good = bytes.fromhex(data.draw(st.sampled_from([text for _, text in GOLDEN.values()])))
    kind, what = outcome(return_path.parse_message, data.draw(mutated(good)))
    assert kind != "value" or isinstance(what, Shut | Pong | SwitchoverAck)
    assert kind != "refused" or isinstance(what, StreamError)


@given(st.binary(max_size=16))
def test_any_bytes(outcome, data):
    outcome(return_path.parse_message, data)
