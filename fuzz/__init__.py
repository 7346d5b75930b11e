"""Fuzz targets: bytes of any kind go in, and what comes of them is judged (`docs/concepts/hostile-input.md`).

`python -m fuzz.run` runs them with atheris; `tests/hostile/test_structured.py` runs the same targets with hypothesis.
"""
