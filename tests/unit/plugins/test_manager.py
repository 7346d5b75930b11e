"""The plugin manager: who is refused, who is heard, what becomes of those that fail."""

# ruff: noqa: A002 - `round` is what the hook calls it

import functools
import logging
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest

from whimbrel.abc import CodecSpec, DirtyTrackerSpec, SaveVMSpec, TransportSpec
from whimbrel.errors import BrokenPlugin, ConnectError, DuplicateOffer, PluginError, PluginRefused, UnknownNameError
from whimbrel.events import GuestStarted, GuestStopped
from whimbrel.hookspecs import hookimpl
from whimbrel.plugins import Failure, PluginManager
from whimbrel.verbs import VerbsProviderSpec

EVENT = GuestStopped()


def transport(name, create=object):
    return TransportSpec(name=name, summary="a test", create=create)


def savevm(name):
    return SaveVMSpec(name=name, summary="a test", create=list)


def plugin(**functions):
    """A plugin object; each value is a function, or what the hook answers with."""
    module = ModuleType("plugin")
    for name, function in functions.items():
        setattr(module, name, hookimpl(function if callable(function) else answering(name, function)))
    return module


def answering(hook, answer):
    arguments = {
        "whimbrel_savevm_handlers": "machine",
        "whimbrel_check_migration": "plan",
        "whimbrel_choose_switchover": "round",
        "whimbrel_on_event": "event",
    }
    return eval(f"lambda {arguments.get(hook, '')}: answer", {"answer": answer})


def local(**settings):
    return PluginManager(load_entry_points=False, **settings)


def failing():
    raise ValueError("no luck")


def failing_handlers(machine):
    raise ValueError("no luck")


def failing_check(plan):
    raise ValueError("no luck")


def failing_choice(round):
    raise ValueError("no luck")


# ------------------------------------------------------------------------------------------------- refusals


class Misspelt:
    @hookimpl
    def whimbrel_transport(self):
        return []


class Undecorated:
    def whimbrel_transports(self):
        return []


class UndecoratedAndMisspelt:
    def whimbrel_transprots(self):
        return []


class Property:
    @property
    def whimbrel_transports(self):
        raise AssertionError("nothing of the plugin's is run")


class Async:
    @hookimpl
    async def whimbrel_transports(self):
        return []


class AsyncGenerator:
    @hookimpl
    async def whimbrel_on_event(self, event):
        yield event


class KeywordOnly:
    @hookimpl
    def whimbrel_on_event(self, *, event):
        pass


class Default:
    @hookimpl
    def whimbrel_on_event(self, event=None):
        pass


class Arguments:
    @hookimpl
    def whimbrel_on_event(self, *args):
        pass


class Keywords:
    @hookimpl
    def whimbrel_on_event(self, event, **kwargs):
        pass


class UnknownParameter:
    @hookimpl
    def whimbrel_on_event(self, evnt):
        pass


class Wrapper:
    @hookimpl(wrapper=True)
    def whimbrel_on_event(self, event):
        return (yield)


class OldWrapper:
    @hookimpl(hookwrapper=True)
    def whimbrel_choose_switchover(self, round):
        yield


class Twice:
    @hookimpl
    def whimbrel_transports(self):
        return []

    @hookimpl(specname="whimbrel_transports")
    def more(self):
        return []


