"""Streams of every form, loaded however their bytes come, against the machine that they were written of."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whimbrel.capture import CapturedMachine

from .conftest import Crumbs, check
from .streams import (
    SHAPES,
    TO_2_2,
    random_stream,
    small,
)

seeds = st.integers(0, 2**32)
shapes = st.sampled_from(SHAPES)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sizes", [[1 << 30], [1], [7, 1, 4099]], ids=["whole", "byte by byte", "in pieces"])
def test_a_small_machine_of_each_form(load, check, shape, sizes):
    script = small(shape)
    machine = load(script.finish(), sizes=sizes)
    check(machine, script)
    assert machine.guessed == (shape is TO_2_2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_a_file(tmp_path, plugins, check, shape):
    script = small(shape)
    file = tmp_path / "stream"
    file.write_bytes(script.finish())
    with CapturedMachine.load(file, plugins=plugins) as machine:
        check(machine, script)
    with CapturedMachine.load(str(file)) as machine:
        check(machine, script)


@settings(max_examples=300, deadline=None)
@given(seeds, shapes)
def test_any_machine_whole(plugins, seed, shape):
    script = random_stream(random.Random(seed), shape)
    with CapturedMachine.load(Crumbs(script.finish(), [1 << 30]), plugins=plugins) as machine:
        check(machine, script)


@settings(max_examples=150, deadline=None)
@given(seeds, shapes, st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_any_machine_in_pieces(plugins, seed, shape, sizes):
    script = random_stream(random.Random(seed), shape)
    with CapturedMachine.load(Crumbs(script.finish(), sizes), plugins=plugins) as machine:
        check(machine, script)


@settings(max_examples=30, deadline=None)
@given(seeds, shapes)
def test_any_machine_byte_by_byte(plugins, seed, shape):
    script = random_stream(random.Random(seed), shape)
    with CapturedMachine.load(Crumbs(script.finish(), [1]), plugins=plugins) as machine:
        check(machine, script)
