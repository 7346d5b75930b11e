"""The page on moving a QEMU guest, gone through from its first block to its last, with real QEMUs."""

from __future__ import annotations

import re

import pytest

from ..qemu.conftest import qemu_7_2, real_qemu  # noqa: F401 - fixtures: without a QEMU there is nothing to go through
from ..qemu.peer import _dying_with_us as dying_with_us
from .terminals import Session

PAGE = "docs/moving-a-qemu-guest.md"

_FIGURE = re.compile(r"(?:0x[0-9a-f]+|[0-9a-f]{12,}|\d+(?:[.,]\d+)*)(?: (?:B|[KMG]iB|ms|s|µs)(?:/s)?(?!\w))?")


def without_figures(line):
    """A line with # for each figure and its unit, and rules of one length: the rest is the same in every run."""
    return re.sub("─+", "─", _FIGURE.sub("#", " ".join(line.split())))


@pytest.mark.slow
def test_the_page_is_gone_through_with_real_qemus(qemu_7_2, docs, tmp_path, monkeypatch, capsys):  # noqa: F811
    blocks = docs.blocks(docs.root / PAGE)
    assert {"console", "python", "text"} <= {block.language for block in blocks}
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}

    def like(expected):
        shown = without_figures(expected.replace("/home/you", str(tmp_path)))
        wanted = re.compile(".*".join(map(re.escape, shown.split(" … "))))  # where the page leaves something out
        return lambda line: wanted.fullmatch(without_figures(line)) is not None

    def python(block, text):
        exec(compile("\n" * block.line + text, str(block.page), "exec"), namespace)
        printed = [without_figures(line) for line in capsys.readouterr().out.splitlines()]
        following = blocks[blocks.index(block) + 1 :]
        expected = following[0].text if following and following[0].language == "text" and following[0].follows else ""
        assert printed == [without_figures(line) for line in expected.splitlines()], block.where

    session = Session(tmp_path, like, ports=["4444", "4445"], python=python, starter=dying_with_us())
    try:
        session.go_through(blocks)
    finally:
        session.end()
