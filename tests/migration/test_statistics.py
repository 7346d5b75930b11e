"""What a migration tells of itself: plausible while it runs, consistent at its end, and under QEMU's names."""

from __future__ import annotations

import json
import threading

import pytest

from whimbrel import MigrationInfo, MigrationStatus, TransferInfo, hookimpl
from whimbrel.abc import Progress
from whimbrel.migration.linkspeed import MEASURABLE
from whimbrel.migration.statistics import WINDOW, Statistics
from whimbrel.testing.faults import Faults

LONG = 60.0
PAGE = 4096

# query-migrate's `ram` in QEMU 7.2 (wire format, section 10.4).
RAM_KEYS = {
    "total", "transferred", "remaining", "duplicate", "normal", "normal-bytes", "skipped", "page-size", "mbps",
    "dirty-pages-rate", "dirty-sync-count", "dirty-sync-missed-zero-copy", "multifd-bytes", "pages-per-second",
    "postcopy-requests", "precopy-bytes", "downtime-bytes", "postcopy-bytes",
}  # fmt: skip


@pytest.fixture
def build(churning):
    return churning({"a": 40, "b": 5})


class Rounds:
    @hookimpl
    def whimbrel_choose_switchover(self, round):  # noqa: A002
        return round.number >= 3


def test_the_sums_are_those_of_the_wire(make_pair, build, settings, walk):
    pair = make_pair(build, settings=settings, plugins=[Rounds()])
    pair.source.start()
    _, outgoing = pair.run()
    info, stream = outgoing.info, bytes(pair.recorded.sent)
    elements = walk(stream)
    pages = [page for element in elements for page in element.pages]
    normal = sum(kind == "PAGE" for _, kind, _ in pages)
    assert info.ram.transferred == len(stream)
    assert info.ram.precopy_bytes + info.ram.downtime_bytes == len(stream)
    assert (info.ram.normal, info.ram.duplicate) == (normal, len(pages) - normal)
    assert info.ram.normal_bytes == normal * PAGE
    assert info.ram.total == 45 * PAGE
    assert info.ram.remaining == 0
    assert info.ram.page_size == PAGE
    parts = [element for element in elements if element.name == "ram"]
    assert parts[-1].element == "SECTION_END"
    # The blackout's bytes begin between the last PART and the END.
    assert parts[-2].end <= info.ram.precopy_bytes <= parts[-1].offset
    assert info.rounds == 3
    assert info.ram.dirty_sync_count == 5  # one in setup, one behind each round, one in the blackout
    # Every page of every block has gone at least once, and none outside of them.
    assert {(block, page) for block, _, page in pages} == {("a", page) for page in range(40)} | {
        ("b", page) for page in range(5)
    }
    for part in parts:
        assert len({(block, page) for block, _, page in part.pages}) == len(part.pages)


def test_the_times_of_a_completed_one_fit_together(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Rounds()])
    pair.source.start()
    _, outgoing = pair.run()
    info = outgoing.info
    assert info.status is MigrationStatus.COMPLETED
    assert 0 <= info.setup_time <= info.total_time
    assert 0 < info.downtime_exact <= info.total_time + 1
    assert info.downtime == round(info.downtime_exact)
    assert info.expected_downtime is None
    assert (info.error, info.error_code, info.ownership) == ("", "", "done")
    assert info.bandwidth > 0
    assert info.ram.mbps > 0
    assert info.tracker in {"userfaultfd", "compare"}
    assert outgoing.info == info  # nothing moves any more
    answer = info.as_qmp()
    assert answer.keys() == {"status", "setup-time", "total-time", "downtime", "ram"}
    assert answer["ram"].keys() == RAM_KEYS
    assert (answer["status"], answer["ram"]["skipped"]) == ("completed", 0)
    assert answer["ram"]["dirty-pages-rate"] == 0  # as in a QEMU: nothing becomes dirty any more
    assert list(info.downtime_split) == ["stop", "ram", "devices", "transfer", "confirm", "release", "start"]
    assert sum(info.downtime_split.values()) == pytest.approx(info.downtime_exact)
    assert min(info.downtime_split.values()) >= 0
    assert info.as_dict()["downtime-split"] == info.downtime_split
    json.dumps(info.as_dict(), allow_nan=False)


