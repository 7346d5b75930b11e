"""What is shown of a migration: the line while it runs, and the table."""

from __future__ import annotations

import pytest

from whimbrel import MigrationInfo, MigrationStatus, TransferInfo
from whimbrel.cli._progress import report, summary
from whimbrel.events import Forecast

RAM = TransferInfo(total=1 << 30, remaining=64 << 20, mbps=800.0, dirty_pages_rate=25600)
FIRST = Forecast(number=2, total_time=4.0, downtime=0.01)
LAST = Forecast(number=5, total_time=5.0, downtime=0.02)


@pytest.fixture
def info():
    """`info(status, …)`: what a monitor tells of such a migration."""

    def make(status=MigrationStatus.ACTIVE, **more):
        return MigrationInfo(status=status, rounds=4, total_time=1000, transfers={"ram": RAM}, **more).as_dict()

    return make


def table(info):
    return {name: text for name, text in report(info) if text}


def test_the_line_of_one_that_converges(info):
    line = summary(info(forecast=LAST, expected_downtime=640))
    assert line == (
        "round 5, 64 MiB left, sends 95.4 MiB/s, dirties 100 MiB/s, expected downtime 640 ms, 5 s foreseen in all"
    )


def test_the_line_of_one_that_does_not(info):
    line = summary(info(stalled=True, cpu_throttle=30, expected_downtime=640))
    assert line.endswith("expected downtime 640 ms, guest throttled by 30 %, does not converge")


def test_a_stall_in_the_table(info):
    assert "convergence" not in table(info())
    assert table(info(stalled=True, stalls=2))["convergence"].startswith("stalled: ")
    assert table(info(stalls=1))["convergence"] == "stalled once"
    assert table(info(stalls=2))["convergence"] == "stalled 2 times"


def test_what_is_foreseen_in_the_table(info):
    assert table(info(first_forecast=FIRST, forecast=LAST))["foreseen"] == "5 s, downtime 20 ms"
    done = info(MigrationStatus.COMPLETED, first_forecast=FIRST, forecast=LAST, downtime_exact=12.0)
    assert table(done)["foreseen"] == "4 s, downtime 10 ms (behind round 2)"
    assert done["first-forecast"]["total-time-error"] == -3000
    assert done["forecast"]["downtime-error"] == -8
    assert "foreseen" not in table(info())
    assert "foreseen" not in table(info(MigrationStatus.FAILED, forecast=LAST))


def test_the_downtime_by_cause(info):
    done = info(MigrationStatus.COMPLETED, downtime_exact=3.5, downtime_split={"stop": 0.5, "ram": 3.0})
    assert table(done)["downtime by cause"] == "stop 500 µs, ram 3 ms"


def test_a_limit_that_was_given_up(info):
    within = info(MigrationStatus.COMPLETED, decision="within the limit", switchover_expected=9.0, switchover_limit=10)
    assert "downtime limit" not in table(within)
    forced = info(MigrationStatus.COMPLETED, decision="forced", switchover_expected=1300.0, switchover_limit=300.0)
    assert table(forced)["downtime limit"] == "300 ms, given up after switchover-timeout with 1.3 s expected"


def test_the_last_dirty_rate_stays_although_a_completed_one_has_none_any_more(info):
    done = info(MigrationStatus.COMPLETED, dirty_rate=100 * 2.0**20)
    assert done["ram"]["dirty-pages-rate"] == 0
    assert table(done)["dirty rate"] == "100 MiB/s"


def test_a_qemu_that_tells_less_is_shown_too():
    ram = RAM.as_qmp()
    assert summary({"status": "active", "ram": ram}).startswith("pass 0, 64 MiB left")
    assert table({"status": "completed", "ram": ram, "downtime": 7})["downtime"] == "7 ms"