class HalfGood:
    """Its first hook is in order, so a careless manager would have registered that one."""

    @hookimpl
    def whimbrel_codecs(self):
        return [CodecSpec(name="half", summary="", create=object)]

    @hookimpl
    def whimbrel_on_event(self, happening):
        pass


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Misspelt(), "no hook whimbrel_transport; did you mean whimbrel_transports"),
        (Undecorated(), "whimbrel_transports is not a function with the decorator"),
        (UndecoratedAndMisspelt(), "did you mean whimbrel_transports"),
        (Property(), "not a function with the decorator"),
        (Async(), "is async"),
        (AsyncGenerator(), "is async"),
        (KeywordOnly(), "keyword-only"),
        (Default(), "has a default"),
        (Arguments(), "collects arguments; name those you want: event"),
        (Keywords(), "collects arguments"),
        (UnknownParameter(), "'evnt', which the hook does not have; there are: event"),
        (Wrapper(), "wrapper"),
        (OldWrapper(), "wrapper"),
        (Twice(), "implements whimbrel_transports twice"),
        (HalfGood(), "'happening'"),
        (HalfGood, "HalfGood is a class"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_bad_plugin_is_refused_and_leaves_nothing_behind(bad, reason):
    manager = local()
    with pytest.raises(PluginRefused) as caught:
        manager.register(bad, "bad", "bad-dist")
    assert (caught.value.plugin, caught.value.distribution) == ("bad", "bad-dist")
    assert reason in caught.value.reason
    assert "bad" in str(caught.value)
    assert "bad-dist" in str(caught.value)
    assert manager.catalogue().rows == ()
    assert manager.codecs() == manager.transports() == []
    manager.notify(EVENT)
    assert manager.failures == []
    assert manager.register(plugin(whimbrel_transports=[transport("x")]), "bad") == "bad"
    assert manager.transport("x").name == "x"


def test_what_only_looks_like_a_hook_is_no_fault():
    module = plugin(whimbrel_transports=[transport("x")])
    module.whimbrel_transports_module = logging
    module.whimbrel_version = "1"
    module.whimbrel_Class = type("whimbrel_Class", (), {})
    manager = local()
    manager.register(module, "fine")
    assert manager.transport("x").name == "x"


def test_a_hook_of_a_newer_whimbrel_may_be_optional():
    class Newer:
        @hookimpl(optionalhook=True)
        def whimbrel_teleport(self, everything):
            raise AssertionError

        @hookimpl
        def whimbrel_transports(self):
            return [transport("x")]

    manager = local()
    assert manager.register(Newer()) == "Newer"
    assert manager.transport("x").name == "x"
    (row,) = manager.catalogue()
    assert (row.kinds, row.state) == (("transport",), "active")


def test_a_decorated_function_under_another_decorator_is_seen_through():
    def noting(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    told = []
    manager = local()
    manager.register(plugin(whimbrel_on_event=noting(lambda event: told.append(event))))
    manager.notify(EVENT)
    assert told == [EVENT]


def test_a_name_has_one_owner_and_an_object_one_name():
    manager = local()
    one, two = plugin(), plugin()
    manager.register(one, "name")
    with pytest.raises(PluginRefused, match="taken by the plugin 'name' \\(from local\\)"):
        manager.register(two, "name", "other")
    with pytest.raises(PluginRefused, match="already registered"):
        manager.register(one, "another")
    assert [row.name for row in manager.catalogue()] == ["name"]


def test_names_come_from_the_module_or_the_class():
    manager = local()
    module = ModuleType("some.package.pigeon")
    assert manager.register(module) == "pigeon"
    assert manager.register(SimpleNamespace()) == "SimpleNamespace"


# ------------------------------------------------------------------------------------------------- offers


def test_offers_are_found_by_name():
    manager = local()
    tracker = DirtyTrackerSpec(name="t", summary="", create=object, probe=lambda regions: None)
    codec = CodecSpec(name="c", summary="", create=object)
    manager.register(plugin(whimbrel_transports=[transport("b"), transport("a")]), "one")
    manager.register(plugin(whimbrel_codecs=(codec,), whimbrel_dirty_trackers=[tracker]), "two")
    assert [spec.name for spec in manager.transports()] == ["a", "b"]
    assert manager.codec("c") is codec
    assert manager.codecs() == [codec]
    assert manager.dirty_tracker("t") is tracker
    assert manager.dirty_trackers() == [tracker]


def test_an_unknown_name_lists_what_there_is():
    manager = local()
    manager.register(plugin(whimbrel_transports=[transport("tcp"), transport("unix")]))
    with pytest.raises(UnknownNameError, match="unknown transport 'tpc'; did you mean 'tcp'\\? There are: tcp, unix"):
        manager.transport("tpc")
    with pytest.raises(UnknownNameError) as caught:
        manager.codec("zstd")
    assert (caught.value.kind, caught.value.known) == ("codec", [])


def test_offers_are_asked_for_once_and_later_plugins_are_asked_too():
    asked = []
    manager = local()
    manager.register(plugin(whimbrel_transports=lambda: asked.append("a") or [transport("a")]), "a")
    manager.transport("a")
    manager.register(plugin(whimbrel_transports=lambda: asked.append("b") or [transport("b")]), "b")
    manager.transport("a")
    assert manager.transport("b").name == "b"
    assert asked == ["a", "b"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (failing, "ValueError: no luck"),
        (None, "it answered None"),
        ("tcp", "it answered a str"),
        (transport("x"), "it answered a TransportSpec"),
        ([transport("x"), CodecSpec(name="c", summary="", create=object)], "its answer has a CodecSpec"),
        ([transport("x"), transport("x")], "it offers 'x' 2 times"),
        ([transport("")], "has no name"),
        (lambda: (spec for spec in [transport("x")]), "it answered a generator"),
    ],
)
def test_a_plugin_that_fails_to_offer_is_left_out_and_remembered(answer, reason, caplog):
    manager = local()
    manager.register(plugin(whimbrel_transports=answer), "bad", "bad-dist")
    manager.register(plugin(whimbrel_transports=[transport("good")]), "good")
    assert [spec.name for spec in manager.transports()] == ["good"]
    assert "bad" in caplog.text
    with pytest.raises(BrokenPlugin) as caught:
        manager.transport("bad")
    assert (caught.value.plugin, caught.value.distribution) == ("bad", "bad-dist")
    assert reason in caught.value.reason
    assert caught.value.__cause__ is not None
    with pytest.raises(UnknownNameError, match="Some plugins are broken: bad"):
        manager.transport("x")
    rows = {row.name: row for row in manager.catalogue()}
    assert rows["bad"].state == "broken"
    assert reason in rows["bad"].reason


def test_two_offers_of_one_name_are_an_error_when_it_is_used():
    manager = local()
    manager.register(plugin(whimbrel_transports=[transport("x"), transport("y")]), "one", "dist-1")
    manager.register(plugin(whimbrel_transports=[transport("x")]), "two", "dist-2")
    assert manager.transport("y").name == "y"
    assert [spec.name for spec in manager.transports()] == ["y"]
    with pytest.raises(DuplicateOffer) as caught:
        manager.transport("x")
    for word in ("'x'", "'one'", "dist-1", "'two'", "dist-2"):
        assert word in str(caught.value)


@pytest.mark.parametrize("whose", ["one", "two"])
def test_settings_say_whose_offer_is_meant(whose):
    manager = local(prefer={"x": whose})
    offers = {"one": transport("x", create=list), "two": transport("x", create=dict)}
    for name, spec in offers.items():
        manager.register(plugin(whimbrel_transports=[spec]), name)
    assert manager.transport("x") is offers[whose]
    assert manager.transports() == [offers[whose]]


def test_preferring_a_plugin_that_does_not_offer_it_is_an_error():
    manager = local(prefer={"x": "oen"})
    manager.register(plugin(whimbrel_transports=[transport("x")]), "one")
    with pytest.raises(UnknownNameError, match="plugin for the transport 'x' 'oen'; did you mean 'one'"):
        manager.transport("x")


def test_choosing_among_trackers_uses_every_name():
    def tracker(name):
        return DirtyTrackerSpec(name=name, summary="", create=object, probe=lambda regions: None)

    manager = local()
    manager.register(plugin(whimbrel_dirty_trackers=[tracker("a"), tracker("b")]), "one")
    manager.register(plugin(whimbrel_dirty_trackers=[tracker("a")]), "two")
    assert manager.dirty_tracker("b").name == "b"
    with pytest.raises(DuplicateOffer):
        manager.dirty_trackers()


def verbs(name, rank=None, reason=None):
    def probe():
        if isinstance(reason, Exception):
            raise reason
        return reason

    return VerbsProviderSpec(name=name, summary="", create=object, probe=probe, rank=rank)


def test_a_transport_is_handed_what_finds_a_provider_of_verbs():
    handed = []

    def whimbrel_transports(verbs):
        handed.append(verbs)
        return [transport("x")]

    offered = [verbs("weak", 1), verbs("strong", 9), verbs("adapter", 20, "no adapter"), verbs("named")]
    for chosen, expected in (("auto", "strong"), ("weak", "weak"), ("named", "named")):
        manager = local(verbs_provider=chosen)
        manager.register(plugin(whimbrel_transports=whimbrel_transports), "one")
        manager.register(plugin(whimbrel_verbs_providers=offered), "two")
        assert manager.transport("x").name == "x"
        assert handed.pop().provider().name == expected
        assert not handed


def test_no_provider_of_verbs_works_and_every_reason_is_said():
    manager = local()
    with pytest.raises(ConnectError, match=r"no verbs provider works here$"):
        manager.provider()
    offered = [verbs("adapter", 20, "no adapter"), verbs("odd", 3, ValueError("no luck")), verbs("named")]
    manager.register(plugin(whimbrel_verbs_providers=offered), "two")
    with pytest.raises(ConnectError, match=r"adapter: no adapter; odd: its probe failed: ValueError\('no luck'\)$"):
        manager.provider()
    named = local(verbs_provider="adapter")
    named.register(plugin(whimbrel_verbs_providers=offered), "two")
    with pytest.raises(ConnectError, match="'adapter' cannot work here: no adapter"):
        named.provider()
    unknown = local(verbs_provider="adaptor")
    unknown.register(plugin(whimbrel_verbs_providers=offered), "two")
    with pytest.raises(UnknownNameError, match="verbs provider 'adaptor'; did you mean 'adapter'"):
        unknown.provider()


# ------------------------------------------------------------------------------------------------- savevm handlers


def test_registered_savevm_handlers_take_part_unasked():
    machines = []
    manager = local()
    spec = savevm("engine")
    manager.register(plugin(whimbrel_savevm_handlers=lambda machine: machines.append(machine) or [spec]))
    assert manager.savevm_handlers("m1", []) == [spec]
    assert manager.savevm_handlers("m2", ["engine"]) == [spec]
    assert machines == ["m1", "m2"]


def test_a_part_of_the_machine_is_never_left_behind_in_silence():
    manager = local()
    manager.register(plugin(whimbrel_savevm_handlers=failing_handlers), "engine")
    with pytest.raises(BrokenPlugin, match="no luck"):
        manager.savevm_handlers("m", [])
    with pytest.raises(UnknownNameError, match="unknown savevm 'ram'"):
        local().savevm_handlers("m", ["ram"])


def test_a_savevm_plugin_that_recovers_is_whole_again():
    answers = [ValueError("not yet"), [savevm("engine")]]

    def handlers(machine):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    manager = local()
    manager.register(plugin(whimbrel_savevm_handlers=handlers), "engine")
    with pytest.raises(BrokenPlugin, match="not yet"):
        manager.savevm_handlers("m", ["engine"])
    assert [row.state for row in manager.catalogue()] == ["broken"]
    assert [spec.name for spec in manager.savevm_handlers("m", ["engine"])] == ["engine"]
    assert [row.state for row in manager.catalogue()] == ["active"]


# ------------------------------------------------------------------------------------------------- checks and choices


def test_all_problems_are_reported_and_a_check_that_fails_is_one():
    manager = local()
    manager.register(plugin(whimbrel_check_migration=["too big", "too far"]), "one")
    manager.register(plugin(whimbrel_check_migration=failing_check), "two", "dist-2")
    manager.register(plugin(whimbrel_check_migration="a lone sentence"), "three")
    manager.register(plugin(whimbrel_check_migration=[]), "four")
    problems = manager.check_migration(SimpleNamespace())
    assert problems[:2] == ["too big", "too far"]
    assert "'two' (from dist-2)" in problems[2]
    assert "no luck" in problems[2]
    assert "'three'" in problems[3]
    assert len(problems) == 4


def test_choices_are_made_in_the_order_of_the_settings_then_of_registration():
    asked = []

    def choice(name, answer):
        def choose(round):
            asked.append(name)
            return answer

        return plugin(whimbrel_choose_switchover=choose)

    manager = local(active=["c", "a"])
    for name, answer in {"a": None, "b": None, "c": None, "d": False, "e": True}.items():
        manager.register(choice(name, answer), name)
    assert manager.choose_switchover(SimpleNamespace()) is False
    assert asked == ["c", "a", "b", "d"]


def test_nobody_decides():
    manager = local()
    manager.register(plugin(whimbrel_choose_switchover=None))
    assert manager.choose_switchover(SimpleNamespace()) is None


@pytest.mark.parametrize(("answer", "reason"), [(failing_choice, "no luck"), (1, "answered 1"), ("yes", "'yes'")])
def test_a_choice_that_fails_is_an_error_that_names_the_plugin(answer, reason):
    manager = local()
    manager.register(plugin(whimbrel_choose_switchover=answer), "chooser", "dist")
    with pytest.raises(PluginError, match=reason) as caught:
        manager.choose_switchover(SimpleNamespace())
    assert (caught.value.plugin, caught.value.distribution) == ("chooser", "dist")


# ------------------------------------------------------------------------------------------------- notices


def test_a_notifier_that_fails_is_muted_and_the_others_are_told(caplog):
    told = []

    def fails(event):
        told.append("bad")
        raise ValueError("no luck")

    manager = local()
    manager.register(plugin(whimbrel_on_event=fails), "bad")
    manager.register(plugin(whimbrel_on_event=lambda event: told.append(event)), "good")
    first, second = GuestStopped(), GuestStarted()
    manager.notify(first)
    manager.notify(second)
    assert told == ["bad", first, second]
    assert manager.failures == [Failure("bad", "whimbrel_on_event", "ValueError: no luck")]
    assert "no luck" in caplog.text
    assert [(row.name, row.state) for row in manager.catalogue()] == [("bad", "broken"), ("good", "active")]


def test_what_is_no_exception_of_the_plugin_passes_through():
    def interrupted(event):
        raise KeyboardInterrupt

    manager = local()
    manager.register(plugin(whimbrel_on_event=interrupted))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            manager.notify(EVENT)
    assert manager.failures == []


# ------------------------------------------------------------------------------------------------- settings


def test_settings_that_name_nothing_are_an_error_at_the_first_question():
    manager = local(active=["judge"])
    manager.register(plugin(), "jugde")
    with pytest.raises(UnknownNameError, match="unknown plugin 'judge'"):
        manager.transports()
    manager.register(plugin(whimbrel_check_migration=[]), "judge")
    assert manager.transports() == []


def test_a_notifier_must_be_able_to_hear():
    manager = local(notifiers=["deaf"])
    manager.register(plugin(whimbrel_transports=[]), "deaf")
    manager.register(plugin(whimbrel_on_event=None), "hears")
    with pytest.raises(UnknownNameError, match="unknown notifier 'deaf'; there are: hears"):
        manager.check_migration(SimpleNamespace())
    manager.notify(EVENT)  # leaves the complaint to the others


def test_a_disabled_plugin_is_listed_and_otherwise_ignored():
    told = []
    manager = local(disable=["off"], notifiers=["off"])
    assert manager.register(plugin(whimbrel_on_event=lambda event: told.append(event)), "off") == "off"
    manager.notify(EVENT)
    assert told == []
    with pytest.raises(UnknownNameError, match="disabled by the settings"):
        manager.transport("off")
    (row,) = manager.catalogue()
    assert row.state == "disabled"


# ------------------------------------------------------------------------------------------------- entry points

PIGEON = """
from whimbrel.abc import TransportSpec
from whimbrel.hookspecs import hookimpl

@hookimpl
def whimbrel_transports():
    return [TransportSpec(name={name!r}, summary="of {name}", create=object)]
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Makes distributions in a folder on the path: `site(name, {plugin: module}, **modules)`."""
    monkeypatch.syspath_prepend(tmp_path)

    def distribution(name, entries, version="1.0", folder=tmp_path, **modules):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = entries if isinstance(entries, str) else "\n".join(f"{k} = {v}" for k, v in entries.items())
        (info / "entry_points.txt").write_text(f"[whimbrel]\n{lines}\n")
        for module, text in modules.items():
            (folder / f"{module}.py").write_text(text)

    return distribution


@pytest.fixture
def row():
    return lambda manager, name: next(row for row in manager.catalogue() if row.name == name)


def test_an_installed_plugin_is_found(site, row):
    site("test-crow", {"crow": "test_crow_module"}, "2.5", test_crow_module=PIGEON.format(name="crow"))
    manager = PluginManager()
    assert manager.transport("crow").summary == "of crow"
    found = row(manager, "crow")
    assert (found.distribution, found.version, found.state) == ("test-crow", "2.5", "offered")
    assert (found.kinds, found.offers) == (("transport",), ("crow",))


def test_nothing_is_imported_before_it_is_needed(site, tmp_path):
    site("test-wren", {"wren": "test_wren_module"}, test_wren_module=f"open({str(tmp_path / 'seen')!r}, 'x').close()")
    manager = PluginManager()
    manager.notify(EVENT)
    manager.register(plugin(), "mine")
    assert not (tmp_path / "seen").exists()
    manager.transports()
    assert (tmp_path / "seen").exists()


def test_a_disabled_plugin_is_not_imported(site, row):
    site("test-rook", {"rook": "test_rook_module"}, test_rook_module="raise AssertionError")
    manager = PluginManager(disable=["rook"])
    manager.transports()
    assert (row(manager, "rook").state, row(manager, "rook").kinds) == ("disabled", ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import there_is_no_such_module", "No module named 'there_is_no_such_module'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("1 +", "SyntaxError"),
        ("def whimbrel_transports():\n    return []\n", "with the decorator"),
    ],
)
def test_a_broken_plugin_is_remembered_and_stops_nobody(site, row, text, reason, monkeypatch):
    monkeypatch.delitem(sys.modules, "test_owl_module", raising=False)
    site("test-owl", {"owl": "test_owl_module"}, test_owl_module=text)
    site("test-zander", {"zander": "test_zander_module"}, test_zander_module=PIGEON.format(name="zander"))
    manager = PluginManager(disable=["log"])
    assert manager.transport("zander").name == "zander"
    assert row(manager, "owl").state == "broken"
    assert reason in row(manager, "owl").reason
    with pytest.raises(BrokenPlugin) as caught:
        manager.transport("owl")
    assert (caught.value.plugin, caught.value.distribution) == ("owl", "test-owl")
    assert reason in str(caught.value)
    with pytest.raises(UnknownNameError, match=r"Some plugins are broken: .*owl"):
        manager.transport("eagle")


