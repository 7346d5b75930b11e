"""The fuzz targets' invariants over damaged inputs: quick, the same each time, and counted to the byte."""

from __future__ import annotations

import logging
import tracemalloc

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .conftest import ROOT  # noqa: F401 - which makes `fuzz` be found

from fuzz.target import Broken, Target, judge  # isort: skip
from fuzz.targets import TARGETS  # isort: skip

NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 4095, 4096, 4097, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 4096, 2**64 - 1]


@pytest.fixture(scope="module", params=list(TARGETS))
def target(request):
    made = TARGETS[request.param]()
    logging.disable(logging.CRITICAL)
    yield made
    logging.disable(logging.NOTSET)
    made.close()


@pytest.fixture(scope="module")
def seeds(target):
    seeds = list(target.seeds())
    for seed in seeds:
        judge(target, seed)  # what is imported late is no input's
    return seeds


@st.composite
def damaged(draw, seeds):
    """A seed with numbers written over, bytes changed, taken out, repeated, a tail cut off, or another one's put on."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.sampled_from((1, 2, 4, 8)))
        match draw(st.sampled_from(("number", "number", "byte", "remove", "repeat", "cut", "splice"))):
            case "number":
                value = draw(st.sampled_from(NUMBERS)) % (1 << 8 * size)
                data[at : at + size] = value.to_bytes(size, "big")
            case "byte":
                data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))] * draw(st.integers(1, 20))
            case "cut":
                del data[at:]
            case "splice":
                data[at:] = draw(st.sampled_from(seeds))[at:]
    return bytes(data)


def test_seeds_are_taken(target, seeds):
    refusals = {"stream", "lost", "incompatible", "config"}
    assert {judge(target, seed) for seed in seeds} - refusals, "no seed is right"


def test_whatever_comes_is_parsed_or_refused_within_bounds(target, seeds):
    @given(data=damaged(seeds))
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(data):
        judge(target, data)

    check()


def test_memory_is_bounded_by_the_input(target, seeds):
    """At most what a target's buffers of fixed size take, and 64 bytes for each of its own."""

    @given(data=damaged(seeds))
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(data):
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            judge(target, data)
            taken = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        assert taken <= target.room + 64 * len(data)

    check()


class _Slow(Target):
    name = "slow"

    def seeds(self):
        return [b""]

    def try_one(self, data):
        for _ in range(len(data)):
            pass
        return "done"


def test_what_takes_too_long_is_found(monkeypatch):
    clock = iter((0.0, 1.9, 0.0, 2.1))
    monkeypatch.setattr("fuzz.target.time.process_time", lambda: next(clock))
    assert judge(_Slow(), bytes(1 << 16)) == "done"
    with pytest.raises(Broken, match=r"65536 bytes took 2\.1 s, and may take 2\.0 s"):
        judge(_Slow(), bytes(1 << 16))
