"""The hooks are locked: plugins rely on their names, families and parameters. There may be more, never less."""

import inspect
import json
from pathlib import Path

import pytest

from whimbrel import hookspecs
from whimbrel.plugins._contract import HOOKS
from whimbrel.plugins.catalogue import KINDS

LOCK = json.loads(Path(__file__).with_name("hooks.lock.json").read_text())
FAMILIES = {
    "offers": hookspecs.OFFERS,
    "checks": hookspecs.CHECKS,
    "choices": hookspecs.CHOICES,
    "notices": hookspecs.NOTICES,
}


@pytest.mark.parametrize("name", LOCK)
def test_what_is_locked_is_still_there(name):
    parameters = list(inspect.signature(getattr(hookspecs, name)).parameters)
    locked = LOCK[name]["parameters"]
    assert parameters[: len(locked)] == locked
    assert name in FAMILIES[LOCK[name]["family"]]


def test_every_hook_is_locked():
    """A new hook or parameter is added to hooks.lock.json in the change that adds it."""
    found = {name for name in vars(hookspecs) if name.startswith("whimbrel_")}
    assert found == LOCK.keys() == HOOKS.keys()
    assert {name: list(parameters) for name, parameters in HOOKS.items()} == {
        name: locked["parameters"] for name, locked in LOCK.items()
    }


def test_every_hook_is_of_one_family_and_has_a_kind():
    names = [name for family in FAMILIES.values() for name in family]
    assert sorted(names) == sorted(HOOKS)
    assert KINDS.keys() == HOOKS.keys()
