"""Print what whimbrel's own environment needs, read from pyproject.toml so that it is said in one place."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = project["dependency-groups"]
names = {*project["project"]["dependencies"], *(name for group in groups.values() for name in group)}
sys.stdout.writelines(f"{name}\n" for name in sorted(names))
