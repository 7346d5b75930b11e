"""Replies and errors of every command, compared with QEMU's (the wire format, sections 10.1 to 10.4)."""

import json

import pytest

import whimbrel
from whimbrel.monitor import COMMANDS
from whimbrel.monitor.context import Context
from whimbrel.monitor.session import Session
from whimbrel.settings import Settings

CAPABILITIES = """
    xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block return-path
    pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate x-ignore-shared validate-uuid
    background-snapshot zero-copy-send postcopy-preempt
"""

PARAMETERS = """
    announce-initial 50; announce-max 550; announce-rounds 5; announce-step 100; block-incremental false;
    compress-level 1; compress-threads 8; compress-wait-thread true; cpu-throttle-increment 10;
    cpu-throttle-initial 20; cpu-throttle-tailslow false; decompress-threads 2; downtime-limit 300;
    max-bandwidth 134217728; max-cpu-throttle 99; max-postcopy-bandwidth 0; multifd-channels 2;
    multifd-compression "none"; multifd-zlib-level 1; multifd-zstd-level 1; throttle-trigger-threshold 50;
    tls-authz ""; tls-creds ""; tls-hostname ""; x-checkpoint-delay 20000; xbzrle-cache-size 67108864
"""


class Console:
    """A negotiated session, to ask one thing after the other."""

    def __init__(self, machine, **options):
        self.machine = machine
        self.session = Session(Context(machine, **options), COMMANDS)
        self.ask(b'{"execute": "qmp_capabilities"}')

    def ask(self, data):
        (answer,) = self.session.receive(data)
        return json.loads(answer.line)

    def do(self, command, **arguments):
        return self.ask(json.dumps({"execute": command, "arguments": arguments}).encode())

    def get(self, command, **arguments):
        return self.do(command, **arguments)["return"]

    def error(self, command, **arguments):
        return self.do(command, **arguments)["error"]


@pytest.fixture
def console(make_machine):
    return Console(make_machine())


def one(name, state):
    return {"capabilities": [{"capability": name, "state": state}]}


NO_TRANSPORT = "unknown transport 'x' in 'x:y'; there are: exec, fd, file, rdma, tcp, unix"
NO_URI = "'nowhere' is no migration URI: expected SCHEME:ADDRESS; schemes there are: exec, fd, file, rdma, tcp, unix"

