"""What the migration tests share: machines whose memory can be worked out, and a look at what is left behind."""

from __future__ import annotations

import gc
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import attrs
import numpy as np
import pytest

from whimbrel import LoopGuest, Machine, Settings, vmstate
from whimbrel.abc import SectionKind
from whimbrel.stream import Reader
from whimbrel.testing.memory import ReplayChannel
from whimbrel.testing.pair import Pair
from whimbrel.wire import commands, description, handover, ram, skeleton

PAGE = 4096
LONG = 60.0  # seconds; only what hangs ever waits so long


# ------------------------------------------------------------------------------------------------ what is left behind


def _ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("whimbrel-")]


def _descriptors():
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            found[path.name] = str(path.readlink())
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """No thread of ours and no descriptor outlives a test. Threads that were told to end may take a moment."""
    threads, descriptors = set(_ours()), _descriptors()
    yield
    for thread in set(_ours()) - threads:
        thread.join(5)
        assert not thread.is_alive(), f"{thread.name} is left behind"
    left = {number: what for number, what in _descriptors().items() if descriptors.get(number) != what}
    if left:
        gc.collect()  # what only a traceback or a cycle holds is not lost
        left = {number: what for number, what in left.items() if _descriptors().get(number) == what}
    assert not left, f"descriptors are left behind: {left}"


