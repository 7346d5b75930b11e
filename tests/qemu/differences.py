"""Questions for two monitors, and in what whimbrel's knowingly differs from a QEMU's.

Each difference has its row in docs/reference/qmp.md, where the reason stands; here are the rows' first columns, under
names for the tests. A test that shows a difference says which: `differs("reclaim")`. What differs and is not said to is
an error, and so is what is said to differ and does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from .qmp import Monitored

DIFFERENCES: Final[Mapping[str, str]] = {
    "reclaim": "`cont` in postmigrate is refused; `x-whimbrel-reclaim` comes first",
    "adopt": "`cont` at a destination whose source has fallen silent behind the proof is refused; `x-whimbrel-adopt` "
    "or `x-whimbrel-discard` decides",
    "stop-at-the-end": '`stop` in finish-migrate is refused: "Migration is not finalized yet"',
    "stop-incoming": "`stop` and `cont` at a destination that waits or loads are refused",
    "failed-destination": "a destination that failed waits for another `migrate-incoming`",
    "no-incoming": "`migrate-incoming` needs no `-incoming`: a machine that never ran may wait",
    "cancel-destination": "`migrate_cancel` also ends a destination's wait or load",
    "settled": "capabilities of a destination that loads cannot be set",
    "powered": "`migrate` of a machine that never ran powers it on and leaves it paused",
    "continue": "`migrate-continue` is refused where nothing waits for it",
    "passes": "at least one pass is made, and the dirty marks are read behind it, before the guest stops",
    "refused-migrate": "a `migrate` that is refused leaves `query-migrate` as it was",
    "refused-incoming": "a `migrate-incoming` that is refused sends no event",
    "unknown-uri": "the error for an unknown URI begins with QEMU's text, and goes on with what was wrong and which "
    "schemes there are",
    "address": "what is wrong with an address is said in our words; `migrate` begins, and fails",
    "loopback": "`tcp::PORT` is at 127.0.0.1, for both ends",
    "programs": "`exec:` is refused, unless whoever started the program has allowed it (`--allow-exec`)",
    "error-desc": "`error-desc` says where a stream broke and what was expected there, and that a cancelled machine "
    "goes on",
    "not-yet": 'some capabilities and parameters are refused with "… is not available in this version of whimbrel yet: '
    '…", and so are `blk` and `inc`',
    "more": "some lists have more in them: the older commands, the settings of later QEMUs, settings and commands of "
    "our own",
    "announce-step": "`announce-step` may be 0",
    "version": "`package` in the greeting and in `query-version` names whimbrel",
    "oob": "no out-of-band execution (`exec-oob`); none is offered",
    "quit": "`quit` is an error where the program has not said how to end it",
    "stranger": "the first thing said must be JSON's: a client that begins with anything else is hung up on",
    "bound": "a message beyond a bound ends the connection",
    "id": "an `id` comes back as it was",
    "one-line": "one line that is no JSON is one error",
    "parse": 'parse errors have our words behind "JSON parse error, "',
}
"""By name, in the order of the page."""


def differs(name: str) -> str:
    """The name itself, which must be one of `DIFFERENCES`."""
    assert name in DIFFERENCES, f"the difference {name!r} has no row"
    return name


@attrs.frozen
class Question:
    """What is said to both, and the difference that their answers show, if any."""

    message: dict[str, Any]
    difference: str = ""

    def differs(self, name: str) -> Question:
        """The same question, whose answers differ."""
        return attrs.evolve(self, difference=differs(name))


def ask(command: str, /, **arguments: Any) -> Question:
    """A command with its arguments; ``_`` in a name is sent as ``-``."""
    return Question({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}})


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON; True is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def compare(theirs: Monitored, ours: Monitored, questions: Iterable[Question]) -> None:
    """Put `questions` to both, one after the other. Raises AssertionError with all that is not as it should be."""
    wrong = []
    for question in questions:
        answers = theirs.qmp.ask(question.message), ours.qmp.ask(question.message)
        if same(*answers) == bool(question.difference):
            wrong += [f"{json.dumps(question.message)}: expected {question.difference or 'the same'}"]
            wrong += [f"  QEMU     {answers[0]}", f"  whimbrel {answers[1]}"]
    if wrong:
        raise AssertionError("\n".join(wrong))
