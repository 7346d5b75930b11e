"""Links between pages lead somewhere, down to the heading."""

from __future__ import annotations

import re
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = 0
        while (name := anchor if number == 0 else f"{anchor}-{number}") in found:
            number += 1
        found.add(name)
    return found


def test_links_lead_somewhere(docs, page):
    for target in LINK.findall(docs.prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert docs.root in [there, *there.parents], f"{page.name}: {target} is outside of the repository"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_every_page_can_be_reached_from_the_index(docs):
    index = docs.root / "docs" / "index.md"
    seen, waiting = set(), [index]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in LINK.findall(docs.prose(page)):
            path = target.partition("#")[0]
            if path.endswith(".md") and "//" not in path:
                waiting.append((page.parent / path).resolve())
    assert {page for page in docs.pages if page.parent != docs.root} <= seen
