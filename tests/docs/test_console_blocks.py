"""Commands in the pages are commands there are, with options there are; the tutorial's session is gone through."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress

import click
import pytest

from whimbrel.cli.application import whimbrel

from .terminals import Session, shown

OTHERS = {"cd", "echo", "git", "pip", "pytest", "qemu-system-x86_64", "qmp-shell", "source"}
"""Commands in the pages that are none of ours."""


def commands(docs):
    for block in docs.all_blocks():
        if block.language == "console":
            for line, _ in shown(block.text):
                yield block.where, line


def test_every_command_exists_with_its_options(docs):
    targets = set(re.findall(r"^([a-z-]+):.*##", (docs.root / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for where, line in commands(docs):
        words = shlex.split(line, comments=True)
        match words:
            case ["whimbrel", *arguments]:
                seen += 1
                try:
                    parse(arguments)
                except click.ClickException as exc:
                    raise AssertionError(f"{where}: {line}: {exc.format_message()}") from None
            case ["make", target, *_]:
                assert target in targets, f"{where}: {line}"
            case _:
                assert words[0] in OTHERS, f"{where}: {line}"
    assert seen


def parse(arguments):
    """Let click judge a command line without carrying it out."""
    name, command, rest = whimbrel.resolve_command(click.Context(whimbrel), list(arguments))
    with suppress(click.exceptions.Exit):  # --help
        command.make_context(name, list(rest))


def test_commands_in_the_text_exist(docs, page):
    """`whimbrel something` in backticks, as far as it goes."""
    for line in re.findall(r"`whimbrel ([a-z][^`]*)`", docs.prose(page)):
        name = shlex.split(line)[0]
        assert name in whimbrel.commands, f"{page.name}: whimbrel {line}"
        known = {option for parameter in whimbrel.commands[name].params for option in parameter.opts} | {"--help"}
        options = set(re.findall(r"--[a-z-]+", line))
        assert options <= known, f"{page.name}: whimbrel {line}"


@pytest.mark.slow
def test_the_session_of_the_tutorial(docs, tmp_path):
    blocks = docs.blocks(docs.root / "docs" / "tutorial.md")
    (tmp_path / "heat.py").write_text(next(block.text for block in blocks if block.name == "heat.py"))

    def like(expected):
        wanted = docs.comparable(expected.replace("/home/you/heat", str(tmp_path)))
        return lambda line: docs.comparable(line).startswith(wanted)

    session = Session(tmp_path, like, ports=["4444"])
    try:
        session.go_through(blocks)
    finally:
        session.end()


def test_pages_show_no_folder_of_whoever_wrote_them(docs, page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"/tmp/|/root/|/home/(?!you/)", text)
    assert str(docs.root) not in text
