"""A machine against its perfect twin: whatever is written, whenever, and however often it moves, they stay equal.

Hypothesis writes to the machine and to plain arrays alike, before migrations and between their rounds, lets some of
the migrations fail, and compares every byte after each step.
"""

from __future__ import annotations

import attrs
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from whimbrel import Machine, RunState, Settings, hookimpl, vmstate
from whimbrel.errors import MigrationError
from whimbrel.testing.faults import Faults
from whimbrel.testing.pair import Pair

PAGE = 4096
BLOCKS = {"a": 5, "b": 1, "c": 70}


@attrs.define
class Register:
    value: int = 0
    items: list = attrs.field(factory=list)
    count: int = 0


REGISTER = vmstate.VMStateDescription(
    "register",
    1,
    fields=[vmstate.int64("value"), vmstate.uint8("count"), vmstate.uint32("items", count="count", maximum=255)],
)

writes = st.tuples(
    st.sampled_from(sorted(BLOCKS)),
    st.floats(0, 1, exclude_max=True),  # where in the block
    st.one_of(
        st.binary(min_size=1, max_size=24),
        st.builds(
            lambda value, size: bytes([value]) * size, st.integers(0, 2), st.sampled_from([PAGE, 3 * PAGE, 5000])
        ),
    ),
    st.sampled_from(["numpy", "memoryview", "pages"]),
)


class Moving(RuleBasedStateMachine):
    """The machine, its twin, and what may happen to them."""

    def __init__(self):
        super().__init__()
        self.pair = None
        self.between = []  # what is written behind each round of the next migration
        self.rounds = 0

    @initialize(tracker=st.sampled_from(["auto", "compare", "manual"]), memory=st.sampled_from(["anonymous", "memfd"]))
    def make(self, tracker, memory):
        options = Settings()
        options.backends.dirty_tracker, options.backends.memory = tracker, memory
        options.parameters.update({"max_bandwidth": 0, "announce_rounds": 0})
        self.pair = Pair(self.build, settings=options, plugins=[self])
        self.pair.source.start()
        self.twin = {name: np.zeros(pages * PAGE, np.uint8) for name, pages in BLOCKS.items()}
        self.register = Register()

    def build(self, settings, plugins):
        machine = Machine("moving", settings=settings, plugins=plugins)
        for name, pages in BLOCKS.items():
            machine.ram.add(name, pages * PAGE)
        machine.register = Register()
        machine.devices.add("register", machine.register, REGISTER)
        return machine

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        if not self.between:
            return True
        for write in self.between.pop(0):
            self.put(*write)
        return False

    def put(self, name, where, data, how):
        block, twin = self.pair.source.ram[name], self.twin[name]
        at = int(where * block.size)
        if how == "pages":
            at -= at % PAGE
        data = data[: block.size - at]
        if how == "memoryview":
            memoryview(block.view)[at : at + len(data)] = data
        else:
            block.view[at : at + len(data)] = np.frombuffer(data, np.uint8)
        block.mark_dirty(at, len(data))
        twin[at : at + len(data)] = np.frombuffer(data, np.uint8)

    @rule(data=st.lists(writes, max_size=6))
    def write(self, data):
        for one in data:
            self.put(*one)

    @rule(value=st.integers(-(2**63), 2**63 - 1), items=st.lists(st.integers(0, 2**32 - 1), max_size=9))
    def turn(self, value, items):
        for register in (self.pair.source.register, self.register):
            register.value, register.items, register.count = value, list(items), len(items)

    @rule(between=st.lists(st.lists(writes, max_size=4), max_size=4), running=st.booleans())
    def move(self, between, running):
        if not running:
            self.pair.source.stop()
        self.between, self.rounds = list(between), len(between) + 1
        incoming, outgoing = self.pair.run()
        assert (incoming.error, outgoing.error) == (None, None)
        assert outgoing.info.rounds == self.rounds
        assert self.pair.destination.run_state is (RunState.RUNNING if running else RunState.PAUSED)
        self.pair.move_on()
        self.pair.source.start()

    @rule(between=st.lists(st.lists(writes, max_size=4), max_size=2), cut=st.integers(0, 40_000), orderly=st.booleans())
    def fail(self, between, cut, orderly):
        self.between = list(between)
        self.pair.faults = Faults(cut_sent=cut, orderly=orderly)
        incoming, outgoing = self.pair.run()
        self.pair.faults = Faults()
        if outgoing.info.ownership != "owner":
            # The stream was shorter than that: it has gone.
            assert incoming.info.ownership == "owner"
            self.pair.move_on()
            return
        assert isinstance(outgoing.error, MigrationError)
        assert self.pair.source.run_state is RunState.RUNNING
        if incoming.info.ownership == "prepared":
            incoming.discard()
        assert not any(block.view.any() for block in self.pair.destination.ram)
        assert self.pair.destination.register == Register()

    @invariant()
    @precondition(lambda self: self.pair is not None)
    def equal(self):
        for name, twin in self.twin.items():
            assert np.array_equal(self.pair.source.ram[name].view, twin), name
        assert self.pair.source.register == self.register

    def teardown(self):
        if self.pair is not None:
            self.pair.close()


TestMoving = Moving.TestCase
TestMoving.settings = settings(
    max_examples=12, stateful_step_count=10, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
