"""Machines over rdma: with and without pin-all, over each provider: what moves, what is refused, what fails where."""

from __future__ import annotations

import threading

import attrs
import pytest

from whimbrel import MigrationStatus, RunState
from whimbrel.testing.pair import settle
from whimbrel.wire.rdma import ControlType
from whimbrel_transports._rdma_writing import Writing
from whimbrel_transports._verbs_pair import Pair as QueuePair

from ..plugins.loopback_verbs import Context
from .over_rdma import FAULTS, LONG, STRANGER, Meeting, Two, breaks, link_over


@pytest.fixture
def two():
    made = []

    def make(build, settings, link, **more):
        made.append(Two(build, settings, link, **more))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def build(churning):
    """Blocks that are written, and one that nobody has ever touched."""
    return churning({"a": 600, "b": 4}, alter=lambda machine, churn: machine.ram.add("zeros", 300 * 4096))


@pytest.fixture(params=["shared", "socket", pytest.param(STRANGER, marks=pytest.mark.long)])
def link(request):
    return link_over(request.param)


@pytest.mark.parametrize("memory", ["memfd", pytest.param("anonymous", marks=pytest.mark.long)])
@pytest.mark.parametrize("pin_all", [False, True], ids=["chunk by chunk", "pinned"])
def test_a_machine_moves_while_it_writes(two, build, settings, link, pin_all, memory):
    settings.capabilities.rdma_pin_all = pin_all
    settings.backends.memory = memory
    pair = two(build, settings, link)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert incoming.error is None, str(incoming.error)
    assert outgoing.error is None, str(outgoing.error)
    build.destination.wait_steps(3)
    pair.destination.stop()
    build.destination.check()
    assert outgoing.info.ram.normal + outgoing.info.ram.duplicate >= 904


# ------------------------------------------------------------------------------------------------- failure anywhere


SAID = {
    "source": ("QEMU_FILE", "RAM_BLOCKS_REQUEST", "COMPRESS", "REGISTER_REQUEST", "REGISTER_FINISHED", "READY"),
    "destination": ("READY", "RAM_BLOCKS_RESULT", "REGISTER_RESULT", "QEMU_FILE"),
}


def test_the_words_of_a_run(two, build, settings, monkeypatch, link):
    """What the tests below break is really said."""
    meeting = Meeting(monkeypatch)
    pair = two(build, settings, link)
    pair.source.start()
    incoming, _ = pair.run()
    assert incoming.error is None
    assert {(side, kind.name) for side, kind in meeting.seen} == {
        (side, kind) for side, kinds in SAID.items() for kind in kinds
    }
    said = [kind.name for side, kind in meeting.seen if side == "source" and kind.name not in ("QEMU_FILE", "READY")]
    assert said[:2] == ["RAM_BLOCKS_REQUEST", "REGISTER_FINISHED"]
    assert said[-1] == "REGISTER_FINISHED"
    assert meeting.regions() == 0


@pytest.mark.parametrize(
    "fault", [breaks, *(pytest.param(each, marks=pytest.mark.long) for each in FAULTS if each is not breaks)]
)
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(("side", "kind"), [(side, kind) for side, kinds in SAID.items() for kind in kinds])
def test_a_fault_at_each_control_message(two, build, settings, monkeypatch, link, side, kind, number, fault):
    """The source runs on, both ends are freed, and no region is left."""
    meeting = Meeting(monkeypatch, side, ControlType[kind], number, fault)
    pair = two(build, settings, link)
    pair.source.start()
    incoming, outgoing = pair.run()
    happened = meeting.happened
    if happened and outgoing.info.ownership == "owner":
        assert outgoing.status is MigrationStatus.FAILED
        assert incoming.error is not None
        assert pair.source.run_state is RunState.RUNNING
        build.source.wait_steps(3)
        assert not any(block.view.any() for block in build.destination.blocks.values())
    else:
        # It came too late to matter, or never: there was but one such message.
        assert (number, happened) in ((1, False), (1, True)) or kind in ("READY", "QEMU_FILE")
        assert pair.source.run_state is not RunState.RUNNING
    pair.close()
    assert meeting.regions() == 0


@pytest.mark.parametrize("kind", ["QEMU_FILE", "RAM_BLOCKS_REQUEST", "REGISTER_REQUEST", "REGISTER_FINISHED"])
def test_a_cancel_at_a_control_message(two, build, settings, monkeypatch, link, kind):
    """The source runs on; the destination hears ERROR, or that the source is gone."""
    met = threading.Event()
    go_on = threading.Event()

    def wait(sender, data):
        met.set()
        assert go_on.wait(LONG)
        return data

    meeting = Meeting(monkeypatch, "source", ControlType[kind], 0, wait)
    pair = two(build, settings, link)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert met.wait(LONG)
    cancelling = threading.Thread(target=outgoing.cancel)
    cancelling.start()
    go_on.set()
    cancelling.join(LONG)
    settle(outgoing, LONG)
    settle(incoming, LONG)
    assert outgoing.status is MigrationStatus.CANCELLED
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(3)
    assert not any(block.view.any() for block in build.destination.blocks.values())
    assert meeting.regions() == 0