@pytest.mark.parametrize("case", ["paused", "one way", "qemu"])
def test_the_parts_of_the_downtime_are_its_sum_in_each_form(make_pair, build, settings, case):
    settings.capabilities.pause_before_switchover = case == "paused"
    pair = make_pair(build, settings=settings, plugins=[Rounds()], duplex=case != "one way")
    reached = threading.Event()
    pair.source.notifiers.add(lambda event: getattr(event, "new", "") == "pre-switchover" and reached.set())
    pair.source.start()
    incoming = pair.destination.incoming(pair.uri)
    outgoing = pair.source.migrate(incoming.uri, handover="qemu" if case == "qemu" else "proof")
    if case == "paused":
        assert reached.wait(LONG)
        outgoing.proceed()
    info = outgoing.wait(LONG)
    incoming.wait(LONG)
    parts = list(info.downtime_split)
    expected = ["stop", "ram", "devices", "transfer", "confirm", "release", "start"]
    if case == "paused":
        expected.insert(1, "pause")
    else:
        expected.remove("confirm")  # nobody proves anything
    assert parts == expected
    assert sum(info.downtime_split.values()) == pytest.approx(info.downtime_exact)


def test_while_it_runs_everything_adds_up(make_pair, build, settings):
    settings.parameters.max_bandwidth = 400_000  # so that it goes in parts of ten pages
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=60_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    info = outgoing.info
    assert info.status is MigrationStatus.ACTIVE
    assert (info.downtime, info.downtime_exact) == (None, None)
    assert 0 < info.ram.remaining < info.ram.total
    assert 0 < (info.ram.normal + info.ram.duplicate) * PAGE <= info.ram.total
    assert info.ram.normal_bytes < info.ram.transferred < info.ram.total
    assert info.ram.dirty_sync_count == 1
    assert info.rounds == 0
    answer = info.as_qmp()
    assert answer.keys() - {"expected-downtime"} == {"status", "setup-time", "total-time", "ram"}
    assert answer["ram"].keys() == RAM_KEYS
    settings.parameters.max_bandwidth = 0
    later = outgoing.info
    assert later.total_time >= info.total_time
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)


def test_in_setup_there_is_only_the_status(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=10)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    channel = pair.wait_stalled()
    assert outgoing.info.as_qmp() == {"status": "setup"}
    assert outgoing.info.transfers == {}
    assert outgoing.info.ram == TransferInfo()
    channel.release()
    outgoing.wait(LONG)
    incoming.wait(LONG)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_one_that_ended_without_success(make_pair, build, settings, end):
    pair = make_pair(build, settings=settings)
    pair.faults = Faults(stall_sent=60_000) if end == "cancelled" else Faults(cut_sent=60_000)
    pair.source.start()
    incoming, outgoing = pair.migrate()
    if end == "cancelled":
        pair.wait_stalled()
        outgoing.cancel()
    outgoing.join()
    info = outgoing.info
    assert info.as_qmp() == {"status": end, "error-desc": str(outgoing.error)}
    assert (info.downtime, info.ownership) == (None, "owner")
    assert info.as_dict()["error-code"] == ("lost" if end == "failed" else "cancelled")
    incoming.close()


def test_never_migrated_says_nothing():
    assert MigrationInfo(status=MigrationStatus.NONE).as_qmp() == {}
    blocked = MigrationInfo(status=MigrationStatus.NONE, blocked_reasons=("a device",))
    assert blocked.as_qmp() == {"blocked-reasons": ["a device"]}


def test_the_destination_tells_how_it_stands(make_pair, build, settings):
    pair = make_pair(build, settings=settings)
    pair.source.start()
    incoming, _ = pair.run()
    assert incoming.info.as_qmp() == {"status": "completed"}
    assert incoming.info.ownership == "owner"


def test_info_may_be_asked_for_all_the_time(make_pair, build, settings):
    pair = make_pair(build, settings=settings, plugins=[Rounds()])
    pair.source.start()
    seen, done, failures = [], threading.Event(), []

    def ask():
        try:
            while not done.is_set():
                if pair.source.migration is not None:
                    seen.append(pair.source.migration.info)
        except Exception as exc:
            failures.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    pair.run()
    done.set()
    asking.join()
    assert not failures
    assert seen
    transferred = [info.ram.transferred for info in seen if info.transfers]
    assert transferred == sorted(transferred)
    assert all(info.ram.remaining <= info.ram.total for info in seen)


