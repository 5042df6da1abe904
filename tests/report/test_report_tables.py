from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console
from synthetic_job import REPORT

from esperd.report import numbers
from esperd.report.grid import Cell, Column, Grid
from esperd.report.tables import networks_grid, reasons_grid, refusals_grid, report_grids, seeds_grid
from esperd.report.verdict import Paid, judge


def with_comparison(**changes):
    return msgspec.structs.replace(REPORT, comparison=msgspec.structs.replace(REPORT.comparison, **changes))


def test_growth_paid_when_the_accuracy_interval_lies_above_zero():
    verdict = judge(REPORT)
    assert verdict.paid is Paid.YES
    assert str(verdict) == (
        "growth paid: +1.11 points of accuracy [+0.12, +2.23] (loss 0.0271 lower [0.0119, 0.0423]); "
        "price: +2,368 parameters (+24.0 %), +295 kFLOP per sample (+48.1 %)"
    )


def test_growth_did_not_pay_when_the_accuracy_interval_lies_below_zero():
    verdict = judge(
        with_comparison(metric=-0.02, metric_lower=-0.03, metric_upper=-0.01, loss=-0.01, loss_lower=-0.02, loss_upper=0.001)
    )
    assert str(verdict).startswith(
        "growth did not pay: -2.00 points of accuracy [-3.00, -1.00] (loss 0.0100 higher [-0.0010, 0.0200])"
    )


@pytest.mark.parametrize(("lower", "upper"), [(-0.01, 0.03), (0.0, 0.03), (-0.01, 0.0)])
def test_no_difference_is_shown_when_the_interval_holds_zero(lower, upper):
    assert judge(with_comparison(metric=0.01, metric_lower=lower, metric_upper=upper)).paid is Paid.UNDECIDED


@pytest.mark.parametrize("metric_name", [None, "mypkg:score"])
def test_the_loss_decides_where_no_metric_of_known_direction_was_measured(metric_name):
    report = msgspec.structs.replace(with_comparison(loss_lower=-0.1), metric_name=metric_name)
    verdict = judge(report)
    assert verdict.paid is Paid.UNDECIDED
    assert verdict.because == "loss 0.0271 lower [-0.1000, 0.0423]"


def test_without_a_control_the_verdict_says_what_would_add_one():
    report = msgspec.structs.replace(REPORT, control=None, comparison=None)
    assert str(judge(report)) == "not known: the job ran no control (control = true adds one)"


def test_a_control_that_was_not_compared_leaves_the_verdict_open():
    assert judge(msgspec.structs.replace(REPORT, comparison=None)).paid is Paid.UNKNOWN


def test_a_network_that_did_not_grow_has_no_price():
    report = msgspec.structs.replace(REPORT, grown=REPORT.control)
    assert judge(report).price == "none, the network did not grow"


def test_the_final_table_sets_control_beside_grown():
    lines = networks_grid(REPORT).plain().splitlines()
    assert lines[0] == "Networks"
    assert lines[1].split() == ["on", "the", "audit", "split", "host", "(control)", "grown", "difference"]
    assert lines[2].split() == ["accuracy", "96.66", "%", "97.77", "%", "+1.11", "[+0.12,", "+2.23]"]
    assert "parameters" in lines[4]
    assert "+24.0 %" in lines[4]


def test_differences_of_a_share_are_points_and_of_any_other_metric_its_own_units():
    for name, told in (("accuracy", "+1.11 [+0.12, +2.23]"), ("token_accuracy", "+1.11 [+0.12, +2.23]"), ("m:f", "+0.0111 [")):
        assert told in networks_grid(msgspec.structs.replace(REPORT, metric_name=name)).plain()


def test_without_a_control_the_final_table_shows_the_grown_network_alone():
    text = networks_grid(msgspec.structs.replace(REPORT, control=None, comparison=None)).plain()
    assert "control" not in text
    assert "97.77 %" in text


def test_every_seed_is_listed_with_contribution_interval_and_reason():
    text = seeds_grid(REPORT).plain()
    assert "+0.0412 [+0.0310, +0.0514]" in text
    assert "culled" in text
    assert "not measured" in text
    assert "the budget ended in blending" in reasons_grid(REPORT).plain()


def test_every_refused_arm_is_listed_with_who_refused_it():
    text = refusals_grid(REPORT).plain()
    assert "policy" in text
    assert "score 0.0009 <= rent 0.0124" in text


def test_a_report_without_seeds_says_so():
    report = msgspec.structs.replace(REPORT, seeds=(), refused=())
    assert seeds_grid(report).plain() == "Seeds\n  no seed was germinated"


def test_plain_tables_align_and_carry_no_escape_codes_or_trailing_spaces():
    for grid in report_grids(REPORT):
        text = grid.plain()
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.splitlines())


def test_on_a_terminal_the_same_cells_are_shown_within_100_columns():
    for grid in report_grids(REPORT):
        stream = io.StringIO()
        Console(file=stream, width=100, force_terminal=True, color_system="truecolor").print(grid.rich())
        assert "[" in stream.getvalue()
    assert "features.3#1" in stream_of(seeds_grid(REPORT))
    assert "no seed" in stream_of(seeds_grid(msgspec.structs.replace(REPORT, seeds=())))


def stream_of(grid):
    stream = io.StringIO()
    Console(file=stream, width=100).print(grid.rich())
    return stream.getvalue()


def test_markup_in_a_cell_is_shown_as_text():
    grid = Grid("t", [Column("a")], [("[red]not markup[/red]",), (Cell("[b]x[/b]", "bold"),)])
    assert "[red]not markup[/red]" in stream_of(grid)
    assert "[b]x[/b]" in stream_of(grid)


def test_a_wide_cell_is_wrapped_under_itself():
    grid = Grid("", [Column("a"), Column("b", widest=9)], [("x", "one two three")])
    assert grid.plain().splitlines() == ["a  b", "x  one two", "   three"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.scaled(0), "0"),
        (numbers.size(754), "754 B"),
        (numbers.scaled(1.5), "1.50"),
        (numbers.scaled(999), "999"),
        (numbers.scaled(999.6), "1.00 k"),
        (numbers.flops(1234567), "1.23 MFLOP"),
        (numbers.flops(-41472), "-41.5 kFLOP"),
        (numbers.flops(None), numbers.UNKNOWN),
        (numbers.size(2100), "2.10 kB"),
        (numbers.count(12345), "12,345"),
        (numbers.count(None), numbers.UNKNOWN),
        (numbers.duration(0.85), "850 ms"),
        (numbers.duration(12.34), "12.3 s"),
        (numbers.duration(59.97), "1 min 00 s"),
        (numbers.duration(7620), "2 h 07 min"),
        (numbers.duration(None), numbers.UNKNOWN),
        (numbers.metric(0.5, "accuracy"), "50.00 %"),
        (numbers.metric(0.5, "token_accuracy"), "50.00 %"),
        (numbers.metric(0.5, "f1"), "0.5000"),
        (numbers.metric(None, "accuracy"), numbers.UNKNOWN),
        (numbers.interval(0.1, None, None), "+0.1000"),
        (numbers.change(1, 0), numbers.UNKNOWN),
    ],
)
def test_numbers_are_written_for_people(shown, expected):
    assert shown == expected
