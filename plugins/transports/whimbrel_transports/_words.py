"""Splits a command into words as a shell would, and refuses what would need one.

There is no shell: what a shell would act on (a pipe, a redirection, a variable, a pattern) would reach the program as
it stands, which is never what was meant. So it is an error, unless it is quoted such that a shell would leave it alone.

The standard library's shlex is not used, for it differs from a shell in what a backslash does between double quotes.
"""

from __future__ import annotations

import os
import re
from typing import Final

from whimbrel.errors import ConfigError

__all__ = ["split"]

_HINT: Final = "quote it, or write exec:sh -c '...' to have a shell"
_EXPECTED: Final = "expected exec:COMMAND, a program and its arguments"

# A shell acts on these wherever they stand unquoted; on a tilde and on what makes a comment only where a word begins.
# A carriage return is a letter to it, which nobody means.
_ACTIVE: Final = frozenset("|&;<>()$`*?[\n\r")
_ACTIVE_AT_THE_START: Final = frozenset("~#")
_ACTIVE_IN_DOUBLE_QUOTES: Final = frozenset("$`")
_ESCAPED_IN_DOUBLE_QUOTES: Final = frozenset('$`"\\\n')
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


def split(command: str) -> list[str]:
    """The words of `command`: its program, and the program's arguments. Raises ConfigError."""
    if "\0" in command:
        raise ConfigError(f"the command {command!r} has a zero byte in it; {_EXPECTED}")
    try:
        os.fsencode(command)
    except UnicodeError as error:
        raise ConfigError(f"the command {command!r} cannot be written for the system: {error}") from error
    words = _words(command)
    if not words or not words[0]:
        raise ConfigError(f"the command {command!r} names no program; {_EXPECTED}")
    if _ASSIGNMENT.match(command.lstrip(" \t")):
        raise ConfigError(
            f"the command {command!r} begins with a variable, and there is no shell to set it",
            hint="write exec:env NAME=VALUE PROGRAM, or exec:sh -c '...' to have a shell",
        )
    return words


def _words(command: str) -> list[str]:
    words: list[str] = []
    word: list[str] | None = None  # the one that has begun
    quote, characters = "", iter(command)
    for character in characters:
        plain = character  # what it stands for; nothing for a quote itself
        if quote != "'" and character == "\\":
            plain = _escaped(command, quote, next(characters, ""))
            if not plain:
                continue
        elif quote and character == quote:
            quote = plain = ""
        elif quote:
            if quote == '"' and character in _ACTIVE_IN_DOUBLE_QUOTES:
                raise _needs_a_shell(command, character)
        elif character in " \t":
            if word is not None:
                words.append("".join(word))
            word = None
            continue
        elif character in _ACTIVE or (word is None and character in _ACTIVE_AT_THE_START):
            raise _needs_a_shell(command, character)
        elif character in "'\"":
            quote, plain = character, ""
        word = [] if word is None else word
        word.append(plain)
    if quote:
        raise ConfigError(f"the command {command!r} has a quote {quote} that does not close", hint=_HINT)
    return words if word is None else [*words, "".join(word)]


def _escaped(command: str, quote: str, character: str) -> str:
    """What a backslash and `character` behind it stand for; nothing at the end of a line, which is joined."""
    if not character:
        raise ConfigError(f"the command {command!r} ends in a backslash, which says nothing", hint=_HINT)
    if character == "\n":
        return ""
    return character if not quote or character in _ESCAPED_IN_DOUBLE_QUOTES else f"\\{character}"


def _needs_a_shell(command: str, character: str) -> ConfigError:
    return ConfigError(
        f"the command {command!r} has {character!r} in it, which is for a shell to act on, and there is none",
        hint=_HINT,
    )