REFUSED = [
    ("nothing", {}, "The command nothing has not been found"),
    ("migrate", {}, "Parameter 'uri' is missing"),
    ("migrate", {"uri": 1}, "Invalid parameter type for 'uri', expected: string"),
    ("migrate", {"uri": "tcp:", "blk": 1}, "Invalid parameter type for 'blk', expected: boolean"),
    ("migrate", {"uri": "tcp:", "to": 1}, "Parameter 'to' is unexpected"),
    ("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True}, "Cannot resume if there is no paused migration"),
    (
        *("migrate", {"uri": "x:y"}),
        f"Parameter 'uri' expects a valid migration protocol: {NO_TRANSPORT}",
    ),
    (
        *("migrate", {"uri": "nowhere"}),
        f"Parameter 'uri' expects a valid migration protocol: {NO_URI}",
    ),
    (
        *("migrate-incoming", {"uri": "x:y"}),
        f"unknown migration protocol: x:y: {NO_TRANSPORT}",
    ),
    ("migrate-continue", {"state": "pre-switchover"}, "Migration not in expected state: none"),
    ("migrate-continue", {"state": "none"}, "Migration not in expected state: none"),
    ("migrate-continue", {"state": "x"}, "Parameter 'state' does not accept value 'x'"),
    ("migrate-continue", {}, "Parameter 'state' is missing"),
    ("migrate-pause", {}, "migrate-pause is currently only supported during postcopy-active state"),
    ("migrate-recover", {"uri": "tcp:0"}, "Migrate recover can only be run when postcopy is paused."),
    ("migrate-recover", {}, "Parameter 'uri' is missing"),
    (
        *("migrate-start-postcopy", {}),
        "Enable postcopy with migrate_set_capability before the start of migration",
    ),
    ("migrate-set-capabilities", {}, "Parameter 'capabilities' is missing"),
    ("migrate-set-capabilities", {"capabilities": 1}, "Invalid parameter type for 'capabilities', expected: array"),
    (
        *("migrate-set-capabilities", {"capabilities": [1]}),
        "Invalid parameter type for 'capabilities[0]', expected: object",
    ),
    (
        *("migrate-set-capabilities", {"capabilities": [{"capability": "events"}]}),
        "Parameter 'capabilities[0].state' is missing",
    ),
    (
        *("migrate-set-capabilities", one("events", 1)),
        "Invalid parameter type for 'capabilities[0].state', expected: boolean",
    ),
    ("migrate-set-capabilities", one("evnts", True), "Parameter 'capability' does not accept value 'evnts'"),
    ("migrate-set-parameters", {"x": 1}, "Parameter 'x' is unexpected"),
    ("migrate-set-parameters", {"downtime_limit": 1}, "Parameter 'downtime_limit' is unexpected"),
    (
        *("migrate-set-parameters", {"downtime-limit": 2000001}),
        "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms",
    ),
    ("migrate-set-parameters", {"max-bandwidth": "1G"}, "Parameter 'max-bandwidth' expects uint64"),
    ("migrate-set-parameters", {"multifd-channels": 256}, "Parameter 'multifd-channels' expects uint8_t"),
    (
        *("migrate-set-parameters", {"multifd-compression": "x"}),
        "Parameter 'multifd-compression' does not accept value 'x'",
    ),
    (
        *("migrate-set-parameters", {"xbzrle-cache-size": 5000}),
        "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size",
    ),
    (
        *("migrate-set-parameters", {"compress-wait-thread": 1}),
        "Invalid parameter type for 'compress-wait-thread', expected: boolean",
    ),
    ("migrate_set_speed", {"value": "1"}, "Invalid parameter type for 'value', expected: integer"),
    ("migrate_set_speed", {"value": True}, "Invalid parameter type for 'value', expected: integer"),
    ("migrate_set_downtime", {"value": "1"}, "Invalid parameter type for 'value', expected: number"),
    (
        *("migrate_set_downtime", {"value": -0.1}),
        "Parameter 'downtime_limit' expects an integer in the range of 0 to 2000 seconds",
    ),
    ("migrate-set-cache-size", {"value": 4095}, "Parameter 'cache size' expects smaller than page size"),
    ("migrate-set-cache-size", {"value": 0}, "Parameter 'cache size' expects smaller than page size"),
    ("migrate-set-cache-size", {"value": -1}, "Parameter 'cache size' expects exceeding address space"),
    ("migrate-set-cache-size", {"value": 2**63 - 1}, "Parameter 'cache size' expects exceeding guest ram size"),
    ("migrate-set-cache-size", {"value": (1 << 20) + 1}, "Parameter 'cache size' expects exceeding guest ram size"),
    ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
    ("quit", {}, "the program around this machine does not end at a monitor's word"),
    ("x-whimbrel-adopt", {}, "no machine that has arrived here waits for a decision"),
    ("x-whimbrel-discard", {}, "no machine that has arrived here waits for a decision"),
    ("x-whimbrel-reclaim", {}, "only a machine that was handed over can be reclaimed; this one is prelaunch"),
]


@pytest.mark.parametrize(("command", "arguments", "text"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusals_have_qemus_texts_and_change_nothing(console, command, arguments, text):
    before = console.machine.settings.as_dict()
    error_class = "CommandNotFound" if command not in COMMANDS else "GenericError"
    assert console.error(command, **arguments) == {"class": error_class, "desc": text}
    assert console.machine.settings.as_dict() == before
    assert console.machine.migration is None
    assert console.machine.run_state == "prelaunch"


@pytest.mark.parametrize(("command", "uri"), [("migrate", "tcp:127.0.0.1:1"), ("migrate-incoming", "tcp:127.0.0.1:0")])
def test_a_name_in_the_settings_that_nobody_has_is_not_blamed_on_the_uri(command, uri):
    settings = Settings()
    settings.plugins.notifiers = ["nobody"]
    with whimbrel.Machine("heat", settings=settings) as machine:
        text = Console(machine).error(command, uri=uri)["desc"]
        assert text.startswith("unknown notifier 'nobody'")


@pytest.mark.parametrize("flag", ["blk", "inc"])
def test_drives_go_along_by_the_command_or_by_the_capability_and_not_by_both(console, flag):
    console.machine.settings.capabilities.block = True
    text = console.error("migrate", uri="tcp:127.0.0.1:1", **{flag: True})["desc"]
    assert text == "Command options are incompatible with current migration capabilities"
    assert console.machine.migration is None


def test_capabilities_are_listed_in_qemus_order(console):
    listed = console.get("query-migrate-capabilities")
    assert [entry["capability"] for entry in listed] == [*CAPABILITIES.split(), "switchover-ack"]
    assert not any(entry["state"] for entry in listed)


def test_capabilities_are_set_all_or_none(console):
    wanted = [{"capability": "events", "state": True}, {"capability": "xbzrle", "state": True}]
    if "return" not in console.do("migrate-set-capabilities", **one("xbzrle", True)):
        text = console.error("migrate-set-capabilities", capabilities=wanted)["desc"]
        assert text.startswith("Capability 'xbzrle' is not available in this version of whimbrel yet: ")
        assert not console.machine.settings.capabilities.events
    console.get("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    assert {"state": True, "capability": "events"} in console.get("query-migrate-capabilities")


def test_parameters_have_qemus_defaults(console):
    parameters = console.get("query-migrate-parameters")
    qemus = {name: json.loads(value) for name, value in map(str.split, PARAMETERS.split(";"))}
    assert parameters == {
        **qemus,
        "avail-switchover-bandwidth": 0,
        "switchover-policy": "wait",
        "switchover-timeout": 0,
    }


def test_parameters_are_set_all_or_none(console):
    assert "error" in console.do("migrate-set-parameters", **{"max-bandwidth": 1, "downtime-limit": -1})
    assert console.get("query-migrate-parameters")["max-bandwidth"] == 128 << 20
    assert console.do("migrate-set-parameters", **{"max-bandwidth": -1, "downtime-limit": 50}) == {"return": {}}
    parameters = console.get("query-migrate-parameters")
    assert parameters["max-bandwidth"] == 2**64 - 1
    assert parameters["downtime-limit"] == 50
    assert console.do("migrate-set-parameters") == {"return": {}}
    assert (
        "drives have no dirty bitmaps"
        in console.error("migrate-set-parameters", **{"block-bitmap-mapping": []})["desc"]
    )


def test_the_older_commands_set_the_same_parameters(console):
    console.get("migrate_set_speed", value=-5)
    assert console.get("query-migrate-parameters")["max-bandwidth"] == 0
    console.get("migrate_set_speed", value=1 << 30)
    console.get("migrate_set_downtime", value=0.0301)
    console.get("migrate-set-cache-size", value=100_000)
    parameters = console.get("query-migrate-parameters")
    assert parameters["max-bandwidth"] == 1 << 30
    assert parameters["downtime-limit"] == 30
    assert parameters["xbzrle-cache-size"] == console.get("query-migrate-cache-size") == 65536
    console.get("migrate-set-cache-size", value=1 << 20)
    assert console.get("query-migrate-cache-size") == console.machine.ram.total
    console.get("migrate-set-cache-size", value=4096)
    assert console.get("query-migrate-cache-size") == 4096
    console.get("migrate_set_downtime", value=2000)


def test_what_there_is_to_ask(console):
    version = console.get("query-version")
    assert version["qemu"] == {"major": 7, "minor": 2, "micro": 22}
    assert version["package"].startswith("whimbrel")
    assert [entry["name"] for entry in console.get("query-commands")] == list(COMMANDS)
    assert console.get("query-name") == {"name": "heat"}
    assert console.get("query-block") == []
    assert console.get("query-migrate") == {}
    assert console.do("migrate_cancel") == {"return": {}}


def test_stop_and_cont_and_what_query_status_says_of_them(console):
    expected = {"running": False, "singlestep": False, "status": "prelaunch"}
    assert console.get("query-status") == expected
    for command, state in [("cont", "running"), ("cont", "running"), ("stop", "paused"), ("stop", "paused")]:
        assert console.do(command) == {"return": {}}
        assert console.get("query-status") == {**expected, "running": state == "running", "status": state}


def test_blockers_are_told_and_heeded(console):
    console.machine.blockers.add("a device cannot be moved")
    assert console.get("query-migrate") == {"blocked-reasons": ["a device cannot be moved"]}
    assert console.error("migrate", uri="tcp:127.0.0.1:1")["desc"] == "a device cannot be moved"
    assert console.machine.run_state == "prelaunch"


def test_a_running_machine_cannot_be_a_destination(console):
    console.get("cont")
    text = console.error("migrate-incoming", uri="tcp:127.0.0.1:0")["desc"]
    assert text.startswith("'-incoming' was not specified on the command line: ")


def test_a_destination_that_waits(console, tmp_path):
    assert console.do("migrate-incoming", uri=f"unix:{tmp_path}/in") == {"return": {}}
    assert console.get("query-migrate") == {"socket-address": [{"type": "unix", "path": f"{tmp_path}/in"}]}
    assert console.get("query-status")["status"] == "inmigrate"
    assert console.error("migrate-incoming", uri="tcp:0")["desc"] == "The incoming migration has already been started"
    assert console.error("migrate", uri="tcp:127.0.0.1:1")["desc"] == "Guest is waiting for an incoming migration"
    for command in ("stop", "cont"):
        assert console.error(command)["desc"].startswith("Guest is waiting for an incoming migration: ")
    assert console.do("migrate-set-capabilities", **one("events", True)) == {"return": {}}
    info = console.get("x-whimbrel-info")
    assert (info["role"], info["status"], info["run-state"]) == ("destination", "setup", "inmigrate")
    assert info["socket-address"] == [{"type": "unix", "path": f"{tmp_path}/in"}]
    assert console.do("migrate_cancel") == {"return": {}}
    console.machine.migration.close()
    assert console.get("query-migrate")["status"] == "cancelled"
    assert console.do("migrate-incoming", uri="tcp:127.0.0.1:0") == {"return": {}}


def test_a_listener_that_cannot_be_is_an_error_of_the_command(console, tmp_path):
    text = console.error("migrate-incoming", uri=f"unix:{tmp_path}/no/such")["desc"]
    assert text.startswith(f"Failed to listen on '{tmp_path}/no/such': No such file")
    assert console.get("query-migrate") == {}


def test_info_has_everything_and_is_json(console):
    info = console.get("x-whimbrel-info")
    assert info["status"] == "none"
    assert info["name"] == "heat"
    assert {"role", "uri", "run-state", "failure", "tracker", "pid", "rounds", "ownership", "bandwidth"} <= info.keys()


def test_quit_is_answered_before_it_is_done(make_machine):
    session = Session(Context(make_machine(), lambda: 42), COMMANDS)
    list(session.receive(b'{"execute": "qmp_capabilities"}'))
    (answer,) = session.receive(b'{"execute": "quit"}')
    assert json.loads(answer.line) == {"return": {}}
    assert answer.then() == 42
