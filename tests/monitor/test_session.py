"""A conversation without a connection: whatever comes in, replies come out."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import whimbrel
from whimbrel.errors import StateError
from whimbrel.monitor import COMMANDS, Command
from whimbrel.monitor.context import Context
from whimbrel.monitor.protocol import MAX_IDENTITY
from whimbrel.monitor.session import Session

HELLO = b'{"execute": "qmp_capabilities"}'
HARMLESS = sorted(COMMANDS.keys() - {"migrate", "migrate-incoming"})


def say(session, data):
    """Every answer, and whether we were hung up on."""
    answers = list(session.receive(data))
    assert all(answer.line.endswith(b"\r\n") for answer in answers)
    return [json.loads(answer.line) for answer in answers], any(answer.last for answer in answers)


@pytest.fixture
def session(make_machine):
    return Session(Context(make_machine()), COMMANDS)


def test_nothing_is_taken_before_the_negotiation(session):
    expected = {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}
    assert say(session, b'{"execute": "query-status", "id": 7}') == ([{"error": expected, "id": 7}], False)
    assert not session.negotiated
    assert say(session, HELLO) == ([{"return": {}}], False)
    assert session.negotiated


def test_the_negotiation_is_done_once(session):
    expected = {
        "class": "CommandNotFound",
        "desc": "Capabilities negotiation is already complete, command ignored",
    }
    assert say(session, HELLO + HELLO) == ([{"return": {}}, {"error": expected}], False)


def test_a_capability_that_was_not_offered_cannot_be_enabled(session):
    ask = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'
    assert say(session, ask)[0][0]["error"]["desc"] == "Capability oob not available"
    assert not session.negotiated
    ask = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}'
    assert say(session, ask)[0][0]["error"]["desc"] == "Parameter 'null' does not accept value 'x'"
    assert say(session, b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}')[0] == [{"return": {}}]


@pytest.mark.parametrize("ident", [0, "x", None, [1, {"a": None}], {"deep": [1.5]}, 2**200, False])
def test_the_id_comes_back_in_replies_and_errors(session, ident):
    say(session, HELLO)
    messages = [{"execute": "query-name"}, {"execute": "nothing"}, {"execute": 1}, {}, {"more": 1}]
    for message in messages:
        (reply,), _ = say(session, json.dumps({**message, "id": ident}).encode())
        assert reply["id"] == ident
        assert ("return" in reply) == (message == messages[0])


def test_an_id_that_is_too_long_is_an_error_without_it(session):
    say(session, HELLO)
    fits = {"execute": "query-name", "id": "x" * (MAX_IDENTITY - 2)}
    assert say(session, json.dumps(fits).encode())[0][0]["id"] == fits["id"]
    message = {"execute": "cont", "id": "x" * (MAX_IDENTITY - 1)}
    (reply,), last = say(session, json.dumps(message).encode())
    assert reply == {
        "error": {"class": "GenericError", "desc": "QMP input member 'id' is too long: it may have 4096 characters"}
    }
    assert not last
    assert say(session, b'{"execute": "query-status"}')[0][0]["return"]["status"] == "prelaunch"


def test_a_stranger_is_hung_up_on_before_its_words_are_commands(session):
    http = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + HELLO + b'{"execute": "quit"}'
    first = next(session.receive(http))
    assert first.last
    assert b"JSON parse error" in first.line
    assert not session.negotiated


def test_after_the_negotiation_a_bad_line_is_only_an_error(session):
    say(session, HELLO)
    replies, last = say(session, b'hello\n{"a" 1}\n{"execute": "query-name"}\n')
    assert [("error" in reply) for reply in replies] == [True, True, False]
    assert not last


def test_beyond_a_bound_the_conversation_ends(session):
    say(session, HELLO)
    replies, last = say(session, b"[" * 1000)
    assert last
    assert "limit exceeded" in replies[0]["error"]["desc"]


def test_a_bug_behind_a_command_is_an_error_of_that_command(make_machine, caplog):
    def broken(context):
        raise ZeroDivisionError("oh")

    def unsayable(context):
        return float("nan")

    def refused(context):
        raise StateError("not now", hint="later")

    commands = {c.name: c for c in (Command("b", broken), Command("u", unsayable), Command("r", refused))}
    session = Session(Context(make_machine()), {**COMMANDS, **commands})
    say(session, HELLO)
    replies, last = say(session, b'{"execute": "b"}{"execute": "u", "id": 1}{"execute": "r"}')
    assert "unexpected ZeroDivisionError: oh" in replies[0]["error"]["desc"]
    assert "unexpected ValueError" in replies[1]["error"]["desc"]
    assert replies[1]["id"] == 1
    assert replies[2]["error"] == {"class": "GenericError", "desc": "not now; later"}
    assert not last
    assert len(caplog.records) == 2


LOOSE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def arguments_of(name):
    names = st.sampled_from([argument.name for argument in COMMANDS[name].arguments] or ["x"])
    return st.dictionaries(names | st.text(max_size=4), LOOSE, max_size=3)


SENSIBLE = st.sampled_from(HARMLESS).flatmap(
    lambda name: st.fixed_dictionaries(
        {"execute": st.just(name)}, optional={"arguments": arguments_of(name), "id": LOOSE}
    )
)


@given(st.lists(SENSIBLE | LOOSE, max_size=6))
@settings(max_examples=80, deadline=None)
def test_any_request_has_exactly_one_reply(requests):
    with whimbrel.Machine("heat") as machine:
        session = Session(Context(machine, lambda: None), COMMANDS)
        say(session, HELLO)
        for request in requests:
            (reply,), last = say(session, json.dumps(request).encode() + b"\n")
            assert not last
            assert ("return" in reply) != ("error" in reply)
            assert not str(reply.get("error")).startswith("unexpected ")


@given(st.lists(st.binary(max_size=60), max_size=5))
@settings(max_examples=80, deadline=None)
def test_any_bytes_have_replies_or_nothing(parts):
    with whimbrel.Machine("heat") as machine:
        session = Session(Context(machine), COMMANDS)
        say(session, HELLO)
        for part in parts:
            replies, _ = say(session, part)
            assert all("error" in reply for reply in replies)
