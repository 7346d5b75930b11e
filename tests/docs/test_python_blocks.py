"""Every python block of every page runs, or is what it says it was cut from, and prints what the page says."""

from __future__ import annotations

import sys

import pytest

COMPILED = {
    "docs/concepts/verbs.md",  # a plugin over a library and a device that are not here
    "docs/reference/qmp.md",
    "docs/moving-a-qemu-guest.md",  # run with everything else on it where there is a QEMU, by test_qemu_guest
}
"""Pages whose blocks speak to what is the reader's own: they are compiled and not run."""


def test_blocks_that_were_cut_are_still_there(docs):
    cut = [block for block in docs.all_blocks() if block.source]
    assert cut, "the search finds none any more"
    for block in cut:
        whole = (docs.root / block.source).read_text(encoding="utf-8")
        assert block.text in whole, f"{block.where} is not in {block.source} any more"


def test_blocks_run_and_print_what_the_page_says(docs, page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    namespace = {"__name__": "docs"}
    printed = None
    for block in docs.blocks(page):
        if block.language == "text" and block.follows and printed is not None:
            said = [docs.comparable(line) for line in printed.splitlines()]
            assert said == [docs.comparable(line) for line in block.text.splitlines()], block.where
        printed = None
        if block.language != "python" or block.source:
            continue
        if block.name:
            (tmp_path / block.name).write_text(block.text, encoding="utf-8")
        code = compile("\n" * block.line + block.text, str(block.page), "exec")
        if str(page.relative_to(docs.root)) in COMPILED:
            continue
        exec(code, namespace)
        printed = capsys.readouterr().out
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_the_search_for_blocks_finds_some(docs, name):
    assert [block for block in docs.blocks(docs.root / name) if block.language == "python"]
