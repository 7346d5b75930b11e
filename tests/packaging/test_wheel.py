"""What ships is what is in the tree, what is bundled is offered, and imports point the way they should."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import whimbrel


def packages_in_the_tree(root: Path) -> dict[str, Path]:
    """Every import package of the project's own, by name, with its folder."""
    folders = [root / "core", root / "examples", *(root / "plugins").iterdir()]
    return {p.name: p for folder in folders for p in folder.iterdir() if (p / "__init__.py").exists()}


def test_the_wheel_has_every_module_of_every_package_and_nothing_else(root, wheel):
    tree = {
        (Path(name) / module.relative_to(folder)).as_posix()
        for name, folder in packages_in_the_tree(root).items()
        for module in folder.rglob("*")
        if module.is_file() and "__pycache__" not in module.parts
    }
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert shipped == tree


def test_the_allowlists_in_pyproject_name_every_package(root):
    hatch = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    folders = {folder.relative_to(root).as_posix() for folder in packages_in_the_tree(root).values()}
    assert set(hatch["targets"]["wheel"]["packages"]) == folders
    assert set(hatch["dev-mode-dirs"]) == {str(Path(folder).parent) for folder in folders}


def modules_with_hooks(root: Path) -> set[str]:
    """Every module that marks a function with hookimpl, by its import name."""
    found = set()
    for name, folder in packages_in_the_tree(root).items():
        for module in folder.rglob("*.py"):
            functions = [node for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef)]
            if any("hookimpl" in ast.unparse(decorator) for f in functions for decorator in f.decorator_list):
                found.add(".".join([name, *module.relative_to(folder).with_suffix("").parts]))
    return found


def test_every_bundled_plugin_is_an_entry_point(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(archive.read(name).decode())
    assert set(parser["whimbrel"].values()) == modules_with_hooks(root)
    assert len(modules_with_hooks(root)) >= 6, "the search finds nothing any more"


def test_every_entry_point_that_is_installed_can_be_imported():
    entry_points = importlib.metadata.distribution("whimbrel").entry_points.select(group="whimbrel")
    assert {e.name for e in entry_points} >= {"tcp", "unix", "ram", "devices", "log", "dirty-trackers"}
    for entry_point in entry_points:
        assert any(name.startswith("whimbrel_") for name in vars(entry_point.load())), entry_point


def test_imports_point_one_way(root):
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_the_core_names_no_plugin(root):
    """Import-linter sees imports; this sees a name in a string, which could be imported late."""
    plugins = sorted(packages_in_the_tree(root).keys() - {"whimbrel", "whimbrel_examples"})
    assert len(plugins) >= 4
    named = re.compile(rf"(import|from) ({'|'.join(plugins)})|[\"']({'|'.join(plugins)})\\.")
    offenders = [module for module in (root / "core").rglob("*.py") if named.search(module.read_text())]
    assert not offenders


def test_what_is_tested_is_the_wheel(root):
    """`make test` installs the wheel and says so; then nothing may come from the tree."""
    where = Path(whimbrel.__file__).resolve()
    if os.environ.get("WHIMBREL_TESTS_THE_WHEEL"):
        assert root not in where.parents or ".venv" in where.relative_to(root).parts
        assert "site-packages" in where.parts


def test_every_public_name_exists_and_is_listed_in_order():
    assert list(whimbrel.__all__) == sorted(whimbrel.__all__)
    for name in whimbrel.__all__:
        assert hasattr(whimbrel, name)
