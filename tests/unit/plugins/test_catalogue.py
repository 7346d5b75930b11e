"""The catalogue: what `whimbrel plugins` shows."""

# ruff: noqa: A002 - `round` is what the hook calls it

import json

import attrs
import pytest

from whimbrel.abc import CodecSpec, DirtyTrackerSpec, SaveVMSpec, TransportSpec
from whimbrel.hookspecs import hookimpl
from whimbrel.plugins import Catalogue, PluginManager, PluginRow
from whimbrel.verbs import VerbsProviderSpec
from whimbrel.witness import WitnessSpec


class Everything:
    @hookimpl
    def whimbrel_transports(self):
        return [TransportSpec(name="t", summary="", create=object)]

    @hookimpl
    def whimbrel_savevm_handlers(self, machine):
        return [SaveVMSpec(name="s", summary="", create=list)]

    @hookimpl
    def whimbrel_codecs(self):
        return [CodecSpec(name="c", summary="", create=object), CodecSpec(name="c2", summary="", create=object)]

    @hookimpl
    def whimbrel_dirty_trackers(self):
        return [DirtyTrackerSpec(name="d", summary="", create=object, probe=lambda regions: None)]

    @hookimpl
    def whimbrel_verbs_providers(self):
        return [VerbsProviderSpec(name="v", summary="", create=object, probe=lambda: None)]

    @hookimpl
    def whimbrel_witnesses(self):
        return [WitnessSpec(name="w", summary="", create=object)]

    @hookimpl
    def whimbrel_check_migration(self, plan):
        raise AssertionError("not asked")

    @hookimpl
    def whimbrel_choose_switchover(self, round):
        raise AssertionError("not asked")

    @hookimpl
    def whimbrel_on_event(self, event):
        raise AssertionError("not asked")


def test_a_row_says_what_a_plugin_is_and_offers():
    manager = PluginManager(load_entry_points=False)
    manager.register(Everything(), "everything", "a-dist")
    (row,) = manager.catalogue()
    assert row == PluginRow(
        name="everything",
        kinds=(
            "transport",
            "savevm",
            "codec",
            "dirty tracker",
            "verbs provider",
            "witness",
            "check",
            "choice",
            "notifier",
        ),
        offers=("t", "c", "c2", "d", "v", "w"),
        distribution="a-dist",
        version="",
        state="active",
    )
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        row.state = "broken"


def test_it_is_ready_for_json():
    manager = PluginManager(load_entry_points=False, disable=["off"])
    manager.register(Everything(), "off")
    catalogue = manager.catalogue()
    assert isinstance(catalogue, Catalogue)
    assert len(catalogue) == 1
    assert json.loads(json.dumps(catalogue.as_dict())) == {
        "plugins": [
            {
                "name": "off",
                "kinds": [],
                "offers": [],
                "distribution": "local",
                "version": "",
                "state": "disabled",
                "reason": "settings say so",
                "in_use": [],
            }
        ]
    }


def test_rows_are_sorted_by_name():
    manager = PluginManager(load_entry_points=False)
    for name in ("b", "c", "a"):
        manager.register(Everything(), name)
    assert [row.name for row in manager.catalogue()] == ["a", "b", "c"]


def test_settings_that_are_wrong_do_not_keep_it_from_being_shown():
    manager = PluginManager(load_entry_points=False, active=["nobody"], notifiers=["nobody"])
    manager.register(Everything(), "one")
    assert [row.state for row in manager.catalogue()] == ["active"]


def test_the_bundled_transports_and_notifier_are_offered():
    rows = {row.name: row for row in PluginManager().catalogue() if row.distribution == "whimbrel"}
    for name, kind, offers in [
        ("tcp", "transport", ("tcp",)),
        ("unix", "transport", ("unix",)),
        ("log", "notifier", ()),
    ]:
        assert (rows[name].kinds, rows[name].offers, rows[name].state) == ((kind,), offers, "offered")
        assert rows[name].version
    named = {row.name: row.state for row in PluginManager(notifiers=["log"]).catalogue()}
    assert named["log"] == "active"


class Verbs:
    def __init__(self, **ranks):
        self.ranks = ranks

    @hookimpl
    def whimbrel_verbs_providers(self):
        return [
            VerbsProviderSpec(
                name=name,
                summary="",
                create=object,
                rank=rank,
                probe=lambda name=name: "no adapter" if name == "far" else None,
            )
            for name, rank in self.ranks.items()
        ]


@pytest.mark.parametrize(
    ("provider", "expected"),
    [("auto", {"one": (), "two": ("b",)}), ("a", {"one": ("a",), "two": ()}), ("far", {"one": (), "two": ()}),
     ("nobody's", {"one": (), "two": ()})],
)  # fmt: skip
def test_the_provider_of_verbs_that_is_in_use_is_marked(provider, expected):
    """With "auto" that is the working one of the highest rank; one that cannot work is not in use."""
    manager = PluginManager(load_entry_points=False, verbs_provider=provider)
    manager.register(Verbs(a=1, far=9), "one")
    manager.register(Verbs(b=2), "two")
    assert {row.name: row.in_use for row in manager.catalogue()} == expected


def test_one_of_the_bundled_providers_is_in_use():
    assert [row.in_use for row in PluginManager().catalogue() if row.in_use] == [("software",)]
