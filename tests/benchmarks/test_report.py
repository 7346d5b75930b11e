"""Figures become tables and a page, and what is kept comes back as it was."""

from __future__ import annotations

import pytest

from benchmarks import keeping, report
from benchmarks.measuring import Figure, Samples, Target, errors
from benchmarks.tables import cells, number
from benchmarks.work import RunFailed

MACHINE = {
    "cpu": "Abacus",
    "cores": 2,
    "memory-gib": 4.0,
    "hypervisor": True,
    "kernel": "6.7",
    "huge-pages": "madvise",
    "python": "3.11",
    "numpy": "2.0",
    "whimbrel": "0.1.0",
    "qemu": "QEMU 7.2",
}
FAST = Figure(
    name="bulk",
    unit="MiB/s",
    ours=[900.0, 1000.0, 1200.0],
    theirs=[500.0, 400.0, 450.0],
    target=Target("ratio", least=2),
    where={"quantity": "speed"},
)
SLOW = Figure(
    name="downtime", unit="ms", ours=[20.0], theirs=[5.0], more_is_better=False, target=Target("ours", most=10)
)


def kept(*figures):
    measured = keeping.Measured(
        about="Something.",
        command='make bench ARGS="bulk --runs 3"',
        date="2026-01-02T03:04:05+00:00",
        runs=3,
        seconds=1,
        machine=MACHINE,
        figures=list(figures),
    )
    return {"bulk": measured}


def test_a_ratio_is_our_median_by_theirs():
    assert FAST.our_median == 1000
    assert FAST.their_median == 450
    assert FAST.ratio == pytest.approx(1000 / 450)
    assert FAST.met is True
    assert SLOW.met is False


def test_a_target_says_what_it_wants():
    assert str(Target("ratio", least=4)) == "≥ 4 x"
    assert str(Target("ours", most=0.5)) == "≤ 0.5"
    assert Target("ours", most=0.5).met(0.5)
    assert not Target("ours", most=0.5).met(0.51)


def test_nothing_measured_meets_nothing_and_misses_nothing():
    figure = Figure(name="bulk", unit="MiB/s", ours=[1.0], theirs_error="no QEMU", target=Target("ratio", least=1))
    assert figure.met is None
    assert cells(figure) == ("bulk", "1.00 MiB/s", "QEMU: not measured", "", "≥ 1 x", "")
    assert errors([figure, figure]) == ["no QEMU"]


def test_a_row_has_medians_and_the_spread():
    assert cells(FAST) == (
        "bulk",
        "1,000 MiB/s (900 to 1,200)",
        "QEMU: 450 MiB/s (400 to 500)",
        "2.22 x",
        "≥ 2 x",
        "met",
    )
    assert cells(SLOW)[-1] == "missed"


def test_what_did_not_converge_is_told():
    figure = Figure(name="live", unit="ms", ours=[7.0], ours_stuck=1, theirs_stuck=2)
    assert cells(figure)[1:3] == ("7.00 ms; did not converge in 1 run", "QEMU: did not converge in 2 runs")


def test_a_run_that_failed_is_made_once_more_and_told():
    samples, outcomes = Samples(), [RunFailed("the link broke"), None, None]

    def take():
        if (outcome := outcomes.pop(0)) is not None:
            raise outcome

    samples.take(take)
    samples.take(take)
    assert (len(samples.runs), samples.failed, samples.error) == (2, 1, "")
    figure = Figure(name="live", unit="ms", ours=[7.0], ours_failed=samples.failed)
    assert cells(figure)[1] == "7.00 ms; failed in 1 run"


@pytest.mark.parametrize(
    ("value", "text"), [(0.126, "0.13"), (3.0, "3.00"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1,234")]
)
def test_a_number_has_the_digits_that_mean_something(value, text):
    assert number(value) == text


def test_results_come_back_as_they_were_kept(tmp_path):
    file = tmp_path / "folder" / "results.json"
    keeping.write(kept(FAST, SLOW), file)
    assert keeping.read(file) == kept(FAST, SLOW)
    assert keeping.read(file)["bulk"].figure(quantity="speed") == FAST


def test_a_part_is_replaced_and_the_others_stay(tmp_path):
    file = tmp_path / "results.json"
    keeping.write({"zero": kept(FAST)["bulk"]}, file)
    keeping.write(kept(FAST), file)
    keeping.write(kept(SLOW), file)
    found = keeping.read(file)
    assert list(found["bulk"].figures) == [SLOW]
    assert list(found["zero"].figures) == [FAST]


def test_results_of_another_format_are_refused(tmp_path):
    file = tmp_path / "results.json"
    file.write_text('{"format": 0, "parts": {}}')
    with pytest.raises(SystemExit, match="format 0"):
        keeping.read(file)


PAGE = """# Page

<!-- figures: {} -->
old
<!-- end -->

after
"""


@pytest.mark.parametrize(
    ("block", "has"),
    [
        ("bulk", "| bulk | 1,000 MiB/s (900 to 1,200) | QEMU: 450 MiB/s (400 to 500) | 2.22 x | ≥ 2 x | met |"),
        ("verdict", "1 of 2 promises were kept in these runs."),
        ("better", "* downtime: whimbrel 20.0, QEMU 5.00 ms (4.00 x)"),
        ("machine", "* `bulk`: 2 cores of Abacus, 4.0 GiB, a virtual machine; Linux 6.7, huge pages: madvise"),
        ("zero", "*Not measured yet.*"),
    ],
)
def test_a_block_is_written_anew_and_the_rest_stays(block, has):
    page = report.rewritten(PAGE.format(block), kept(FAST, SLOW))
    assert has in page
    assert "old" not in page
    assert page.startswith("# Page\n")
    assert page.endswith("<!-- end -->\n\nafter\n")
    assert report.rewritten(page, kept(FAST, SLOW)) == page


def test_what_qemu_does_worse_is_not_among_what_it_does_better():
    assert "bulk" not in report.better(kept(FAST, SLOW))
    assert report.better(kept(FAST)) == "In none of the figures on this page."


def test_a_block_of_no_part_is_refused():
    with pytest.raises(SystemExit, match="no part 'odd'"):
        report.rewritten(PAGE.format("odd"), {})


def test_a_stale_page_is_told_and_left_alone(tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE.format("bulk"))
    keeping.write(kept(FAST), results)
    assert report.main(["--check"], page, results) == 1
    assert "page.md is stale: run `make plots`" in capsys.readouterr().err
    assert page.read_text() == PAGE.format("bulk")
    assert report.main([], page, results) == 0
    assert report.main(["--check"], page, results) == 0


def test_the_page_is_current(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_every_part_is_on_the_page():
    shown = set(report.BLOCK.findall(report.PAGE.read_text()))
    assert {name for _, name, _ in shown} == {*report.BLOCKS, *report.PARTS}
