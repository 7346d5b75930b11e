"""The reference names everything there is, and nothing that is not."""

import re
from pathlib import Path

from whimbrel.monitor import COMMANDS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "qmp.md"


def test_the_page_has_every_command_with_its_arguments_and_no_other():
    commands = PAGE.read_text().split("\n## Commands\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]*?) ?\|", commands, re.MULTILINE))
    assert list(rows) == list(COMMANDS)
    for name, command in COMMANDS.items():
        if name == "migrate-set-parameters":
            continue
        expected = [f"[{a.name}]" if a.optional else a.name for a in command.arguments]
        assert re.findall(r"`([^`]+)`", rows[name]) == expected, name
