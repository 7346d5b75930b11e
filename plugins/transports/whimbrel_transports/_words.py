"""Splits a command into words as a shell would, and refuses what would need one.

There is no shell: what a shell would act on (a pipe, a redirection, a variable, a pattern) would reach the program as
it stands, which is never what was meant. So it is an error, unless it is quoted such that a shell would leave it alone.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import Final

from whimbrel.errors import ConfigError

__all__ = ["split"]

_HINT: Final = "quote it, or write exec:sh -c '...' to have a shell"
_EXPECTED: Final = "expected exec:COMMAND, a program and its arguments"

# A shell acts on these wherever they stand unquoted; on a tilde and on what makes a comment only where a word begins.
_ACTIVE: Final = frozenset("|&;<>()$`*?[\n\r")
_ACTIVE_AT_THE_START: Final = frozenset("~#")
_ACTIVE_IN_DOUBLE_QUOTES: Final = frozenset("$`")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def split(command: str) -> list[str]:
    """The words of `command`: its program, and the program's arguments. Raises ConfigError."""
    if "\0" in command:
        raise ConfigError(f"the command {command!r} has a zero byte in it; {_EXPECTED}")
    try:
        os.fsencode(command)
    except UnicodeError as error:
        raise ConfigError(f"the command {command!r} cannot be written for the system: {error}") from error
    _refuse_what_needs_a_shell(command)
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"the command {command!r} cannot be split into words: {error}", hint=_HINT) from error
    if not words or not words[0]:
        raise ConfigError(f"the command {command!r} names no program; {_EXPECTED}")
    if _ASSIGNMENT.match(command.lstrip()):
        raise ConfigError(
            f"the command {command!r} begins with a variable, and there is no shell to set it",
            hint="write exec:env NAME=VALUE PROGRAM, or exec:sh -c '...' to have a shell",
        )
    return words


def _refuse_what_needs_a_shell(command: str) -> None:
    quote, starts, characters = "", True, iter(command)
    for character in characters:
        if quote == "'":
            quote = "" if character == "'" else quote
        elif character == "\\":
            if next(characters, "") == "\n" and not quote:
                # A shell would join the lines; the splitting keeps the line's end.
                raise _needs_a_shell(command, "\n")
        elif quote:
            if character in _ACTIVE_IN_DOUBLE_QUOTES:
                raise _needs_a_shell(command, character)
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _ACTIVE or (starts and character in _ACTIVE_AT_THE_START):
            raise _needs_a_shell(command, character)
        starts = not quote and character in " \t"


def _needs_a_shell(command: str, character: str) -> ConfigError:
    return ConfigError(
        f"the command {command!r} has {character!r} in it, which is for a shell to act on, and there is none",
        hint=_HINT,
    )
