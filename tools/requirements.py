"""Print what whimbrel's own environment needs, read from pyproject.toml so that it is said in one place.

`requirements.py GROUP…` prints what these dependency groups need; without one it is what whimbrel needs, and all groups
but `bench` and `fuzz`, which are only for measuring and for fuzzing.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = project["dependency-groups"]
asked = sys.argv[1:]
wanted = asked or [group for group in groups if group not in ("bench", "fuzz")]
names = {name for group in wanted for name in groups[group]} | set([] if asked else project["project"]["dependencies"])
sys.stdout.writelines(f"{name}\n" for name in sorted(names))
