"""Settings: QEMU's names, defaults and words; what is refused; and which source wins."""

import copy
import pickle
import threading

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whimbrel.errors import ConfigError, UnknownNameError
from whimbrel.settings import Backends, Capabilities, Dialect, Limits, Parameters, PluginChoices, Settings, reference

GIB = 1 << 30
HUGE = 10**200

# The wire format, section 10.2, and what 8.1 and 8.2 added.
CAPABILITIES = [
    "xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events", "postcopy-ram", "x-colo",
    "release-ram", "block", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps", "postcopy-blocktime",
    "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot", "zero-copy-send",
    "postcopy-preempt", "switchover-ack",
]  # fmt: skip
WORKING = {
    "auto-converge", "events", "multifd", "return-path", "pause-before-switchover", "switchover-ack", "validate-uuid",
    "xbzrle", "block", "zero-blocks", "rdma-pin-all",
}  # fmt: skip
PARAMETERS = {
    "announce-initial": 50, "announce-max": 550, "announce-rounds": 5, "announce-step": 100,
    "block-incremental": False, "compress-level": 1, "compress-threads": 8, "compress-wait-thread": True,
    "cpu-throttle-increment": 10, "cpu-throttle-initial": 20, "cpu-throttle-tailslow": False, "decompress-threads": 2,
    "downtime-limit": 300, "max-bandwidth": 134217728, "max-cpu-throttle": 99, "max-postcopy-bandwidth": 0,
    "multifd-channels": 2, "multifd-compression": "none", "multifd-zlib-level": 1, "multifd-zstd-level": 1,
    "throttle-trigger-threshold": 50, "tls-authz": "", "tls-creds": "", "tls-hostname": "",
    "x-checkpoint-delay": 20000, "xbzrle-cache-size": 67108864, "avail-switchover-bandwidth": 0,
    "switchover-policy": "wait", "switchover-timeout": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text="", *, environ=None, overrides=None):
    """Load from a whimbrel.toml of this text in the current folder."""
    with open("whimbrel.toml", "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(text)
    return Settings.load(environ=environ or {}, overrides=overrides)


# ---------------------------------------------------------------------------------------------------- capabilities


def test_capabilities_are_qemus_in_its_order_and_all_false():
    assert list(Capabilities()) == CAPABILITIES
    assert Capabilities().as_dict() == dict.fromkeys(CAPABILITIES, False)


@pytest.mark.parametrize("name", CAPABILITIES)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_capability_works_or_is_refused_in_a_sentence(name, dialect):
    capabilities = Capabilities()
    capabilities.set(name, False, dialect)
    if name in WORKING:
        capabilities.set(name, True, dialect)
        assert capabilities.get(name) is True
    else:
        with pytest.raises(ConfigError) as refusal:
            capabilities.set(name, True, dialect)
        assert str(refusal.value).startswith(f"Capability '{name}' is not available in this version of whimbrel yet: ")
        assert capabilities == Capabilities()


def test_a_capability_is_an_attribute():
    capabilities = Capabilities(return_path=True)
    capabilities.events = True
    assert (capabilities.return_path, capabilities.get("return-path"), capabilities.get("return_path")) == (True,) * 3
    with pytest.raises(ConfigError, match="'compress' is not available"):
        capabilities.compress = True
    with pytest.raises(ConfigError, match="'compress' is not available"):
        Capabilities(compress=True)
    with pytest.raises(AttributeError):
        capabilities.multi_fd = False


@pytest.mark.parametrize("value", [1, 0, "on", "true", None, 1.0, []])
@pytest.mark.parametrize("dialect", [Dialect.NATIVE, Dialect.QMP])
def test_a_capability_is_a_boolean(value, dialect):
    with pytest.raises(ConfigError) as refusal:
        Capabilities().set("events", value, dialect)
    assert refusal.value.message == "Invalid parameter type for 'events', expected: boolean"


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("True", True), ("yes", True), ("1", True), ("off", False), ("NO", False)]
)
def test_text_switches_a_capability(text, value):
    capabilities = Capabilities(events=not value)
    capabilities.set("events", text, Dialect.TEXT)
    assert capabilities.events is value


