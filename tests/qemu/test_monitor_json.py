"""What is JSON and what is not, and how a conversation begins: a real QEMU's monitor and ours, told the same bytes."""

from __future__ import annotations

from typing import Any

import pytest

from .differences import ask, differs, same
from .ours import Ours
from .peer import Qemu
from .qmp import Qmp

GOOD = [
    b"{'execute': 'query-name'}",
    b'{"execute": "query-name", "id": {"a": [1, null, "x"]}}',
    b'{"execute": "query-name", "id": null}',
    b'{"execute": "query-name", "id": -1.5}',
    b'{"execute": "query-name", "id": "\\u0000\\/\\n"}',
    b'{"execute": "query-name", "id": "\xc3\xa9%s"}',
    b'{"execute":\n"query-name"\n,"id":\t1}',
    b'{"execute": "query-name"} {"execute": "query-name", "id": 2}',
    b"[1]",
    b"[]",
    b"1",
    b'"a"',
    b"null",
    b"true",
    b"{}",
    b'{"id": 5}',
    b'{"execute": 1}',
    b'{"execute": 1, "id": 5}',
    b'{"execute": ""}',
    b'{"execute": "\\u0041", "id": [1]}',
    b'{"execute": "query-name", "arguments": 1}',
    b'{"execute": "query-name", "arguments": []}',
    b'{"execute": "query-name", "arguments": null}',
    b'{"execute": "query-name", "x": 1}',
    b'{"execute": "query-name", "x": 1, "y": 2}',
    b'{"x": 1}',
    b'{"execute": "query-name", "id": 1, "id": 2}',
    b'{"execute": "query-name", "arguments": {"a": 1, "a": 2}}',
    b'{"exec-oob": "migrate-pause"}',
    b'{"execute": "query-name", "exec-oob": "query-name"}',
]

BAD = [
    b"nonsense",
    b'{"execute": "query-name",}',
    b'{"execute" "query-name"}',
    b'{execute: "query-name"}',
    b'{"execute": "query-name"]',
    b'{"execute": "query-name", "id": tru}',
    b'{"execute": "query-name", "id": "\\x"}',
    b'{"execute": "query-name", "id": "\\ud800"}',
    b"]",
    b"}",
    b"\xff",
    b"\x01",
    b'{\xff{"execute": "query-name", "id": 7}',
]

OF_SEVERAL_WORDS = [
    b"nonsense and more",
    b'{"execute": "query-name", "id": 01}',
    b'{"execute": "query-name", "id": +1}',
    b'{"execute": "query-name", "id": NaN}',
]


def answers(client: Qmp, data: bytes) -> list[dict[str, Any]]:
    """All replies to `data`, however many."""
    client.say(data + b'\n{"execute": "nothing", "id": "the last"}\n')
    found = []
    while (reply := client.reply()).get("id") != "the last":
        found.append(reply)
    return found


@pytest.mark.parametrize("data", GOOD, ids=repr)
def test_what_is_json_is_answered_alike(idle: tuple[Qemu, Ours], data: bytes) -> None:
    theirs, ours = idle
    assert same(answers(ours.qmp, data), answers(theirs.qmp, data))


@pytest.mark.parametrize("data", BAD, ids=repr)
def test_what_is_no_json_is_as_many_errors(idle: tuple[Qemu, Ours], data: bytes) -> None:
    both = [answers(side.qmp, data) for side in idle]
    assert both[0] != both[1], differs("parse")
    for side in both:
        for reply in side:
            if "error" in reply:
                assert reply["error"]["class"] == "GenericError"
                assert reply["error"]["desc"].startswith("JSON parse error, ")
                reply["error"]["desc"] = ""
    assert both[0] == both[1]