# ------------------------------------------------------------------------------------------------- with a clock of ours


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def measured():
    """A Statistics whose clock and bytes the test moves."""
    clock, sent = Clock(), [0]
    statistics = Statistics(clock=clock)
    progress = Progress(page_size=PAGE, total=100 * PAGE)
    clock.now += 0.25
    statistics.setup_ended(lambda: sent[0], {"ram": progress})
    return statistics, clock, sent, progress


def ended(statistics, remaining, size, span, **more):
    defaults = {"total": 100 * PAGE, "previous": 100 * PAGE, "limit": 0.3, "switchover_bandwidth": 0}
    return statistics.round_ended(remaining=remaining, size=size, span=span, **{**defaults, **more})


def test_a_round_is_measured_by_its_own_bytes_and_time(measured):
    statistics, clock, sent, progress = measured
    clock.now += 2.0
    sent[0] += 10_000_000
    size, span = statistics.round_sent()
    assert (size, span) == (10_000_000, pytest.approx(2.0))
    progress.synced_dirty = 50 * PAGE
    round_ = ended(statistics, 1_000_000, size, span)
    assert round_.bandwidth == pytest.approx(5e6)
    assert round_.dirty_rate == pytest.approx(25 * PAGE)
    assert round_.expected_downtime == pytest.approx(0.2)
    info = statistics.info(MigrationStatus.ACTIVE)
    assert (info.setup_time, info.total_time, info.expected_downtime) == (250, 2250, 200)
    assert info.ram.dirty_pages_rate == 25


def test_a_round_of_next_to_nothing_says_nothing_of_the_bandwidth(measured):
    statistics, clock, sent, _ = measured
    clock.now += 1.0
    sent[0] += 5_000_000
    ended(statistics, 0, *statistics.round_sent())
    clock.now += 1.0
    sent[0] += MEASURABLE - 1
    round_ = ended(statistics, 0, *statistics.round_sent())
    assert round_.bandwidth == pytest.approx(5e6)


def test_a_bandwidth_that_is_told_is_reckoned_with(measured):
    statistics, clock, sent, _ = measured
    clock.now += 1.0
    sent[0] += 1_000_000
    round_ = ended(statistics, 1_000_000, *statistics.round_sent(), switchover_bandwidth=10_000_000)
    assert round_.bandwidth == pytest.approx(1e6)
    assert round_.expected_downtime == pytest.approx(0.1)


def test_without_any_bandwidth_the_downtime_is_unknown_and_says_so(measured):
    statistics, _, _, _ = measured
    assert ended(statistics, 1, 0, 1.0).expected_downtime == float("inf")
    assert statistics.info(MigrationStatus.ACTIVE).expected_downtime == 10**12
    assert ended(statistics, 0, 0, 1.0).expected_downtime == 0.0


def test_windows_measure_megabits_and_pages(measured):
    statistics, clock, sent, progress = measured
    clock.now += WINDOW * 0.5
    sent[0] += 500_000
    statistics.tick()
    assert statistics.info(MigrationStatus.ACTIVE).ram.mbps == 0.0  # not full yet
    clock.now += WINDOW * 0.75
    progress.normal += 100
    progress.duplicate += 20
    statistics.tick()
    info = statistics.info(MigrationStatus.ACTIVE)
    span = WINDOW * 1.25
    assert info.ram.mbps == pytest.approx(500_000 * 8 / span / 1e6)
    assert info.ram.pages_per_second == pytest.approx(120 / span, abs=1)
    assert statistics.bandwidth == pytest.approx(500_000 / span)


def test_the_blackout_counts_from_the_stop_to_the_start(measured):
    statistics, clock, sent, _ = measured
    sent[0] = 1000
    clock.now += 1.0
    statistics.guest_stopped()
    assert statistics.downtime is None
    sent[0] = 1300
    clock.now += 0.012
    statistics.guest_resumed()
    clock.now += 1.0
    statistics.ended()
    clock.now += 50.0
    info = statistics.info(MigrationStatus.COMPLETED)
    assert info.downtime_exact == pytest.approx(12.0)
    assert (info.ram.precopy_bytes, info.ram.downtime_bytes) == (1000, 300)
    assert info.total_time == 2262


