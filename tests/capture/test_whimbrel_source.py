"""A running whimbrel machine is captured, and what was captured goes on in another machine of the same make."""

import threading

import attrs
import numpy as np
import pytest

from whimbrel import LoopGuest, Machine, Settings, vmstate
from whimbrel.abc import Patience, TransportSpec
from whimbrel.capture import CapturedMachine
from whimbrel.capture.receiving import save
from whimbrel.capture.taking import Capture, CaptureUndecided
from whimbrel.errors import ChannelError, IncompatibleError, MigrationError, PeerRefused, WhimbrelError
from whimbrel.hookspecs import hookimpl
from whimbrel.plugins import PluginManager
from whimbrel.testing.faults import Faults, FaultyChannel, FaultyTransport
from whimbrel.testing.memory import MemoryNetwork

from .live import LONG

PAGE = 4096
PAGES = 64


@attrs.define
class Counter:
    steps: int = 0
    name: bytes = b"whimbrel"


COUNTER = vmstate.VMStateDescription("counter", 3, fields=[vmstate.uint64("steps"), vmstate.buffer("name", size=8)])


class Walker:
    """A machine whose memory after n steps is a function of n: whoever stops it can tell every byte."""

    def __init__(self, plugins, *, name="walker"):
        settings = Settings()
        settings.backends.dirty_tracker = "compare"
        settings.parameters.max_bandwidth = 0
        settings.parameters.announce_rounds = 1
        self.machine = Machine(name, settings=settings, plugins=plugins)
        self.low = self.machine.ram.add("low", PAGES * PAGE)
        self.high = self.machine.ram.add("high", 2 * PAGE)
        self.counter = Counter()
        self.changed = threading.Condition()
        self.machine.devices.add("counter", self.counter, COUNTER)
        self.machine.devices.add("counter", Counter(7, b"a second"), COUNTER, instance_id=1)
        self.machine.guest = LoopGuest(self.step)

    def step(self):
        walk(self.low.view, self.counter.steps)
        self.counter.steps += 1
        with self.changed:
            self.changed.notify_all()
            self.changed.wait(0.0005)

    def wait_steps(self, more):
        with self.changed:
            goal = self.counter.steps + more
            assert self.changed.wait_for(lambda: self.counter.steps >= goal, LONG), "the guest does not run"


def walk(view, number):
    at = number * 40503 % (len(view) - 8)
    view[at] = number % 255 + 1
    if number % 7 == 3:
        page = number // 7 % (len(view) // PAGE)
        view[page * PAGE : (page + 1) * PAGE] = 0


def expected(steps):
    view = np.zeros(PAGES * PAGE, np.uint8)
    for number in range(steps):
        walk(view, number)
    return view


