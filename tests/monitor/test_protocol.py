"""Bytes to messages and back, for any bytes."""

import contextlib
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.errors import MonitorError
from whimbrel.monitor import protocol
from whimbrel.monitor.protocol import MAX_DEPTH, MAX_MESSAGE, Framer

FRAMES = [
    (b'{"a":1}', [b'{"a":1}']),
    (b'{"a":1}\n{"b":2}\r\n', [b'{"a":1}', b'{"b":2}']),
    (b'{"a":1}{"b":2}', [b'{"a":1}', b'{"b":2}']),
    (b' \r\n\t{"a":\n {"b": [1,\r\n2]}}\n', [b'{"a":\n {"b": [1,\r\n2]}}']),
    (b'{"a":"}"}{"b":"\\"}"}', [b'{"a":"}"}', b'{"b":"\\"}"}']),
    (b"{'a':'}'}{'b':'\"}'}", [b"{'a':'}'}", b"{'b':'\"}'}"]),
    (b'{"a":"\\\\"}{}', [b'{"a":"\\\\"}', b"{}"]),
    (b"[1,2]\n", [b"[1,2]"]),
    (b"hello there\n{}", [b"hello there\n", b"{}"]),
    (b"42\r\n", [b"42\r\n"]),
    (b'{"a\n{}', [b'{"a\n', b"{}"]),
    (b'{"a\\\n{}', [b'{"a\\', b"{}"]),
    (b'{"a":\xff{}', [b'{"a":\xff', b"{}"]),
    (b'{"a":\x00{}', [b'{"a":\x00', b"{}"]),
    (b"\xff{}", [b"\xff", b"{}"]),
    (b"hello\x00{}", [b"hello\x00", b"{}"]),
    (b"{]{}", [b"{]", b"{}"]),
    (b'{"a":', []),
    (b"", []),
    (b"\n\n \r\n", []),
]


@pytest.mark.parametrize(("data", "messages"), FRAMES)
def test_messages_are_cut_alike_however_they_come(data, messages):
    assert list(Framer().feed(data)) == messages
    single = Framer()
    assert list(itertools.chain.from_iterable(single.feed(bytes((byte,))) for byte in data)) == messages
    assert list(Framer().feed(data + b"\n{}"))[: len(messages)] == messages