def test_settings_that_name_a_broken_plugin_are_an_error(site):
    site("test-owl2", {"owl2": "there.is.no.such.module"})
    with pytest.raises(BrokenPlugin, match="owl2"):
        PluginManager(notifiers=["owl2"]).check_migration(SimpleNamespace())


def test_the_second_owner_of_a_name_is_refused(site, row):
    site("test-a", {"swift": "test_swift_a"}, test_swift_a=PIGEON.format(name="swift-a"))
    site("test-b", {"swift": "test_swift_b"}, test_swift_b=PIGEON.format(name="swift-b"))
    manager = PluginManager()
    assert manager.transport("swift-a").name == "swift-a"
    with pytest.raises(UnknownNameError):
        manager.transport("swift-b")
    first, second = [one for one in manager.catalogue() if one.name == "swift"]
    assert (first.distribution, first.state) == ("test-a", "offered")
    assert (second.distribution, second.state) == ("test-b", "broken")
    assert "taken by the plugin 'swift' (from test-a)" in second.reason


def test_no_stranger_takes_the_name_of_a_bundled_plugin(site):
    site("aaa", {"tcp": "test_hijack"}, test_hijack=PIGEON.format(name="tcp"))
    rows = [one for one in PluginManager().catalogue() if one.name == "tcp"]
    assert [(one.distribution, one.reason.startswith("the name is taken")) for one in rows] == [
        ("whimbrel", False),
        ("aaa", True),
    ]


