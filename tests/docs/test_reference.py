"""What there is in the code is in the pages: generated pages are current, hooks and public names are documented."""

from __future__ import annotations

import importlib.util
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import whimbrel
from whimbrel import hookspecs
from whimbrel.plugins.catalogue import KINDS
from whimbrel.settings import Settings

HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("whimbrel_"))


@pytest.fixture(scope="module")
def generate(docs):
    spec = importlib.util.spec_from_file_location("docs_generate", docs.root / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_named(generate, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "HERE", tmp_path)
    assert generate.main(["--check"]) == 1
    assert "docs/reference/states.md is stale: run `make docs`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_heading_with_its_signature(docs, name):
    page = (docs.root / "docs" / "plugins.md").read_text(encoding="utf-8")
    signature = inspect.signature(getattr(hookspecs, name))
    assert f"## `{name}({', '.join(signature.parameters)})`\n" in page
    returns = signature.return_annotation
    section = page.partition(f"## `{name}(")[2].partition("\n## ")[0]
    assert returns == "None" or f"`{returns}`" in section, f"{name} answers with {returns}"
    assert f"*{KINDS[name]}*" in section, f"{name} makes a plugin a {KINDS[name]}"


def test_no_hook_has_a_heading_that_does_not_exist(docs):
    page = (docs.root / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## `(whimbrel_\w+)\(", page, re.MULTILINE)) == HOOKS


def test_every_public_name_is_in_the_reference(docs):
    page = (docs.root / "docs" / "reference" / "library.md").read_text(encoding="utf-8")
    for name in whimbrel.__all__:
        assert re.search(rf"`@?(whimbrel\.)?{name}\b", page), name


def test_every_setting_is_in_the_reference(docs):
    page = (docs.root / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    for section in Settings().sections().values():
        for name in section:
            assert f"| `{name}` |" in page, name


def test_every_section_of_the_wire_format_that_docstrings_name_is_there(docs):
    page = (docs.root / "docs" / "reference" / "wire-format.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^#+ (\d+(?:\.\d+)?) ", page, re.MULTILINE))
    named = set()
    for module in [*(docs.root / "core").rglob("*.py"), *(docs.root / "plugins").rglob("*.py")]:
        for text in re.findall(r"sections? (\d[\d., and]*)", module.read_text(encoding="utf-8")):
            named.update(number.rstrip(".") for number in re.findall(r"\d+(?:\.\d+)?", text))
    assert len(named) > 10, "the search finds nothing any more"
    assert named <= headings


def test_the_version_has_an_entry_in_the_changelog(docs):
    version = tomllib.loads((docs.root / "pyproject.toml").read_text())["project"]["version"]
    changelog = (docs.root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[?({re.escape(version)}|Unreleased)\b", changelog, re.MULTILINE)


def test_every_example_of_a_plugin_is_the_finished_one(docs):
    """The pages walk through a project that is there, whole."""
    project = docs.root / "tests" / "plugins" / "whimbrel-pigeon"
    cut = {block.source for block in docs.blocks(docs.root / "docs" / "plugins.md") if block.source}
    inside = {Path(source) for source in cut if (docs.root / source).is_relative_to(project)}
    assert {path.name for path in inside} >= {"pyproject.toml", "__init__.py", "transport.py"}