@pytest.fixture(autouse=True)
def _quick_switching():
    """A guest that never waits holds the interpreter for 5 ms a turn; with less, a handover of threads costs less."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    yield
    sys.setswitchinterval(before)


# ---------------------------------------------------------------------------------------------------------- machines


@attrs.define
class Counter:
    """A device: how many steps were made."""

    steps: int = 0


COUNTER = vmstate.VMStateDescription("counter", 1, fields=[vmstate.uint64("steps")])


@attrs.define
class Dial:
    """A second device, with values of several kinds."""

    position: int = 0
    name: bytes = bytes(8)
    curve: np.ndarray = attrs.field(factory=lambda: np.zeros(5))


def dial_description(post_load):
    return vmstate.VMStateDescription(
        "dial",
        2,
        fields=[
            vmstate.int16("position", low=-100, high=100),
            vmstate.buffer("name", size=8),
            vmstate.float64("curve", length=5),
        ],
        post_load=post_load,
    )


class Churn:
    """A guest that writes all the time, whose memory after n steps is a function of n alone.

    So whoever stops it anywhere can work out what every byte must be (`expected`): the perfect copy.
    """

    def __init__(self, machine, blocks, *, rest=0.0002):
        self.machine = machine
        self.blocks = {name: machine.ram.add(name, pages * PAGE) for name, pages in blocks.items()}
        self.counter = Counter()
        self.dial = Dial()
        self.rest = rest  # seconds after each step, so that a test with a guest does not cost a whole processor
        self.on_load = lambda: None  # called when the dial was loaded; what it raises refuses the machine
        self.on_step = lambda: None  # called in every step; what it raises is the guest's failure
        self.announced = []
        self.powered = 0
        self.changed = threading.Condition()
        machine.devices.add("counter", self.counter, COUNTER)
        machine.devices.add("dial", self.dial, dial_description(lambda dial, version: self.on_load()))
        machine.guest = LoopGuest(self.step, power_on=self.power_on, announce=lambda: self.announced.append(1))

    def views(self):
        return {name: block.view for name, block in self.blocks.items()}

    def power_on(self):
        self.powered += 1
        fill(self.views())
        self.dial.position, self.dial.name = -7, b"whimbrel"
        self.dial.curve[:] = [1.5, -2.0, np.inf, 0.0, 1e-300]

    def step(self):
        self.on_step()
        turn(self.views(), self.counter.steps, self.blocks)
        self.counter.steps += 1
        if self.rest:
            time.sleep(self.rest)
        with self.changed:
            self.changed.notify_all()

    def wait_steps(self, more):
        """Wait until the guest has made `more` further steps."""
        with self.changed:
            goal = self.counter.steps + more
            assert self.changed.wait_for(lambda: self.counter.steps >= goal, LONG), "the guest does not run"

    def fail(self):
        """Let the guest run into a bug of its own, and wait until the machine knows."""

        def on_step():
            raise ZeroDivisionError("a bug of the guest's")

        self.on_step = on_step
        self.machine.guest._thread.join(LONG)
        assert self.machine.run_state == "internal-error"

    def expected(self):
        """What memory must be after the steps that the counter tells."""
        views = {name: np.zeros(block.size, np.uint8) for name, block in self.blocks.items()}
        fill(views)
        for number in range(self.counter.steps):
            turn(views, number, None)
        return views

    def check(self):
        """Compare every byte of a stopped machine with the perfect copy, and every device."""
        assert self.machine.run_state != "running"
        for name, expected in self.expected().items():
            wrong = np.flatnonzero(self.blocks[name].view != expected)
            assert not len(wrong), f"{len(wrong)} bytes of {name!r} are wrong, the first at {wrong[0]:#x}"
        assert (self.dial.position, self.dial.name) == (-7, b"whimbrel")
        assert self.dial.curve.tolist() == [1.5, -2.0, np.inf, 0.0, 1e-300]


def fill(views):
    """Every second page is random, the others are zero."""
    dice = np.random.default_rng(7)
    for view in views.values():
        pages = view.reshape(-1, PAGE)
        pages[::2] = dice.integers(0, 256, (len(pages[::2]), PAGE), np.uint8)


def turn(views, number, blocks):
    """Step `number`: write somewhere, and now and then make a page zero or fill a zero one."""
    if not views:
        return
    names = list(views)
    name = names[number % len(names)]
    view = views[name]
    pages = len(view) // PAGE
    page = (number * 2654435761 >> 7) % pages
    start = page * PAGE
    match number % 11:
        case 3:
            view[start : start + PAGE] = 0
            written = (start, PAGE)
        case 5:
            view[start : start + PAGE] = number % 251
            written = (start, PAGE)
        case _:
            at = start + number * 40503 % (PAGE - 8)
            view[at : at + 8] = np.frombuffer((number + 1).to_bytes(8, "little"), np.uint8)
            written = (at, 8)
    if blocks is not None:
        blocks[name].mark_dirty(*written)  # for the tracker that lives by it


class Churning:
    """Builds machines with a Churn in them, for a Pair.

    `source` may say in what the first machine, the source, differs: name, uuid, blocks, or `alter(machine, churn)`.
    """

    def __init__(self, blocks, *, name="churning", uuid=None, alter=None, source=None, **more):
        self.blocks, self.more = blocks, more
        self.plan = {"name": name, "uuid": uuid, "blocks": blocks, "alter": alter}
        self.first = {**self.plan, **(source or {})}
        self.built = []

    def __call__(self, settings, plugins):
        plan = self.plan if self.built else self.first
        machine = Machine(plan["name"], settings=settings, plugins=plugins, uuid=plan["uuid"])
        self.built.append(Churn(machine, plan["blocks"], **self.more))
        if plan["alter"] is not None:
            plan["alter"](machine, self.built[-1])
        return machine

    @property
    def source(self):
        return self.built[0]

    @property
    def destination(self):
        return self.built[-1]


@pytest.fixture
def churning():
    """`churning({"a": pages, …})`: what a Pair builds its machines with."""
    return Churning


@pytest.fixture
def make_pair():
    """`make_pair(build, …)`: a Pair, closed after the test."""
    made = []

    def make(build, **more):
        pair = Pair(build, **{"handover": "proof", **more})
        made.append(pair)
        return pair

    yield make
    for pair in made:
        pair.close()


# ------------------------------------------------------------------------------------------------ reading a recording


@attrs.define
class Found:
    """One element of a recorded stream; for RAM sections, the pages of their records by block and kind."""

    element: str
    name: str = ""
    offset: int = 0
    end: int = 0
    pages: list = attrs.field(factory=list)  # (block, "PAGE" or "ZERO", page number)


def walk(data):
    """Take a recorded stream apart, in order and to its last byte."""
    reader = Reader(ReplayChannel(data))
    found = []
    names, block = {}, [None]
    reader.parse(skeleton.parse_header())
    if reader.window(1)[0] == skeleton.Element.CONFIGURATION:
        found.append(Found("CONFIGURATION", offset=reader.offset))
        reader.advance(1)
        reader.parse(skeleton.parse_configuration())
        found[-1].end = reader.offset
    while True:
        offset = reader.offset
        element = reader.parse(skeleton.parse_element())
        found.append(one := Found(element.name, offset=offset))
        if element is skeleton.Element.COMMAND:
            command = reader.parse(commands.parse_command())
            one.name = f"PING {command.value:#x}" if isinstance(command, commands.Ping) else _name(command)
        elif element is not skeleton.Element.EOF:
            kind = skeleton.KIND_OF_ELEMENT[element]
            head = reader.parse(skeleton.parse_section_header(kind))
            number = head if isinstance(head, int) else head.section_id
            names.setdefault(number, getattr(head, "idstr", ""))
            one.name = names[number]
            if one.name == "ram":
                _walk_ram(reader, kind, one, block)
            else:
                foot = skeleton.section_footer(number)
                reader.advance(bytes(reader.window(1)).index(foot) if len(data) < 1 << 20 else 0)
            reader.parse(skeleton.parse_section_footer(number))
        one.end = reader.offset
        if element is skeleton.Element.EOF:
            break
    offset = reader.offset
    reader.parse(description.parse_and_skip(1 << 24))
    found.append(Found("VMDESCRIPTION", offset=offset, end=reader.offset))
    if reader.offset < len(data):
        offset = reader.offset
        word = reader.parse(handover.parse_word())
        found.append(Found(word.kind.name, offset=offset, end=reader.offset))
    assert reader.offset == len(data)
    return found


def _name(command):
    """The command's name in the wire format."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", type(command).__name__).upper()


def _walk_ram(reader, kind, one, block):
    if kind is SectionKind.START:
        reader.parse(ram.parse_block_list(total_limit=1 << 40, blocks_limit=100))
    need = 8
    while True:
        run = ram.read_run(reader.window(need))
        need = run if isinstance(run, int) else 8
        if isinstance(run, int):
            continue
        if run.flag is ram.Flag.EOS:
            reader.advance(run.size)
            return
        block[0] = run.block or block[0]
        one.pages += [(block[0], run.flag.name, int(page)) for page in run.indices]
        reader.advance(run.size)


@pytest.fixture(name="walk", scope="session")
def _walk():
    """`walk(stream)`: its elements."""
    return walk


@pytest.fixture
def settings():
    """Settings without a bandwidth limit and with one announcement."""
    settings = Settings()
    settings.parameters.max_bandwidth = 0
    settings.parameters.announce_rounds = 1
    return settings