class Link:
    """`memory:` for machines of these tests, with faults at the end that connects."""

    def __init__(self):
        self.network = MemoryNetwork()
        self._changed = threading.Condition()
        self.break_next(Faults())
        transport = FaultyTransport(self.network, on_connect=self._connected)
        self.spec = TransportSpec(name="memory", summary="a link that may break", create=lambda: transport)

    def break_next(self, faults):
        """What is to go wrong with the next connection."""
        self.faults, self.channel = faults, None

    def wait_stalled(self):
        """Wait until that connection stands still."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.channel is not None, LONG)
        assert self.channel.stalled.wait(LONG)

    def _connected(self, channel):
        with self._changed:
            self.channel = FaultyChannel(channel, self.faults)
            self._changed.notify_all()
            return self.channel

    @hookimpl
    def whimbrel_transports(self):
        return [self.spec]


@pytest.fixture(scope="module")
def link():
    return Link()


@pytest.fixture(scope="module")
def plugins(link):
    manager = PluginManager()
    manager.register(link)
    return manager


@pytest.fixture
def walker(plugins, link):
    made = []

    def make(**more):
        link.break_next(Faults())
        made.append(Walker(plugins, **more))
        return made[-1]

    yield make
    for each in made:
        each.machine.close()


class Taking:
    """Waits at `uri` for a source, and captures it."""

    def __init__(self, plugins, uri="memory:capture", *, settings=None, **more):
        scheme, _, address = uri.partition(":")
        self.listener = plugins.transport(scheme).create().listen(address)
        self.uri = self.listener.uri
        self.machine = self.error = None
        self.begun = threading.Event()
        self._plugins, self._settings, self._more = plugins, settings or Settings(), more
        self._thread = threading.Thread(target=self._run, name="whimbrel-test-capture", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            channel = self.listener.accept(Patience(LONG))
            self.listener.close()
            self.capture = Capture(channel, settings=self._settings, plugins=self._plugins, **self._more)
            self.begun.set()
            self.machine = self.capture.run()
        except BaseException as exc:
            self.error = exc

    def join(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive(), "the capture hangs"
        if isinstance(self.error, CaptureUndecided):
            self.machine = self.error.machine
        return self.machine


def check_walker(machine, steps):
    assert np.array_equal(machine.ram["low"].view, expected(steps))
    assert not machine.ram["high"].view.any()


@pytest.mark.parametrize("handover", ["proof", "qemu"])
@pytest.mark.parametrize("uri", ["memory:capture", "tcp:127.0.0.1:0"])
def test_a_running_machine_is_captured_and_goes_on_elsewhere(walker, plugins, uri, handover):
    source = walker()
    source.machine.start()
    source.wait_steps(40)
    taking = Taking(plugins, uri)
    migration = source.machine.migrate(taking.uri, handover=handover)
    migration.wait(LONG)
    assert migration.status == "completed"
    assert migration.info.ownership == "done"
    with taking.join() as captured:
        assert taking.error is None
        assert taking.capture.told
        steps = source.counter.steps
        assert captured.name == "walker"
        assert [block.name for block in captured.ram] == ["low", "high"]
        for block in captured.ram:
            assert np.array_equal(block.view, source.machine.ram[block.name].view)
        check_walker(captured, steps)

        fields = captured.captured["counter"].decode().as_dict()["fields"]
        assert [(field["name"], field["value"]) for field in fields] == [("steps", steps), ("name", b"whimbrel".hex())]
        second = captured.captured.named("counter", 1)[0].decode().as_dict()["fields"]
        assert second[0]["value"] == 7
        assert captured.captured["globalstate"].body[4:11] == b"running"

        destination = walker()
        incoming = destination.machine.incoming("memory:next")
        onward = captured.migrate("memory:next")
        onward.wait(LONG)
        incoming.wait(LONG)
        assert captured.run_state == "postmigrate"
    assert destination.machine.run_state == "running"
    destination.wait_steps(20)
    destination.machine.stop()
    assert destination.counter.steps >= steps + 20
    check_walker(destination.machine, destination.counter.steps)


def test_by_way_of_a_file(walker, plugins, tmp_path):
    """Captured, stored, loaded, sent on: its own words go out as they came, and the next machine takes them."""
    source = walker()
    source.machine.start()
    source.wait_steps(40)
    file = tmp_path / "machine"
    kept = []

    def keep(machine):
        save(machine, file)
        kept.append(source.machine.run_state)

    taking = Taking(plugins, keep=keep)
    source.machine.migrate(taking.uri).wait(LONG)
    taking.join().close()
    assert kept == ["finish-migrate"], "it was kept while the source could still go back"
    settings = Settings()
    settings.parameters.max_bandwidth = 0
    with CapturedMachine.load(file, plugins=plugins, settings=settings) as stored:
        check_walker(stored, source.counter.steps)
        # The description comes behind the EOF, and so behind the proof: what was kept then has none.
        assert not stored.form().description
        destination = walker()
        incoming = destination.machine.incoming("memory:next", start=False)
        stored.migrate("memory:next").wait(LONG)
        incoming.wait(LONG)
    assert destination.machine.run_state == "paused"
    assert destination.counter == source.counter
    check_walker(destination.machine, destination.counter.steps)


def test_a_machine_of_another_make_does_not_take_it(walker, plugins):
    """And then it is still here, and goes to the right one."""
    source = walker()
    taking = Taking(plugins)
    source.machine.migrate(taking.uri).wait(LONG)
    with taking.join() as captured:
        for _ in range(2):
            wrong = walker(name="another")
            incoming = wrong.machine.incoming("memory:wrong")
            with pytest.raises(PeerRefused):
                captured.migrate("memory:wrong").wait(LONG)
            with pytest.raises(IncompatibleError, match="'walker'"):
                incoming.wait(LONG)
            assert captured.run_state == "paused"
        right = walker()
        incoming = right.machine.incoming("memory:right")
        captured.migrate("memory:right").wait(LONG)
        incoming.wait(LONG)
        assert right.machine.run_state == "paused", "the source was never started"


def test_a_machine_that_cannot_be_kept_runs_on(walker, plugins):
    source = walker()
    source.machine.start()

    def keep(machine):
        raise MigrationError("the disk is full")

    taking = Taking(plugins, keep=keep)
    migration = source.machine.migrate(taking.uri)
    with pytest.raises(PeerRefused):
        migration.wait(LONG)
    taking.join()
    assert str(taking.error).startswith("the disk is full")
    assert source.machine.run_state == "running"
    source.wait_steps(3)


def test_a_source_that_is_cancelled(walker, plugins, link):
    source = walker()
    source.machine.start()
    source.wait_steps(40)
    link.break_next(Faults(stall_sent=10_000))
    taking = Taking(plugins)
    migration = source.machine.migrate(taking.uri)
    link.wait_stalled()
    assert migration.cancel()
    assert taking.join() is None
    assert isinstance(taking.error, ChannelError)
    assert source.machine.run_state == "running"
    assert taking.capture.machine.run_state == "shutdown"


def test_a_capture_that_is_cancelled(walker, plugins, link):
    source = walker()
    source.machine.start()
    source.wait_steps(40)
    link.break_next(Faults(stall_sent=10_000))
    taking = Taking(plugins)
    migration = source.machine.migrate(taking.uri)
    assert taking.begun.wait(LONG)
    link.wait_stalled()
    taking.capture.cancel()
    assert taking.join() is None
    assert taking.error.code == "cancelled"
    link.channel.release()
    with pytest.raises(WhimbrelError):
        migration.wait(LONG)
    assert source.machine.run_state == "running"


# ------------------------------------------------------------------------------------------------------ the law


def outcome(walker, plugins, link, faults):
    """What both sides say of a handover in which something goes wrong: (the source's state, the capture's)."""
    source = walker()
    source.machine.settings.limits.handover_timeout = 5.0
    source.machine.stop()
    link.break_next(faults)
    taking = Taking(plugins)
    migration = source.machine.migrate(taking.uri)
    with_error = None
    try:
        migration.wait(LONG)
    except MigrationError as exc:
        with_error = exc
    machine = taking.join()
    try:
        if machine is not None:
            check_walker(machine, 0)
            assert [device.name for device in machine.captured] == ["counter", "counter", "globalstate"]
        held = "nothing" if machine is None else "undecided" if taking.error is not None else "machine"
        mine = source.machine.run_state
        assert mine in ("paused", "postmigrate")
        return mine, held, None if with_error is None else with_error.code
    finally:
        if machine is not None:
            machine.close()
        source.machine.close()


def lengths(walker, plugins, link):
    """How many bytes go either way in a handover in which nothing goes wrong."""
    assert outcome(walker, plugins, link, Faults()) == ("postmigrate", "machine", None)
    return link.channel.sent, link.channel.received


def check_law(mine, held, code):
    """Somebody holds the machine, and nobody thinks that he does while another may."""
    if mine == "paused":  # the source goes on
        assert held in ("nothing", "undecided")
        assert code is not None
    elif code is None:  # it has let go and was told so; the link may have broken behind that word
        assert held in ("machine", "undecided")
    else:  # it has let go, and was not told
        assert code == "undecided"
        assert held in ("machine", "undecided")


@pytest.mark.parametrize("orderly", [True, False])
def test_cut_at_any_byte_of_the_end(walker, plugins, link, orderly):
    """Of what the source sends: from the last of its RAM on. And of what it hears: every byte."""
    sent, received = lengths(walker, plugins, link)
    seen = set()
    tail = range(sent - 1500, sent + 1, 23 if orderly else 41)
    for cut in [*tail, sent - 1, sent - 5, sent - 6]:
        result = outcome(walker, plugins, link, Faults(cut_sent=cut, orderly=orderly))
        check_law(*result)
        seen.add(result[1])
    for cut in range(received + 1):
        result = outcome(walker, plugins, link, Faults(cut_received=cut, orderly=orderly))
        check_law(*result)
        seen.add(result[1])
    assert seen >= {"nothing", "undecided"}