def test_a_program_cannot_take_the_name_of_an_installed_plugin(site):
    site("test-tit", {"tit": "test_tit"}, test_tit=PIGEON.format(name="tit"))
    manager = PluginManager()
    with pytest.raises(PluginRefused, match="from test-tit"):
        manager.register(plugin(), "tit")


def test_two_installed_offers_of_one_name_are_an_error_until_settings_say_whose(site):
    site("test-g1", {"gull1": "test_gull1"}, test_gull1=PIGEON.format(name="gull"))
    site("test-g2", {"gull2": "test_gull2"}, test_gull2=PIGEON.format(name="gull"))
    with pytest.raises(DuplicateOffer, match=r"test-g1.*test-g2"):
        PluginManager().transport("gull")
    assert PluginManager(prefer={"gull": "gull2"}).transport("gull").name == "gull"
    assert PluginManager(disable=["gull1"]).transport("gull").name == "gull"


def test_a_distribution_that_is_there_twice_counts_once(site, row, tmp_path, monkeypatch):
    second = tmp_path / "second"
    site("test_tern", {"tern": "test_tern"}, "2.0", test_tern=PIGEON.format(name="tern"))
    site("test-tern", {"tern": "test_tern"}, "1.0", folder=second)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(second)])
    manager = PluginManager()
    assert manager.transport("tern").name == "tern"
    assert [one.version for one in manager.catalogue() if one.name == "tern"] == ["2.0"]


