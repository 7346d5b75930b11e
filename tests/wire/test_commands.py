"""Commands: golden bytes, and which may come."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import StreamError
from whimbrel.wire import commands
from whimbrel.wire.commands import Attempt, Digest, OpenReturnPath, Ping

GOLDEN = {
    "open": (OpenReturnPath(), "08  00 01  00 00"),
    "ping 1": (Ping(1), "08  00 02  00 04  00 00 00 01"),
    "ping beef": (Ping(0xDEADBEEF), "08  00 02  00 04  de ad be ef"),
    "attempt": (
        Attempt(bytes(range(16)), 7),
        "08  77 01  00 18  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f  00 00 00 00 00 00 00 07",
    ),
    "digest": (
        Digest(258, 1 << 40, bytes(range(32))),
        "08  77 02  00 30  00 00 00 00 00 00 01 02  00 00 01 00 00 00 00 00" + bytes(range(32)).hex(),
    ),
    "ping 0": (Ping(0), "08  00 02  00 04  00 00 00 00"),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_commands(three_ways, case):
    value, data = GOLDEN[case][0], bytes.fromhex(GOLDEN[case][1])
    assert commands.encode(value) == data
    three_ways(commands.parse_command, data[1:], value)


def test_the_numbers_are_those_of_the_format():
    assert {command.name: int(command) for command in commands.Command} == {
        "OPEN_RETURN_PATH": 1,
        "PING": 2,
        "POSTCOPY_ADVISE": 3,
        "POSTCOPY_LISTEN": 4,
        "POSTCOPY_RUN": 5,
        "POSTCOPY_RAM_DISCARD": 6,
        "PACKAGED": 7,
        "ENABLE_COLO": 8,
        "POSTCOPY_RESUME": 9,
        "RECV_BITMAP": 10,
        "SWITCHOVER_START": 11,
        "ATTEMPT": 0x7701,
        "DIGEST": 0x7702,
    }


@pytest.mark.parametrize("number", [*range(3, 12)])
@pytest.mark.parametrize("length", ["00 00", "00 04", "ff ff"])
def test_what_needs_a_capability_is_refused_by_its_name(refused, number, length):
    message = refused(commands.parse_command, bytes([0, number]) + bytes.fromhex(length))
    assert commands.Command(number).name in message
    assert "switch the capability off" in message


@pytest.mark.parametrize("number", [0, 12, 255, 256, 65535])
def test_unknown_commands_are_refused(refused, number):
    assert f"unknown command {number}" in refused(commands.parse_command, number.to_bytes(2, "big") + b"\0\0")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("00 01  00 01", "OPEN_RETURN_PATH is 1 bytes long, expected 0"),
        ("00 01  ff ff", "OPEN_RETURN_PATH is 65535 bytes long, expected 0"),
        ("00 02  00 00", "PING is 0 bytes long, expected 4"),
        ("00 02  00 03", "PING is 3 bytes long, expected 4"),
        ("00 02  00 05", "PING is 5 bytes long, expected 4"),
    ],
)
def test_a_wrong_length_is_refused_before_the_payload_is_asked_for(refused, data, words):
    assert words in refused(commands.parse_command, bytes.fromhex(data))


@given(st.data())
def test_damaged_bytes(outcome, mutated, data):
    good = bytes.fromhex(data.draw(st.sampled_from([text for _, text in GOLDEN.values()])))
    kind, what = outcome(commands.parse_command, data.draw(mutated(good[1:])))
    assert kind != "value" or isinstance(what, OpenReturnPath | Ping | Attempt | Digest)
    assert kind != "refused" or isinstance(what, StreamError)


@given(st.binary(max_size=16))
def test_any_bytes(outcome, data):
    outcome(commands.parse_command, data)