@pytest.mark.parametrize("data", OF_SEVERAL_WORDS, ids=repr)
def test_a_line_that_is_no_json_is_one_error(idle: tuple[Qemu, Ours], data: bytes) -> None:
    theirs, ours = (answers(side.qmp, data) for side in idle)
    assert len(theirs) > 1, differs("one-line")
    assert len(ours) == 1
    for reply in theirs + ours:
        assert reply["error"]["class"] == "GenericError"
        assert reply["error"]["desc"].startswith("JSON parse error, ")


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1], ids=str)
def test_a_large_number_comes_back(idle: tuple[Qemu, Ours], number: int) -> None:
    theirs, ours = (answers(side.qmp, b'{"execute": "query-name", "id": %d}' % number) for side in idle)
    assert theirs == [{"return": {"name": "heat"}, "id": float(number)}], differs("id")
    assert ours == [{"return": {"name": "heat"}, "id": number}]
    assert type(ours[0]["id"]) is int


def test_brackets_without_end(idle: tuple[Qemu, Ours]) -> None:
    deep = b'{"execute": "query-name", "arguments": ' + b"[" * 1100 + b"\n\xff"
    (theirs, *more), (ours,) = answers(idle[0].qmp, deep), refused(idle[1].connect(), deep)
    assert theirs["error"]["desc"] == "JSON nesting depth limit exceeded"
    assert all("JSON parse error" in reply["error"]["desc"] for reply in more), differs("bound")
    assert ours["error"]["desc"].startswith("JSON nesting depth limit exceeded")
    assert ours["error"]["class"] == theirs["error"]["class"]


def refused(client: Qmp, data: bytes) -> list[dict[str, Any]]:
    """All replies to `data` until the other side hangs up, as it must."""
    client.say(data)
    found = []
    with pytest.raises(EOFError):
        while True:
            found.append(client.reply())
    return found


# ------------------------------------------------------------------------------------------------------ the negotiation

EARLY = [
    ask("query-name"),
    ask("nothing"),
    ask("qmp_capabilities", x=1),
    ask("qmp_capabilities", enable=1),
    ask("qmp_capabilities", enable=["x"]),
    ask("qmp_capabilities", enable=[]),
    ask("qmp_capabilities"),
    ask("qmp_capabilities", enable=["x"]),
]


def fresh(idle: tuple[Qemu, Ours]) -> tuple[Qmp, Qmp]:
    return idle[0].connect(negotiate=False), idle[1].connect(negotiate=False)


def test_the_negotiation(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = fresh(idle)
    for question in EARLY:
        assert ours.ask(question.message) == theirs.ask(question.message), question
    theirs.close()
    ours.close()


def test_the_greeting(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = fresh(idle)
    assert ours.greeting.keys() == theirs.greeting.keys() == {"QMP"}
    assert (theirs.greeting["QMP"]["capabilities"], ours.greeting["QMP"]["capabilities"]) == (["oob"], []), differs(
        "oob"
    )
    for client in (theirs, ours):
        client.execute("qmp_capabilities")
        version = client.execute("query-version")
        assert client.greeting["QMP"]["version"] == version
        assert version.keys() == {"qemu", "package"}
        assert version["qemu"].keys() == {"major", "minor", "micro"}
        assert version["package"].startswith("whimbrel ") == (client is ours), differs("version")
        client.close()


def test_out_of_band(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = fresh(idle)
    enable = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
    assert theirs.ask(enable) == {"return": {}}
    assert ours.ask(enable)["error"]["desc"] == "Capability oob not available", differs("oob")
    theirs.close()
    ours.close()


def test_a_stranger_is_hung_up_on(idle: tuple[Qemu, Ours]) -> None:
    theirs, ours = fresh(idle)
    assert answers(theirs, b"GET / HTTP/1.1\r\n")
    assert theirs.ask({"execute": "qmp_capabilities"}) == {"return": {}}, differs("stranger")
    (error,) = refused(ours, b"GET / HTTP/1.1\r\n")
    assert error["error"]["desc"].startswith("JSON parse error, ")
    theirs.close()