def test_a_message_may_be_as_long_as_the_bound_and_no_longer():
    fits = b'"' + b"a" * (MAX_MESSAGE - 3) + b'"\n'
    assert list(Framer().feed(fits)) == [fits]
    with pytest.raises(MonitorError, match="size limit exceeded"):
        list(Framer().feed(b" " + fits[:-1] + b" \n"))
    framer = Framer()
    with pytest.raises(MonitorError, match="size limit exceeded"):
        for _ in range(MAX_MESSAGE // 1000 + 1):
            list(framer.feed(b"[" + b" " * 999 if _ == 0 else b" " * 1000))


def test_brackets_may_be_as_deep_as_the_bound_and_no_deeper():
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert list(Framer().feed(deep)) == [deep]
    with pytest.raises(MonitorError, match="nesting depth limit exceeded"):
        list(Framer().feed(b"[" + deep))


def test_many_strings_in_one_message_cost_no_more_than_their_length():
    message = b"[" + b'"",' * (MAX_MESSAGE // 4) + b"0]"
    assert list(Framer().feed(message)) == [message]


@pytest.mark.parametrize(
    "message",
    [
        b"{'a':\"" + b'\\"' * (MAX_MESSAGE // 2 - 8) + b"\n",
        b'{"a":\'' + b"\\'" * (MAX_MESSAGE // 2 - 8) + b"\n",
        b"['" + b"\\'\"" * (MAX_MESSAGE // 3 - 8) + b"\n",
        b"['" + b'"' * (MAX_MESSAGE - 8) + b"\n",
    ],
    ids=lambda message: repr(message[:12]),
)
def test_a_string_that_does_not_end_costs_no_more_than_its_length(message):
    # Hours, for whoever begins anew at each of its quotes.
    (cut,) = Framer().feed(message)
    with pytest.raises(MonitorError, match="JSON parse error"):
        protocol.parse(cut)


@pytest.mark.parametrize("message", [b"{'a", b"{'a\\", b"{'a\":1}", b"['\\'"])
def test_a_string_that_does_not_end_is_an_error(message):
    with pytest.raises(MonitorError, match="JSON parse error"):
        protocol.parse(message)


VALUES = [
    (b'{"a": 1.5, "b": [true, null, "\\u00e4"]}', {"a": 1.5, "b": [True, None, "ä"]}),
    (b"{'a': 'it\\'s \"so\"'}", {"a": 'it\'s "so"'}),
    (b'{"a": "it\'s", \'b\': "\'"}', {"a": "it's", "b": "'"}),
    (b'"\\ud83d\\ude00"', "😀"),
]


@pytest.mark.parametrize(("message", "value"), VALUES)
def test_json_is_read(message, value):
    assert protocol.parse(message) == value


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"{", b"{]", b"hello", b'{"a" 1}', b"{'a': 'b}", b"\xff", b'"\xc3"', b"{'a\\': 1}"),
        *(b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'{"a": 1, "a": 2}', b"9" * 5000, b"\xef\xbb\xbf{}"),
        b"[" * 500_000 + b"]" * 500_000,
    ],
    ids=lambda message: repr(message[:12]),
)
def test_what_is_no_json_is_a_parse_error(message):
    with pytest.raises(MonitorError, match=r"^JSON parse error, ") as caught:
        protocol.parse(message)
    assert caught.value.error_class == "GenericError"


REQUESTS = [
    ([], "QMP input must be a JSON object"),
    ("x", "QMP input must be a JSON object"),
    (None, "QMP input must be a JSON object"),
    ({}, "QMP input lacks member 'execute'"),
    ({"id": 1}, "QMP input lacks member 'execute'"),
    ({"execute": 1}, "QMP input member 'execute' must be a string"),
    ({"execute": "x", "arguments": []}, "QMP input member 'arguments' must be an object"),
    ({"execute": "x", "also": 1}, "QMP input member 'also' is unexpected"),
    ({"exec-oob": "x"}, "QMP input member 'exec-oob' is unexpected"),
]


@pytest.mark.parametrize(("value", "text"), REQUESTS)
def test_what_is_no_request_is_refused_as_qemu_does(value, text):
    with pytest.raises(MonitorError) as caught:
        protocol.request(value)
    assert str(caught.value) == text


def test_lines_end_as_qemus_do():
    assert protocol.encode({"return": {}}) == b'{"return": {}}\r\n'


def test_an_event_has_its_time_in_two_numbers():
    assert protocol.event("STOP", 12.25) == {
        "timestamp": {"seconds": 12, "microseconds": 250_000},
        "event": "STOP",
    }
    assert protocol.event("MIGRATION", 0.0, {"status": "active"})["data"] == {"status": "active"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(JSON.filter(lambda value: isinstance(value, list | dict)), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_any_json_comes_through_any_cut(values, data):
    sent = data.draw(st.sampled_from([b"", b"\n", b"\r\n"])).join(json.dumps(value).encode() for value in values)
    cut = data.draw(st.integers(0, len(sent)))
    framer = Framer()
    assert [protocol.parse(m) for part in (sent[:cut], sent[cut:]) for m in framer.feed(part)] == values


@given(st.lists(st.binary(max_size=40) | st.text("{}[]\"'\\:, \n\x00", max_size=40).map(str.encode), max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_messages_that_are_json_or_refused(parts):
    framer = Framer()
    for message in itertools.chain.from_iterable(framer.feed(part) for part in parts):
        assert message
        with contextlib.suppress(MonitorError):
            protocol.request(protocol.parse(message))