def test_unreadable_metadata_stops_nobody(site, row, tmp_path):
    site("test-bad", "this is not a line of an entry point file")
    nameless = tmp_path / "nameless-1.0.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[whimbrel]\nnameless = there.is.nothing\n")
    garbage = tmp_path / "garbage-1.0.dist-info"
    garbage.mkdir()
    (garbage / "entry_points.txt").write_bytes(b"\xff\xfe[whimbrel]")
    site("test-fine", {"finch": "test_finch"}, test_finch=PIGEON.format(name="finch"))
    manager = PluginManager()
    assert manager.transport("finch").name == "finch"
    assert row(manager, "test-bad").state == row(manager, "nameless").state == "broken"


def test_installed_checks_are_heard_only_when_named(site):
    text = """
from whimbrel.hookspecs import hookimpl

@hookimpl
def whimbrel_check_migration(plan):
    return ["never"]

@hookimpl
def whimbrel_choose_switchover(round):
    return True

@hookimpl
def whimbrel_on_event(event):
    raise ValueError("told")

@hookimpl
def whimbrel_savevm_handlers(machine):
    from whimbrel.abc import SaveVMSpec
    return [SaveVMSpec(name="judged", summary="", create=list)]
"""
    site("test-judge", {"judge": "test_judge"}, test_judge=text)
    silent, active, told = PluginManager(), PluginManager(active=["judge"]), PluginManager(notifiers=["judge"])
    for manager in (silent, active, told):
        manager.notify(EVENT)
    assert (silent.check_migration(None), silent.choose_switchover(None), silent.failures) == ([], None, [])
    assert (active.check_migration(None), active.choose_switchover(None), active.failures) == (["never"], True, [])
    assert (told.check_migration(None), told.choose_switchover(None)) == ([], None)
    assert [failure.plugin for failure in told.failures] == ["judge"]
    assert [spec.name for spec in silent.savevm_handlers(None, ["judged"])] == ["judged"]
    assert silent.savevm_handlers(None, []) == []


