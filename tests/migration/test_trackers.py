"""Writes that fall into the moment in which a tracker starts must arrive: then the guest runs, as at any other time."""

from __future__ import annotations

import pytest

from whimbrel.machine.dirty import compare, manual, userfaultfd

MODULES = {"compare": compare, "manual": manual, "userfaultfd": userfaultfd}


@pytest.mark.parametrize(
    "name",
    [
        "compare",
        "manual",
    ],
)
def test_a_write_while_it_starts_is_not_lost(make_pair, churning, settings, monkeypatch, name):
    """The guest begins to write into pages that were zero right behind the look that found them zero."""
    settings.backends.dirty_tracker = name
    settings.backends.memory = "memfd"  # a huge page of anonymous memory would be there whole, at some addresses
    build = churning({"a": 300})
    pair = make_pair(build, settings=settings)
    module = MODULES[name]
    look = module.known_zero
    looked = []

    def look_and_be_overtaken(region):
        zero = look(region)
        if not looked:
            looked.append(int(zero.sum()))
            pair.source.start()
            build.source.wait_steps(100)
        return zero

    monkeypatch.setattr(module, "known_zero", look_and_be_overtaken)
    _, outgoing = pair.run()
    assert outgoing.error is None
    assert looked == [150], "half of it is filled when the power comes on"
    pair.destination.stop()
    build.destination.check()