# ------------------------------------------------------------------------------------------------------ parameters


def test_parameters_have_qemus_defaults():
    assert Parameters().as_dict() == PARAMETERS
    assert list(Parameters()) == list(PARAMETERS)


REFUSALS = [
    # types: the name with "-"
    ("multifd-channels", 256, "Parameter 'multifd-channels' expects uint8_t"),
    ("multifd-channels", -1, "Parameter 'multifd-channels' expects uint8_t"),
    ("multifd-channels", "two", "Parameter 'multifd-channels' expects uint64"),
    ("compress-level", 300, "Parameter 'compress-level' expects uint8_t"),
    ("max-cpu-throttle", 256, "Parameter 'max-cpu-throttle' expects uint8_t"),
    ("x-checkpoint-delay", 2**32, "Parameter 'x-checkpoint-delay' expects uint32_t"),
    ("max-bandwidth", 2**64, "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", -(2**63) - 1, "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", "1GiB", "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", 1.5, "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", True, "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", None, "Parameter 'max-bandwidth' expects uint64"),
    ("max-bandwidth", HUGE, "Parameter 'max-bandwidth' expects uint64"),
    ("cpu-throttle-tailslow", 1, "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean"),
    ("multifd-compression", 1, "Invalid parameter type for 'multifd-compression', expected: string"),
    ("multifd-compression", "l z", "Parameter 'multifd-compression' does not accept value 'l z'"),
    ("multifd-compression", "", "Parameter 'multifd-compression' does not accept value ''"),
    ("tls-creds", 1, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
    # ranges: the name with "_"
    ("compress-level", 10, "Parameter 'compress_level' expects a value between 0 and 9"),
    ("compress-threads", 0, "Parameter 'compress_threads' expects a value between 1 and 255"),
    ("decompress-threads", 0, "Parameter 'decompress_threads' expects a value between 1 and 255"),
    ("multifd-channels", 0, "Parameter 'multifd_channels' expects a value between 1 and 255"),
    ("throttle-trigger-threshold", 0,
     "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100"),
    ("throttle-trigger-threshold", 101,
     "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100"),
    ("cpu-throttle-initial", 0, "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99"),
    ("cpu-throttle-initial", 100, "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99"),
    ("cpu-throttle-increment", 0, "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99"),
    ("cpu-throttle-increment", 100, "Parameter 'cpu_throttle_increment' expects an integer in the range of 1 to 99"),
    ("downtime-limit", 2_000_001,
     "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
    ("downtime-limit", -1, "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
    ("xbzrle-cache-size", 2048,
     "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
    ("xbzrle-cache-size", 12288,
     "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
    ("xbzrle-cache-size", 0, "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
    ("max-cpu-throttle", 100,
     "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"),
    ("max-cpu-throttle", 19,
     "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"),
    ("announce-initial", 100_001, "Parameter 'announce_initial' expects a value between 0 and 100000"),
    ("announce-max", 100_001, "Parameter 'announce_max' expects a value between 0 and 100000"),
    ("announce-rounds", 1001, "Parameter 'announce_rounds' expects a value between 0 and 1000"),
    ("announce-step", 10_001, "Parameter 'announce_step' expects a value between 0 and 10000"),
    # what is not there yet
    ("block-bitmap-mapping", [],
     "Parameter 'block-bitmap-mapping' is not available in this version of whimbrel yet: drives have no dirty bitmaps"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "text"), REFUSALS)
def test_a_parameter_is_refused_with_qemus_words(name, value, text):
    parameters = Parameters()
    for spelled in (name, name.replace("-", "_")):
        with pytest.raises(ConfigError) as refusal:
            parameters.set(spelled, value, Dialect.QMP)
        assert str(refusal.value) == text
    assert parameters == Parameters()


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("max-bandwidth", -1, 2**64 - 1),
        ("max-bandwidth", 0, 0),
        ("avail-switchover-bandwidth", 2**64 - 1, 2**64 - 1),
        ("multifd-zlib-level", 10, 10),
        ("multifd-zstd-level", 21, 21),
        ("multifd-channels", 255, 255),
        ("multifd-compression", "zstd", "zstd"),
        ("multifd-compression", "of-a-stranger", "of-a-stranger"),
        ("compress-level", 0, 0),
        ("downtime-limit", 2_000_000, 2_000_000),
        ("x-checkpoint-delay", 2**32 - 1, 2**32 - 1),
        ("xbzrle-cache-size", 4096, 4096),
        ("max-cpu-throttle", 20, 20),
        ("announce-rounds", 0, 0),
        ("tls-creds", None, ""),
        ("tls-creds", "", ""),
        ("block-incremental", False, False),
    ],
)
def test_a_parameter_is_accepted_as_by_qemu(name, value, stored):
    parameters = Parameters()
    parameters.set(name, value, Dialect.QMP)
    assert parameters.get(name) == stored
    assert type(parameters.get(name)) is type(stored)


@pytest.mark.parametrize(
    ("name", "text", "stored"),
    [
        ("max-bandwidth", "1GiB", GIB),
        ("max-bandwidth", "1GiB/s", GIB),
        ("max-bandwidth", "125000000", 125_000_000),
        ("downtime-limit", "300ms", 300),
        ("downtime-limit", "2s", 2000),
        ("downtime-limit", "50", 50),
        ("xbzrle-cache-size", "128MiB", 128 << 20),
        ("x-checkpoint-delay", "1m", 60_000),
        ("announce-max", "1s", 1000),
    ],
)
@pytest.mark.parametrize("dialect", [Dialect.NATIVE, Dialect.TEXT])
def test_strings_with_units(name, text, stored, dialect):
    parameters = Parameters()
    parameters.set(name, text, dialect)
    assert parameters.get(name) == stored
    with pytest.raises(ConfigError, match="expects uint64"):
        parameters.set(name, text, Dialect.QMP)


def test_a_count_in_a_string_is_for_text_alone():
    parameters = Parameters()
    parameters.set("multifd-channels", "4", Dialect.TEXT)
    assert parameters.multifd_channels == 4
    with pytest.raises(ConfigError, match=r"expects uint64; expected a whole number from 1 to 255, not '4'"):
        parameters.set("multifd-channels", "4")


def test_an_assignment_is_judged():
    parameters = Parameters(downtime_limit="50ms")
    parameters.max_bandwidth = "1GiB"
    assert (parameters.downtime_limit, parameters.max_bandwidth) == (50, GIB)
    with pytest.raises(ConfigError, match=r"downtime_limit.*not 3000000"):
        parameters.downtime_limit = 3_000_000
    with pytest.raises(ConfigError, match="'fast' is not a rate in bytes per second; write it"):
        parameters.max_bandwidth = "fast"
    with pytest.raises(ConfigError, match="max_cpu_throttle"):
        parameters.max_cpu_throttle = 10
    with pytest.raises(ConfigError, match="max_cpu_throttle"):
        Parameters(cpu_throttle_initial=50, max_cpu_throttle=40)
    assert (parameters.downtime_limit, parameters.max_bandwidth, parameters.max_cpu_throttle) == (50, GIB, 99)


@pytest.mark.parametrize(
    "bad",
    [
        {"compress-level": 10},
        {"tls-creds": 1},
        {"max-bandwith": 1},
        {"max_bandwidth": 2},
        {"cpu-throttle-initial": 60, "max-cpu-throttle": 50},
    ],
)
def test_several_are_set_all_or_none(bad):
    parameters = Parameters()
    with pytest.raises(ConfigError):
        parameters.update({"max-bandwidth": 1, "downtime-limit": 1, **bad}, Dialect.QMP)
    assert parameters == Parameters()


def test_rules_are_judged_on_all_of_an_update():
    parameters = Parameters()
    parameters.update({"max-cpu-throttle": 10, "cpu-throttle-initial": 5})
    parameters.update({"cpu-throttle-initial": 98, "max-cpu-throttle": 98})
    assert (parameters.cpu_throttle_initial, parameters.max_cpu_throttle) == (98, 98)


def test_a_number_too_long_to_be_written():
    for section, name in ((Parameters(), "max-bandwidth"), (Limits(), "sections"), (Limits(), "blocks")):
        with pytest.raises(ConfigError, match="not a huge number"):
            section.set(name, 10**5000)


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown parameter 'max_bandwith'; did you mean 'max-bandwidth'\?"):
        Parameters().set("max_bandwith", 1)
    with pytest.raises(UnknownNameError, match=r"unknown capability 'multi-fd'; did you mean 'multifd'\?"):
        Capabilities().get("multi-fd")


def test_a_value_changes_under_a_reader():
    parameters, seen, stop = Parameters(), set(), threading.Event()

    def read():
        while not stop.is_set():
            seen.add(parameters.max_bandwidth)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(500):
        parameters.max_bandwidth = 1
        parameters.max_bandwidth = 2**64 - 1
    stop.set()
    reader.join()
    assert seen <= {128 << 20, 1, 2**64 - 1}


@given(st.sampled_from(list(PARAMETERS)), st.one_of(st.integers(), st.text(), st.booleans(), st.none(), st.floats()))
def test_any_value_is_stored_or_refused(name, value):
    for dialect in Dialect:
        parameters = Parameters()
        try:
            parameters.set(name, value, dialect)
        except ConfigError:
            assert parameters == Parameters()
        else:
            assert type(parameters.get(name)) is type(PARAMETERS[name])
            Parameters(**{key.replace("-", "_"): each for key, each in parameters.as_dict().items()})


# ------------------------------------------------------------------------------------------------- whimbrel's own


def test_own_defaults():
    assert Backends().as_dict() == {
        "dirty-tracker": "auto",
        "memory": "anonymous",
        "verbs-provider": "auto",
        "witness": "",
    }
    assert PluginChoices().as_dict() == {
        "notifiers": (), "active": (), "savevm": ("ram", "block", "devices"), "disable": (), "prefer": {}
    }  # fmt: skip
    assert Limits().as_dict() == {
        "connect-timeout": 10.0, "handshake-timeout": 10.0, "keepalive": 10.0, "peer-timeout": 60.0, "strangers": 8,
        "header-timeout": 10.0, "handover-timeout": 0.0,
        "idle-timeout": 30.0, "sections": 4096, "blocks": 4096, "description": 16 << 20,
        "device-section": 16 << 20, "device-sections": 64 << 20,
        "zstd-window": 8 << 20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "name", "value", "stored"),
    [
        (Backends, "dirty-tracker", "userfaultfd", "userfaultfd"),
        (Backends, "memory", "memfd", "memfd"),
        (Backends, "witness", "", ""),
        (Backends, "witness", "folder:/mnt/a b", "folder:/mnt/a b"),
        (Backends, "witness", "sql:sqlite:////mnt/w", "sql:sqlite:////mnt/w"),
        (Backends, "memory", "file:/dev/shm/a b", "file:/dev/shm/a b"),
        (PluginChoices, "notifiers", ["log"], ("log",)),
        (PluginChoices, "savevm", (), ()),
        (PluginChoices, "prefer", {"tcp": "mine"}, {"tcp": "mine"}),
        (Limits, "connect-timeout", "500ms", 0.5),
        (Limits, "connect-timeout", 3, 3.0),
        (Limits, "handover-timeout", 0, 0.0),
        (Limits, "description", "1MiB", 1 << 20),
        (Limits, "sections", 1, 1),
    ],
)
def test_own_settings(section, name, value, stored):
    settings = section()
    settings.set(name, value)
    assert settings.get(name) == stored
    assert type(settings.get(name)) is type(stored)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        (Backends, "dirty-tracker", ""),
        (Backends, "dirty-tracker", "a b"),
        (Backends, "memory", "disk"),
        (Backends, "memory", "file:"),
        (Backends, "memory", "file:\0"),
        (Backends, "memory", 3),
        (Backends, "witness", "folder"),
        (Backends, "witness", "folder:"),
        (Backends, "witness", ":/mnt"),
        (Backends, "witness", "folder:/a\nb"),
        (Backends, "witness", None),
        (PluginChoices, "notifiers", "log"),
        (PluginChoices, "notifiers", ["log", "log"]),
        (PluginChoices, "notifiers", ["log", 3]),
        (PluginChoices, "notifiers", [""]),
        (PluginChoices, "notifiers", {"log"}),
        (PluginChoices, "prefer", ["tcp"]),
        (PluginChoices, "prefer", {"tcp": ["mine"]}),
        (Limits, "connect-timeout", 0),
        (Limits, "connect-timeout", "soon"),
        (Limits, "connect-timeout", 86401),
        (Limits, "connect-timeout", True),
        (Limits, "handover-timeout", -1),
        (Limits, "description", 4095),
        (Limits, "description", "5GiB"),
        (Limits, "description", "16MB"),
        (Limits, "sections", 0),
        (Limits, "sections", "4096"),
        (Limits, "sections", 1.0),
    ],
)
def test_own_settings_refused(section, name, value):
    settings = section()
    with pytest.raises(ConfigError) as refusal:
        settings.set(name, value)
    assert refusal.value.message.startswith(f"Setting '{name}' expects ")
    assert f", not {value!r}" in refusal.value.hint
    assert settings == section()


def test_handover_seconds_follow_the_downtime_limit():
    settings = Settings()
    assert settings.handover_seconds() == 2.0
    settings.parameters.downtime_limit = 1000
    assert settings.handover_seconds() == 4.0
    settings.limits.handover_timeout = "100ms"
    assert settings.handover_seconds() == 0.1


# --------------------------------------------------------------------------------------------------- the settings


def test_nothing_to_load(folder):
    assert Settings.load(environ={}) == Settings()


def test_precedence(folder):
    text = """
        [capabilities]
        return-path = true
        events = true
        [parameters]
        max-bandwidth = "1GiB"
        downtime_limit = 200
        multifd-channels = 3
        announce-rounds = 1
        [plugins]
        notifiers = ["log"]
    """
    environ = {
        "WHIMBREL_PARAMETERS__MAX_BANDWIDTH": "2GiB",
        "WHIMBREL_PARAMETERS__DOWNTIME_LIMIT": "100ms",
        "WHIMBREL_PARAMETERS__MULTIFD_CHANNELS": "4",
        "WHIMBREL_CAPABILITIES__EVENTS": "off",
        "WHIMBREL_PLUGINS__NOTIFIERS": "",
        "WHIMBREL_PLUGINS__ACTIVE": "a, b",
        "WHIMBREL_PLUGINS__PREFER": "tcp=mine, unix=yours",
        "WHIMBREL_LIMITS__SECTIONS": "7",
        "WHIMBREL_TRACE_PLUGINS": "1",
        "OTHER__THING": "1",
    }
    settings = load(text, environ=environ, overrides={"parameters": {"max-bandwidth": "3GiB"}, "limits": {}})
    expected = Settings(
        capabilities=Capabilities(return_path=True),
        parameters=Parameters(max_bandwidth=3 * GIB, downtime_limit=100, multifd_channels=4, announce_rounds=1),
        plugins=PluginChoices(active=["a", "b"], prefer={"tcp": "mine", "unix": "yours"}),
        limits=Limits(sections=7),
    )
    assert settings == expected
    assert settings.as_dict()["parameters"]["downtime-limit"] == 100


def test_where_the_file_is_looked_for(folder):
    project = folder / "pyproject.toml"
    project.write_text("[project]\nname = 'x'\n")
    assert Settings.load(environ={}) == Settings()
    project.write_text("[tool.whimbrel.parameters]\ndowntime-limit = 1\n")
    assert Settings.load(environ={}).parameters.downtime_limit == 1
    (folder / "whimbrel.toml").write_text("[parameters]\ndowntime-limit = 2\n")
    assert Settings.load(environ={}).parameters.downtime_limit == 2
    (folder / "other.toml").write_text("[parameters]\ndowntime-limit = 3\n")
    assert Settings.load(folder / "other.toml", environ={}).parameters.downtime_limit == 3
    assert Settings.load(str(project), environ={}).parameters.downtime_limit == 1


def test_the_processs_environment_is_the_default(folder, monkeypatch):
    monkeypatch.setenv("WHIMBREL_PARAMETERS__DOWNTIME_LIMIT", "7")
    assert Settings.load().parameters.downtime_limit == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[parameter]", ": [parameter]: unknown section 'parameter'; did you mean 'parameters'? There are: backends, "),
        ("max-bandwidth = 1", ": [max-bandwidth]: unknown section 'max-bandwidth'; there are: "),
        ("[parameters]\nmax-bandwith = 1",
         ": [parameters] max-bandwith: unknown parameter 'max-bandwith'; did you mean 'max-bandwidth'? There are: "),
        ("[limits]\ntimeout = 1", ": [limits] timeout: unknown setting 'timeout'; "),
        ("[capabilities]\nevents = 'on'",
         ": [capabilities] events: Invalid parameter type for 'events', expected: boolean; expected true or false, "),
        ("[capabilities]\ncompress = true",
         ": [capabilities] compress: Capability 'compress' is not available in this version of whimbrel yet: pages "),
        ("[parameters]\nmultifd-channels = '2'",
         ": [parameters] multifd-channels: Parameter 'multifd-channels' expects uint64; expected a whole number "),
        ("[parameters]\ndowntime-limit = 3000000",
         ": [parameters] downtime-limit: Parameter 'downtime_limit' expects an integer in the range of 0 to "),
        ("[parameters]\nmax-bandwidth = 'fast'",
         ": [parameters] max-bandwidth: Parameter 'max-bandwidth': 'fast' is not a rate in bytes per second; "),
        ("[parameters]\nmax-bandwidth = 1\nmax_bandwidth = 2", ": [parameters] max_bandwidth: given twice; "),
        ("[parameters]\ncpu-throttle-initial = 50\nmax-cpu-throttle = 40",
         ": [parameters] cpu-throttle-initial and whimbrel.toml: [parameters] max-cpu-throttle: Parameter "),
        ("[backends]\nmemory = 'disk'", ": [backends] memory: Setting 'memory' expects \"anonymous\", "),
        ("[plugins]\nnotifiers = 'log'", ": [plugins] notifiers: Setting 'notifiers' expects a list"),
        ("parameters = 3", ": [parameters]: expected a table of settings, not int"),
        ("\n\n[parameters]\nmax-bandwidth: 1", ", line 4, column 14: Expected '=' after a key"),
        ("[parameters", ", end of document: Expected ']'"),
        ("[parameters]\nmax-bandwidth = " + "9" * 5000, " cannot be read as TOML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_says_where(folder, text, message):
    with pytest.raises(ConfigError) as refusal:
        load(text)
    assert str(refusal.value).startswith(f"whimbrel.toml{message}")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("PARAMETERS__MAX_BANDWITH", "1", "unknown parameter 'max-bandwith'; did you mean 'max-bandwidth'?"),
        ("PARAMETERS__MAX_BANDWIDTH", "fast", "Parameter 'max-bandwidth': 'fast' is not a rate"),
        ("CAPABILITIES__EVENTS", "maybe", "Invalid parameter type for 'events', expected: boolean"),
        ("CAPABILITIES__COMPRESS", "on", "Capability 'compress' is not available in this version of whimbrel yet: "),
        ("PLUGINS__PREFER", "tcp", "Setting 'prefer' expects a table"),
        ("PLUGINS__PREFER", "a=x,a=y", "Setting 'prefer' expects a table"),
        ("LIMITS__SECTIONS", "4K", "Setting 'sections' expects a whole number"),
        ("LIMITS__", "1", "unknown setting ''"),
    ],
)
def test_what_is_wrong_in_the_environment_says_which_variable(folder, setting, value, message):
    variable = f"WHIMBREL_{setting}"
    with pytest.raises(ConfigError) as refusal:
        Settings.load(environ={variable: value})
    assert str(refusal.value).startswith(f"{variable}: {message}".replace("__:", "__…:"))