def test_threads_that_ask_at_once_load_once(site):
    site(
        "test-dove",
        {"dove": "test_dove"},
        test_dove=PIGEON.format(name="dove") + "import threading\nimported = threading.get_ident()\n",
    )
    manager = PluginManager()
    gate, found = threading.Barrier(8), []

    def ask():
        gate.wait()
        found.append(manager.transport("dove"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(spec is found[0] for spec in found)


# ------------------------------------------------------------------------------------------------- tracing


@pytest.fixture
def traced(monkeypatch):
    monkeypatch.setenv("WHIMBREL_TRACE_PLUGINS", "1")
    logger = logging.getLogger("whimbrel.plugins.trace")
    yield logger
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_the_environment_turns_tracing_on(traced, capsys):
    class Unprintable:
        def __repr__(self):
            raise RuntimeError("not even that")

    manager = local()
    local()  # a second one adds no second line
    manager.register(plugin(whimbrel_choose_switchover=True, whimbrel_transports=failing), "one")
    manager.choose_switchover(Unprintable())
    manager.transports()
    manager.transports()
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "whimbrel_choose_switchover(round=" in line]) == 1
    assert any(line.endswith("whimbrel_choose_switchover: one -> True") for line in lines)
    assert any("whimbrel_transports: one raised ValueError('no luck')" in line for line in lines)
    assert len([line for line in lines if "whimbrel_transports(verbs=" in line and line.endswith("asks one")]) == 1


def test_without_it_nothing_is_traced(capsys, monkeypatch):
    monkeypatch.delenv("WHIMBREL_TRACE_PLUGINS", raising=False)
    local().choose_switchover(None)
    assert capsys.readouterr().err == ""
