"""How `whimbrel run` finds its factory, and how settings reach the machine."""

from __future__ import annotations

import sys

import pytest

from whimbrel.cli._machines import build
from whimbrel.errors import ConfigError, UnknownNameError, WhimbrelError


@pytest.fixture(autouse=True)
def _clean(folder, monkeypatch):
    """A folder without settings, and the imports of before at the end."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("whimbrel_app_", "here")):
            del sys.modules[name]


def built(app, config=None, **overrides):
    with build(str(app), config, overrides) as machine:
        return machine.settings


def test_a_factory_of_a_file(app):
    assert built(f"{app}:small") is not None


def test_a_factory_of_a_module_in_the_current_folder(folder, app):
    (folder / "here").mkdir()
    (folder / "here" / "it_is.py").write_text(app.read_text())
    assert built("here.it_is:small") is not None


def test_a_file_may_import_its_neighbours(folder, app):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "here_neighbour.py").write_text(app.read_text())
    (elsewhere / "main.py").write_text("from here_neighbour import small")
    assert built("elsewhere/main.py:small") is not None


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("small", "'small' is no APP: expected MODULE:FACTORY"),
        (":small", "is no APP"),
        ("app.py:", "is no APP"),
        ("nope.py:small", "there is no file 'nope.py'"),
        ("nope:small", "there is no module 'nope' for nope:small"),
        ("whimbrel.nope:small", "there is no module 'whimbrel.nope'"),
        ("app.py:value", "app.py:value is a int"),
        ("app.py:nothing", "returned None, expected a whimbrel.Machine"),
    ],
)
def test_what_is_no_app(app, target, says):
    with pytest.raises(ConfigError) as caught:
        built(target)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unknown_factory_lists_those_there_are(app):
    with pytest.raises(UnknownNameError) as caught:
        built("app.py:smal")
    assert "did you mean 'app.py:small'?" in str(caught.value)
    assert caught.value.known == [
        f"app.py:{name}" for name in ("breaks", "heeds", "never", "nothing", "refuses", "small")
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import nothing_of_that_name", "importing bad.py failed: ModuleNotFoundError"),
        ("1 / 0", "importing bad.py failed: ZeroDivisionError"),
        ("def small(:", "importing bad.py failed: SyntaxError"),
        ("def small(): raise ValueError('not today')", "bad.py:small failed: ValueError: not today"),
        ("def small(needed): pass", "bad.py:small failed: TypeError"),
    ],
)
def test_a_program_that_fails_is_not_a_wrong_command(folder, text, says):
    (folder / "bad.py").write_text(text)
    with pytest.raises(WhimbrelError) as caught:
        built("bad.py:small")
    assert says in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_module_that_misses_another_is_not_missing_itself(folder):
    (folder / "here_bad.py").write_text("import nothing_of_that_name")
    with pytest.raises(WhimbrelError, match="importing here_bad failed") as caught:
        built("here_bad:small")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("factory", ["small", "heeds"])
def test_settings_reach_the_machine_with_the_command_line_first(app, folder, monkeypatch, factory):
    (folder / "whimbrel.toml").write_text(
        '[parameters]\nmax-bandwidth = "1MiB"\ndowntime-limit = 10\n[limits]\nconnect-timeout = 3\n'
    )
    monkeypatch.setenv("WHIMBREL_PARAMETERS__DOWNTIME_LIMIT", "20ms")
    settings = built(f"app.py:{factory}", parameters={"announce-rounds": "2"}, capabilities={"switchover-ack": "on"})
    assert settings.parameters.max_bandwidth == 1 << 20
    assert settings.parameters.downtime_limit == 20
    assert settings.parameters.announce_rounds == 2
    assert settings.limits.connect_timeout == 3.0
    assert settings.capabilities.switchover_ack


def test_what_nobody_names_is_left_as_the_program_has_it(folder, app):
    app.write_text(
        app.read_text() + "\ndef own():\n  m = small()\n  m.settings.parameters.downtime_limit = 7\n  return m"
    )
    assert built("app.py:own").parameters.downtime_limit == 7
    # Also where it happens to be the default.
    assert built("app.py:own", parameters={"downtime-limit": "300"}).parameters.downtime_limit == 300


def test_another_file_can_be_named(folder, app):
    (folder / "whimbrel.toml").write_text("[parameters]\ndowntime-limit = 10\n")
    (folder / "other.toml").write_text("[parameters]\nmax-bandwidth = 5\n")
    settings = built("app.py:small", "other.toml")
    assert (settings.parameters.downtime_limit, settings.parameters.max_bandwidth) == (300, 5)


def test_backends_reach_a_factory_that_takes_settings(app):
    assert built("app.py:heeds", backends={"memory": "memfd"}).backends.memory == "memfd"


def test_backends_are_never_silently_without_effect(app):
    with pytest.raises(ConfigError, match="give the factory a parameter `settings`"):
        built("app.py:small", backends={"memory": "memfd"})
    # Saying what is so anyway is fine.
    assert built("app.py:small", backends={"memory": "anonymous"}).backends.memory == "anonymous"
