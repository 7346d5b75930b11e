"""docs/concepts/hostile-input.md names each test of the lines, and no other; and what it says of cores is so."""

from __future__ import annotations

import re
import subprocess
import sys

from . import test_history
from .conftest import ROOT

PAGE = ROOT / "docs" / "concepts" / "hostile-input.md"


def test_the_page_has_a_line_for_each_test():
    named = re.findall(r"`(test_\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {name for name in vars(test_history) if name.startswith("test_")}


def test_the_command_line_leaves_no_core():
    program = (
        "import resource, sys, whimbrel.cli\n"
        "sys.argv = ['whimbrel', '--version']\n"
        "try:\n    whimbrel.cli.main()\n"
        "finally:\n    print(resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "(0, 0)"