@pytest.mark.parametrize("number", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("pin_all", [False, True], ids=["chunk by chunk", "pinned"])
@pytest.mark.parametrize("link", ["shared", "socket"], indirect=True)
def test_the_connection_dies_at_a_write(two, build, settings, monkeypatch, link, pin_all, number):
    """Between words, with pages on their way: the source runs on, and no region is left."""
    settings.capabilities.rdma_pin_all = pin_all
    meeting, writes = Meeting(monkeypatch), []
    post_write = QueuePair.post_write

    def dies(pair, *args, **more):
        writes.append(pair)
        if len(writes) == number + 1:
            pair._line.hang_up()
        post_write(pair, *args, **more)

    monkeypatch.setattr(QueuePair, "post_write", dies)
    pair = two(build, settings, link)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert len(writes) > number
    assert outgoing.status is MigrationStatus.FAILED
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(3)
    assert not any(block.view.any() for block in build.destination.blocks.values())
    pair.close()
    assert meeting.regions() == 0


@pytest.mark.parametrize("source", [False, True])
def test_pinned_at_one_end_alone_is_not_pinned(two, build, settings, monkeypatch, source):
    meeting = Meeting(monkeypatch)
    other = settings.copy()
    settings.capabilities.rdma_pin_all, other.capabilities.rdma_pin_all = source, not source
    pair = two(build, settings, link_over(STRANGER), destination_settings=other)
    pair.source.start()
    incoming, _ = pair.run()
    assert incoming.error is None
    assert ("source", ControlType.REGISTER_REQUEST) in meeting.seen


def test_an_adapter_with_room_for_few_regions(two, build, settings, monkeypatch):
    """What does not fit is unregistered, and registered again when it is written again."""
    meeting = Meeting(monkeypatch)
    monkeypatch.setattr(Context, "attributes", attrs.evolve(Context.attributes, max_mr=2))
    pair = two(build, settings, link_over(STRANGER))
    pair.source.start()
    incoming, outgoing = pair.run()
    assert incoming.error is None
    assert outgoing.error is None
    assert ("source", ControlType.UNREGISTER_REQUEST) in meeting.seen
    pair.destination.stop()
    build.destination.check()


@pytest.mark.parametrize(
    "fault", [breaks, *(pytest.param(each, marks=pytest.mark.long) for each in FAULTS if each is not breaks)]
)
@pytest.mark.parametrize(
    ("side", "kind"), [("source", ControlType.UNREGISTER_REQUEST), ("destination", ControlType.UNREGISTER_FINISHED)]
)
def test_a_fault_where_regions_are_given_back(two, build, settings, monkeypatch, side, kind, fault):
    meeting = Meeting(monkeypatch, side, kind, 0, fault)
    monkeypatch.setattr(Context, "attributes", attrs.evolve(Context.attributes, max_mr=2))
    pair = two(build, settings, link_over(STRANGER))
    pair.source.start()
    incoming, outgoing = pair.run()
    assert meeting.happened
    assert outgoing.status is MigrationStatus.FAILED
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(3)
    pair.close()
    assert meeting.regions() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_the_word_that_somebody_has_failed(two, build, settings, monkeypatch, link, fault):
    """The source gives up while RAM is under way, and its ERROR does not come as one."""
    meeting = Meeting(monkeypatch, "source", ControlType.ERROR, 0, fault)
    pair = two(build, settings, link)

    def fails(*args):
        raise OSError("no more")

    monkeypatch.setattr(Writing, "save", fails)
    pair.source.start()
    incoming, outgoing = pair.run()
    assert meeting.happened
    assert outgoing.status is MigrationStatus.FAILED
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    pair.close()
    assert meeting.regions() == 0


# ------------------------------------------------------------------------------------- the behaviour of any migration


@pytest.fixture(
    params=[
        pytest.param("socket", marks=pytest.mark.long),
        "shared",
        pytest.param(STRANGER, marks=pytest.mark.long),
    ]
)
def some_link(request):
    return link_over(request.param)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["chunk by chunk", "pinned"])
def writing(request, settings):
    """Settings for memory that is written straight into."""
    settings.capabilities.rdma_pin_all = request.param
    settings.backends.memory = "memfd"
    return settings


def arrived(pair, build, incoming, outgoing):
    assert incoming.error is None, str(incoming.error)
    assert outgoing.error is None, str(outgoing.error)
    build.destination.wait_steps(3)
    pair.destination.stop()
    build.destination.check()


@pytest.mark.parametrize("capability", ["auto_converge", "return_path", "events"])
def test_with_a_capability(two, build, writing, some_link, capability):
    setattr(writing.capabilities, capability, True)
    pair = two(build, writing, some_link)
    pair.source.start()
    arrived(pair, build, *pair.run())


def test_a_cancel_while_it_moves(two, build, writing, some_link, monkeypatch):
    """In the middle of the pages; nothing of it is seen at the source, and the next attempt arrives."""
    met, go_on = threading.Event(), threading.Event()
    save = Writing.save

    def waits(*args):
        met.set()
        assert go_on.wait(LONG)
        return save(*args)

    monkeypatch.setattr(Writing, "save", waits)
    pair = two(build, writing, some_link)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    assert met.wait(LONG)
    assert outgoing.cancel()
    go_on.set()
    settle(outgoing, LONG)
    settle(incoming, LONG)
    assert outgoing.status is MigrationStatus.CANCELLED
    assert incoming.error is not None
    assert pair.source.run_state is RunState.RUNNING
    build.source.wait_steps(3)
    arrived(pair, build, *pair.run())


def test_blocks_that_do_not_agree(two, churning, settings):
    build = churning({"a": 600, "b": 4}, source={"blocks": {"a": 600, "b": 5}})
    pair = two(build, settings, link_over(STRANGER))
    pair.source.start()
    incoming, _ = pair.run()
    assert "'b' is 20480 bytes long, this one's 16384" in str(incoming.error)
    assert pair.source.run_state is RunState.RUNNING
