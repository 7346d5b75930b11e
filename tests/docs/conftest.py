"""Takes the pages apart: fenced blocks, links and headings, each with its place.

What the blocks of a page mean to the tests:

* ```python: run, all of a page in one namespace, in an empty folder; "Save this as `NAME`" before it writes it there
  as well. A ```text block right behind it is what it prints.
* ```console: `$ COMMAND`, then what it prints; `^C` is the key.
* any block behind `<!-- from PATH -->`: cut from that file of the repository, word for word.

In what is printed, a line is compared up to its first digit: figures differ from run to run.
"""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_SOURCE = re.compile(r"<!-- from (\S+) -->\s*\Z")
_NAME = re.compile(r"[Ss]ave this\s+as `([^`]+)`[^`]*\Z")


@attrs.frozen
class Block:
    """A fenced block of a page: `source` is the file that it was cut from, `name` the file to save it as."""

    page: Path
    line: int
    language: str
    text: str
    source: str
    name: str
    follows: bool  # nothing but empty lines between the block before and this one

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        before = text[end : match.start()]
        source, name = _SOURCE.search(before), _NAME.search(before)
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start()) + 1,
                language=match[2],
                text=re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE),
                source=source[1] if source else "",
                name=name[1] if name else "",
                follows=bool(found) and not before.strip(),
            )
        )
        end = match.end()
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def comparable(line: str) -> str:
    """What of a printed line is the same in every run."""
    return re.sub(r"\d.*", "", " ".join(line.split())).rstrip()


@attrs.frozen
class Docs:
    root: Path = ROOT
    pages: tuple[Path, ...] = tuple(PAGES)

    blocks = staticmethod(blocks)
    prose = staticmethod(prose)
    comparable = staticmethod(comparable)

    def all_blocks(self) -> list[Block]:
        return [block for page in self.pages for block in blocks(page)]


@pytest.fixture(scope="session")
def docs() -> Docs:
    return Docs()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`page` is every page in turn."""
    if "page" in metafunc.fixturenames:
        metafunc.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