def test_what_goes_beside_the_stream_is_sent_too(measured):
    statistics, clock, sent, _ = measured
    beside = [0]
    statistics.sends_beside(lambda: beside[0])
    clock.now += 1.0
    sent[0], beside[0] = 1_000_000, 3_000_000
    statistics.tick()
    size, span = statistics.round_sent()
    round_ = ended(statistics, 0, size, span)
    assert (size, round_.bandwidth) == (4_000_000, pytest.approx(4e6))
    ram = statistics.info(MigrationStatus.ACTIVE).ram
    assert (ram.transferred, ram.multifd_bytes, ram.precopy_bytes) == (4_000_000, 3_000_000, 1_000_000)
    assert ram.mbps == pytest.approx(32.0)


def test_of_a_drive_there_is_no_more_than_its_bytes():
    statistics = Statistics()
    disk = Progress(page_size=1 << 20, total=100, remaining=40, transferred=60, normal=5, duplicate=6)
    statistics.setup_ended(lambda: 10, {"ram": Progress(page_size=PAGE), "disk": disk})
    answer = statistics.info(MigrationStatus.ACTIVE).as_qmp()["disk"]
    assert {name: value for name, value in answer.items() if value} == {
        "total": 100, "remaining": 40, "transferred": 60,
    }  # fmt: skip
    assert answer.keys() == RAM_KEYS
    assert "disk" not in statistics.info(MigrationStatus.COMPLETED).as_qmp()


def test_handlers_tell_more_while_there_are_counters(measured):
    details = {"xbzrle-cache": {"pages": 50, "bytes": 7}}
    clock, sent = Clock(), [0]
    statistics = Statistics(clock=clock)
    statistics.setup_ended(lambda: sent[0], {"ram": Progress(page_size=PAGE)}, details=lambda: details)
    clock.now += 1.0
    statistics.tick()
    info = statistics.info(MigrationStatus.ACTIVE)
    assert info.as_qmp()["xbzrle-cache"] == {"pages": 50, "bytes": 7}
    assert info.ram.pages_per_second == 50  # they count as pages that were sent
    assert "xbzrle-cache" in statistics.info(MigrationStatus.COMPLETED).as_qmp()
    for status in (MigrationStatus.SETUP, MigrationStatus.FAILED, MigrationStatus.CANCELLED):
        assert statistics.info(status).as_qmp() == {"status": status}


def test_a_handler_cannot_pass_itself_off_as_another(measured):
    statistics = Statistics()
    statistics.setup_ended(lambda: 5, {"ram": Progress(page_size=PAGE)}, details=lambda: {"ram": {}, "status": {}})
    answer = statistics.info(MigrationStatus.ACTIVE).as_qmp()
    assert (answer["status"], answer["ram"]["transferred"]) == ("active", 5)


def test_the_round_trips_are_expected_too():
    clock, sent = Clock(), [0]
    statistics = Statistics(clock=clock)
    statistics.setup_ended(lambda: sent[0], {}, round_trip=lambda: 0.02, round_trips=2)
    clock.now += 1.0
    sent[0] += 10_000_000
    round_ = ended(statistics, 1_000_000, *statistics.round_sent())
    assert (round_.fixed_downtime, round_.expected_downtime) == (0.04, pytest.approx(0.14))


def test_a_burst_behind_a_wait_is_the_links_own_speed():
    clock, sent = Clock(), [0]
    statistics = Statistics(clock=clock)
    statistics.setup_ended(lambda: sent[0], {}, round_trip=lambda: 0.0, round_trips=2)
    clock.now += 0.9
    sent[0] += 900_000
    statistics.held_back()
    clock.now += 0.1
    sent[0] += 1_000_000
    size, span = statistics.round_sent()
    statistics.burst(1_000_000, 0.1)
    round_ = ended(statistics, 1_000_000, size, span)
    assert round_.bandwidth == pytest.approx(1.9e6)  # what the rounds get
    assert round_.expected_downtime == pytest.approx(0.1)  # what the switchover will