def test_an_unknown_section_in_the_environment(folder):
    with pytest.raises(UnknownNameError, match=r"^WHIMBREL_PARAMETER__…: unknown section 'parameter'; did you mean"):
        Settings.load(environ={"WHIMBREL_PARAMETER__X": "1"})


def test_what_is_wrong_on_the_command_line_says_so(folder):
    with pytest.raises(ConfigError, match=r"^command line: parameters\.downtime-limit: Parameter 'downtime-limit'"):
        Settings.load(environ={}, overrides={"parameters": {"downtime-limit": "soon"}})
    with pytest.raises(UnknownNameError, match=r"^command line: paramters: unknown section"):
        Settings.load(environ={}, overrides={"paramters": {}})


def test_a_wrong_file_stays_wrong_under_an_override(folder):
    with pytest.raises(ConfigError, match="compress_level"):
        load("[parameters]\ncompress-level = 10", overrides={"parameters": {"compress-level": 1}})


def test_a_rule_is_judged_on_what_has_won(folder):
    text = "[parameters]\ncpu-throttle-initial = 50\nmax-cpu-throttle = 40"
    assert load(text, overrides={"parameters": {"max-cpu-throttle": 60}}).parameters.max_cpu_throttle == 60


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.toml", None, "cannot read .*gone.toml: No such file"),
        ("latin.toml", b"# \xe9", "latin.toml is not TOML: byte 2 is not UTF-8"),
        ("pyproject.toml", b"", r"pyproject.toml has no \[tool.whimbrel\]"),
        ("pyproject.toml", b"tool.whimbrel = 3", "pyproject.toml: tool.whimbrel is not a table"),
        (
            "pyproject.toml",
            b"[tool.whimbrel.limit]",
            r"pyproject.toml: \[tool.whimbrel.limit\]: unknown section 'limit'",
        ),
    ],
)
def test_files_that_cannot_be(folder, name, content, message):
    path = folder / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Settings.load(path, environ={})


def test_a_copy_is_apart():
    settings = Settings(parameters=Parameters(downtime_limit=1), plugins=PluginChoices(prefer={"tcp": "mine"}))
    for other in (settings.copy(), copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert other == settings
        other.parameters.downtime_limit = 2
        other.plugins.prefer = {}
        assert (settings.parameters.downtime_limit, settings.plugins.prefer) == (1, {"tcp": "mine"})


def test_the_sections_stay():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Settings().parameters = Parameters()
    with pytest.raises(TypeError):
        Settings(parameters=Capabilities())


def test_the_reference_names_every_setting():
    page = reference()
    for name, section in Settings().sections().items():
        assert f"## `[{name}]`" in page
        for key, field in zip(section, section.fields().values(), strict=True):
            assert f"| `{key}` |" in page
            assert field.metadata["doc"] in page
            assert field.metadata["since"]
    assert page == reference()


def test_defaults_of_the_reference_can_be_written_in_a_file(folder):
    lines = []
    for name, section in Settings().sections().items():
        lines.append(f"[{name}]")
        for key, field in zip(section, section.fields().values(), strict=True):
            lines.append(f"{key} = {field.metadata['kind'].show(section.get(key))}")
    assert load("\n".join(lines)) == Settings()
