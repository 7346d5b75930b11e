"""What the command line says to what it does not understand: one line, an exit status, and no traceback."""

from __future__ import annotations

import json

import pytest

COMMANDS = ["cancel", "demo", "inspect", "migrate", "plugins", "receive", "run", "send", "set", "status"]


def test_help_lists_the_commands(cli):
    result = cli("--help")
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(cli, command):
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: whimbrel {command}")


def test_without_a_command_there_is_help_and_status_2(cli):
    result = cli()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_version(cli):
    result = cli("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("whimbrel ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frobnicate"], "No such command 'frobnicate'; `whimbrel --help` tells how"),
        (["run"], "Missing argument 'APP'; `whimbrel run --help` tells how"),
        (["run", "a:b", "--frob"], "No such option"),
        (["run", "a:b", "--incoming", "defer"], "--incoming defer is told where to wait by QMP"),
        (["run", "a:b", "--set", "downtime-limit"], "expected NAME=VALUE"),
        (["run", "a:b", "--set", "downtime-limi=3"], "did you mean 'downtime-limit'?"),
        (["run", "a:b", "--set", "limit.blocks=3"], "unknown section 'limit'"),
        (["run", "a:b", "--set", "downtime-limit=soon"], "command line: parameters.downtime-limit"),
        (["run", "a:b", "--capability", "return-pat"], "did you mean 'return-path'?"),
        (["run", "a:b", "--capability", "compress"], "not available in this version of whimbrel yet"),
        (["run", "a:b", "--config", "/nonexistent.toml"], "cannot read /nonexistent.toml"),
        (["migrate", "tcp:127.0.0.1:1"], "Missing option '--qmp'"),
        (["migrate", "nowhere", "--qmp", "unix:x"], "'nowhere' is no migration URI; expected SCHEME:ADDRESS"),
        (["migrate", "tcp:h:1", "--qmp", "x"], "'x' is no monitor's address"),
        (["migrate", "tcp:h:1", "--qmp", "unix:x", "--downtime-limit", "1h"], "downtime_limit"),
        (["migrate", "tcp:h:1", "--qmp", "unix:x", "--max-bandwidth", "8Mbit"], "is not a rate"),
        (["migrate", "tcp:h:1", "--qmp", "unix:x", "--capability", "multifdd"], "did you mean 'multifd'?"),
        (["set", "max-bandwith", "1", "--qmp", "unix:x"], "did you mean 'max-bandwidth'?"),
        (["set", "return-path", "perhaps", "--qmp", "unix:x"], "expected: boolean"),
        (["set", "max-bandwidth", "fast", "--qmp", "unix:x"], "is not a rate"),
        (["receive", "unix:x"], "Missing argument 'FILE'; `whimbrel receive --help` tells how"),
        (["receive", "unix:x", "a", "b"], "Got unexpected extra argument (b)"),
        (["receive", "unix:x", "a", "--max-ram"], "Option '--max-ram' requires an argument"),
        (["receive", "unix:x", "a", "--forc"], "No such option '--forc'"),
        (["send", "a"], "Missing argument 'URI'; `whimbrel send --help` tells how"),
        (["send", "a", "unix:x", "--handover", "soon"], "'soon' is not one of 'proof', 'qemu'"),
        (["inspect"], "Missing argument 'FILE'; `whimbrel inspect --help` tells how"),
        (["demo", "--size", "33"], "give it a size of whole records"),
        (["demo", "--size", "0"], "a table of 0 bytes cannot be"),
        (["demo", "--size", "1EiB"], "cannot be"),
        (["demo", "--rate", "inf"], "inf is not a number of updates"),
        (["demo", "--rate", "nan"], "nan is not a number of updates"),
        (["demo", "--rate", "-1"], "-1"),
        (["demo", "--max-bandwidth", "-1"], "max-bandwidth cannot be negative: '-1'"),
        (["migrate", "tcp:h:1", "--qmp", "unix:x", "--max-bandwidth", "-1"], "max-bandwidth cannot be negative"),
        (["demo", "--size", "big"], "is not a size"),
        (["demo", "--transport", "pigeon"], "'pigeon' is not one of 'tcp', 'unix'"),
        (["demo", "--timeout", "never"], "is not a time"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_line_with_status_2(cli, complaint, monkeypatch, arguments, says):
    monkeypatch.setattr("whimbrel.cli._children.subprocess.Popen", None)  # no child is started for it
    result = cli(*arguments)
    assert result.exit_code == 2
    assert says in complaint(result)
    assert result.stdout == ""


def test_a_demo_that_does_not_fit_is_refused(cli, complaint, monkeypatch):
    monkeypatch.setattr("whimbrel.cli._children.subprocess.Popen", None)
    monkeypatch.setattr("whimbrel.cli._demonstration.os.sysconf", {"SC_PHYS_PAGES": 2, "SC_PAGE_SIZE": 4096}.get)
    result = cli("demo", "--size", "8KiB")
    assert result.exit_code == 2
    assert "two machines of 8 KiB do not fit into this system's memory of 8 KiB" in complaint(result)


def test_no_monitor_is_a_failure_with_a_way_out(cli, complaint, folder):
    result = cli("status", "--qmp", f"unix:{folder}/none")
    assert result.exit_code == 1
    assert complaint(result).startswith(f"no machine listens at unix:{folder}/none; ")


def test_json_errors_have_a_code(cli, folder):
    result = cli("status", "--json", "--qmp", f"unix:{folder}/none")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error-code"] == "monitor"


def test_json_usage_errors_have_a_code_too(cli):
    result = cli("set", "max-bandwidth", "fast", "--qmp", "unix:x", "--json")
    assert json.loads(result.stdout)["error-code"] == "config"
    result = cli("status", "--json")
    assert json.loads(result.stdout)["error-code"] == "usage"


def test_debug_shows_the_traceback(cli):
    result = cli("--debug", "set", "max-bandwith", "1", "--qmp", "unix:x")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("whimbrel: unknown parameter")


def test_a_bug_is_one_line_as_well(cli, complaint, monkeypatch):
    monkeypatch.setattr("whimbrel.plugins.PluginManager.catalogue", lambda _, **__: 1 / 0)
    result = cli("plugins")
    assert result.exit_code == 1
    assert complaint(result).startswith("unexpected ZeroDivisionError")


def test_plugins_are_listed(cli):
    result = cli("plugins")
    assert result.exit_code == 0
    heads, _, *rows = result.stdout.splitlines()
    assert heads.split() == ["name", "kind", "offers", "distribution", "version", "state"]
    assert any(row.split()[:3] == ["tcp", "transport", "tcp"] for row in rows)


def test_plugins_are_listed_for_programs(cli):
    result = cli("plugins", "--json")
    rows = {row["name"]: row for row in json.loads(result.stdout)["plugins"]}
    assert rows["tcp"]["kinds"] == ["transport"]
    assert rows["tcp"]["state"] == "offered"


def test_plugins_mark_the_provider_of_verbs_that_is_in_use(cli, folder):
    assert "software (in use)" in cli("plugins").stdout
    config = folder / "whimbrel.toml"
    config.write_text('[backends]\nverbs-provider = "socket"\n')
    assert "socket (in use)" in (shown := cli("plugins", "--config", config).stdout)
    assert "software (in use)" not in shown


def test_plugins_heed_the_settings(cli, folder):
    config = folder / "whimbrel.toml"
    config.write_text('[plugins]\nnotifiers = ["log"]\ndisable = ["unix"]\n')
    result = cli("plugins", "--json", "--config", config)
    rows = {row["name"]: row for row in json.loads(result.stdout)["plugins"]}
    assert rows["log"]["state"] == "active"
    assert rows["unix"]["state"] == "disabled"
    assert "reason" in cli("plugins", "--config", config).stdout.splitlines()[0]
