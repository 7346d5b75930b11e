"""Machines whose guest writes all the time move by changes of pages (`xbzrle`), and arrive byte for byte."""

from __future__ import annotations

import collections

import pytest

from whimbrel import RunState, hookimpl
from whimbrel.abc import SectionKind
from whimbrel.plugins import PluginManager
from whimbrel.stream import Reader, Replay
from whimbrel.wire import commands, ram, skeleton

LONG = 60.0
PAGE = 4096
BLOCKS = {"small": 1, "odd": 37, "large": 250}


class Rounds:
    """Makes a migration go through some rounds, in each of which the guest has written; `between` is called in each."""

    def __init__(self, rounds, build, between=lambda number: None):
        self.rounds, self.build, self.between = rounds, build, between

    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        self.between(round.number)
        if round.number < self.rounds:
            self.build.source.wait_steps(60)
            return False
        return None


@pytest.fixture
def settings(settings):
    settings.capabilities.xbzrle = True
    settings.parameters.xbzrle_cache_size = 512 * PAGE
    return settings


def arrived(build):
    """Stop the machine where it is now, and compare it."""
    build.destination.wait_steps(20)
    build.destination.machine.stop()
    assert build.source.machine.run_state is RunState.POSTMIGRATE
    build.destination.check()


def move(make_pair, build, settings, rounds=4, between=lambda number: None, **more):
    """Move a running machine; its counters and, over a pair's own link, how many records of each kind there were."""
    pair = make_pair(build, settings=settings, plugins=[Rounds(rounds, build, between)], **more)
    pair.source.start()
    build.source.wait_steps(60)
    incoming, outgoing = pair.migrate()
    info = outgoing.wait(LONG)
    incoming.wait(LONG)
    assert info.rounds >= rounds
    arrived(build)
    return pair, info


def records(pair):
    """How many records of RAM there were of each kind in what has gone over the link."""
    reader, follow, found = Reader(Replay(bytes(pair.recorded.sent))), ram.RecordReader(), collections.Counter()
    reader.parse(skeleton.parse_header())
    reader.advance(1)
    reader.parse(skeleton.parse_configuration())
    while (element := reader.parse(skeleton.parse_element())) is not skeleton.Element.SECTION_FULL:
        if element is skeleton.Element.COMMAND:
            reader.parse(commands.parse_command())
            continue
        kind = skeleton.KIND_OF_ELEMENT[element]
        head = reader.parse(skeleton.parse_section_header(kind))
        if kind is SectionKind.START:
            number = head.section_id
            reader.parse(ram.parse_block_list(total_limit=1 << 40, blocks_limit=100))
        for _, run in follow.body(reader, 1 << 30):
            found[run.flag.name] += len(run.indices)
        reader.parse(skeleton.parse_section_footer(number))
    return found


@pytest.mark.parametrize("tracker", ["userfaultfd", "compare", "manual"])
def test_every_byte_arrives(make_pair, churning, settings, tracker):
    settings.backends.dirty_tracker = tracker
    build = churning(BLOCKS, rest=0)
    pair, info = move(make_pair, build, settings)
    found, counters = records(pair), info.details["xbzrle-cache"]
    assert found["XBZRLE"] > 50
    assert found["PAGE"] == info.ram.normal
    assert found["ZERO"] == info.ram.duplicate
    assert counters["pages"] >= found["XBZRLE"] + counters["overflow"]
    assert counters["cache-miss"] > 0
    assert counters["cache-size"] == 512 * PAGE
    assert counters["bytes"] > 3 * found["XBZRLE"] + PAGE * counters["overflow"]


@pytest.mark.parametrize("pages", [1, 2, 32, 64])
def test_a_cache_that_is_too_small(make_pair, churning, settings, pages):
    settings.parameters.xbzrle_cache_size = pages * PAGE
    build = churning(BLOCKS, rest=0)
    pair, info = move(make_pair, build, settings)
    found, counters = records(pair), info.details["xbzrle-cache"]
    assert counters["cache-miss"] > counters["pages"]
    assert found["PAGE"] == info.ram.normal
    if pages >= 32:
        assert found["XBZRLE"] > 0


def test_the_size_changes_while_it_runs(make_pair, churning, settings):
    """With another size the cache is empty: two rounds with each, so that there is something in it."""
    sizes = [512 * PAGE, 8 * PAGE, 1 << 30, PAGE, 256 * PAGE]
    seen = []

    def between(number):
        cache = build.source.machine.migration.info.details["xbzrle-cache"]
        seen.append((cache["cache-size"], cache["pages"]))
        settings.parameters.xbzrle_cache_size = sizes[number // 2 % len(sizes)]

    build = churning(BLOCKS, rest=0)
    pair, info = move(make_pair, build, settings, rounds=14, between=between)
    assert [size for size, _ in seen[:10]] == [size for size in sizes for _ in range(2)]
    assert records(pair)["XBZRLE"] > 0
    assert info.details["xbzrle-cache"]["pages"] >= seen[-1][1] > seen[1][1] == 0


def test_memory_is_sent_by_address(churning, settings, tmp_path):
    """Over a socket itself, not a pair's link, which takes copies."""
    build = churning(BLOCKS, rest=0)
    plugins = PluginManager()
    plugins.register(Rounds(4, build))
    with build(settings, plugins) as source, build(settings.copy(), PluginManager()) as destination:
        source.start()
        build.source.wait_steps(60)
        incoming = destination.incoming(f"unix:{tmp_path}/socket")
        info = source.migrate(incoming.uri).wait(LONG)
        incoming.wait(LONG)
        arrived(build)
        counters = info.details["xbzrle-cache"]
        assert counters["pages"] > 50
        assert counters["bytes"] > 0


@pytest.mark.parametrize("rounds", [1, 2])
def test_few_rounds(make_pair, churning, settings, rounds):
    """The first goes whole, and the last is one in which nothing is kept."""
    build = churning({"a": 40}, rest=0)
    _, info = move(make_pair, build, settings, rounds=rounds)
    assert info.details["xbzrle-cache"]["cache-miss"] > 0


def test_what_is_cancelled_or_lost_is_sent_anew(make_pair, churning, settings):
    """The cache belongs to the migration: what a destination that is gone had is forgotten."""
    build = churning(BLOCKS, rest=0)
    stop_at = [3]

    def between(number):
        if number == stop_at[0]:
            pair.source.migration.cancel()

    pair = make_pair(build, settings=settings, plugins=[Rounds(4, build, between)])
    pair.source.start()
    build.source.wait_steps(60)
    _, outgoing = pair.run()
    assert outgoing.info.status == "cancelled"
    stop_at[0] = 0
    pair.new_destination()
    _, outgoing = pair.run()
    assert outgoing.error is None
    arrived(build)


def test_without_it_there_are_no_counters(make_pair, churning, settings):
    settings.capabilities.xbzrle = False
    build = churning({"a": 20}, rest=0)
    pair, info = move(make_pair, build, settings)
    assert "xbzrle-cache" not in info.details
    assert records(pair).keys() <= {"PAGE", "ZERO"}


def test_a_machine_without_ram_has_nothing_to_count(make_pair, churning, settings):
    build = churning({})
    _, info = move(make_pair, build, settings, rounds=1)
    assert info.details["xbzrle-cache"]["pages"] == 0
