from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console
from synthetic_job import ATTRIBUTION, REPORT, RICH_REPORT, SAMPLED

from esperd.messages.growth import Interaction
from esperd.messages.reports import Report
from esperd.report import numbers
from esperd.report.attribution import MOST_INTERACTIONS, attribution_grid, attribution_grids, interactions_grid, missing_grid
from esperd.report.grid import Cell, Column, Grid
from esperd.report.tables import (
    evidence_grid,
    networks_grid,
    reasons_grid,
    refusals_grid,
    report_grids,
    rollbacks_grid,
    seeds_grid,
)
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


def row_of(grid, seed):
    (line,) = [line for line in grid.plain().splitlines() if line.startswith(f"  {seed}  ")]
    return line.split()


def test_every_seed_is_listed_with_its_operator_its_end_and_why():
    lines = seeds_grid(RICH_REPORT).plain().splitlines()
    assert [line.split()[0] for line in lines[2:]] == [seed.seed for seed in RICH_REPORT.seeds]
    assert row_of(seeds_grid(RICH_REPORT), "features.7#4")[1:5] == ["norm", "multiply", "0.5", "fossilized"]
    assert row_of(seeds_grid(RICH_REPORT), "features.7#1")[1:5] == ["depthwise", "add", numbers.UNKNOWN, "culled"]
    assert "the budget ended in blending" in reasons_grid(REPORT).plain()


def test_what_each_seed_brought_stands_beside_what_a_trial_found_with_the_limits_of_both():
    text = " ".join(evidence_grid(RICH_REPORT).plain().split())
    assert "features.3#1 +0.0412 [+0.0310, +0.0514] +0.0108 [+0.0047, +0.0169]" in text
    assert "features.7#1 -0.0005 [-0.0041, +0.0031] not measured" in text
    assert "features.7#2" not in text, "nothing was measured of it"
    assert "95% intervals: positive is better" in text
    assert "A contribution compares with the network without the seed: it overstates" in text
    assert "A trial does not" in text


def test_where_no_trial_was_made_none_is_spoken_of():
    assert "trial" not in evidence_grid(REPORT).plain().lower()
    unmeasured = msgspec.structs.replace(REPORT, seeds=REPORT.seeds[2:])
    assert evidence_grid(unmeasured).plain() == "What each seed brought\n  of no seed this was measured"


def test_kept_seeds_are_listed_left_out_alone_and_over_every_order():
    text = " ".join(attribution_grid(ATTRIBUTION).plain().split())
    assert "features.7#4 -0.0049 [-0.0159, +0.0061] +0.0349 [+0.0159, +0.0539] +0.0150" in text
    assert "±" not in text
    assert "359 samples, 95% intervals" in text
    assert "All on: 0.0912; all off: 0.2431" in text
    assert "these overstate what the seeds brought" in text
    assert "its 1.30 GFLOP are charged to no training" in text


def test_of_an_attribution_that_was_cut_short_it_is_said_what_is_missing_and_why():
    text = " ".join(attribution_grid(SAMPLED).plain().split())
    assert "+0.0588 ± 0.0042" in text
    assert "+0.0781, error unknown" in text
    assert "features.7#4 -0.0049 [-0.0159, +0.0061] not measured not measured" in text
    assert "over 4 orders of switching them on, ± the standard error" in text
    missing = [list(row) for row in missing_grid(SAMPLED).rows]
    assert missing == [
        [
            "the FLOPs cap",
            "features.7#4 alone; features.3#1 with features.7#4; 30 of 32 pairs of orders for Shapley values",
        ],
        ["a loss is not finite", "features.7#3 with features.7#4"],
    ]


def test_interactions_are_listed_the_strongest_first_and_no_more_than_can_be_read():
    assert [row[2] for row in interactions_grid(ATTRIBUTION).rows] == ["-0.0467", "+0.0212", "-0.0104"]
    many = tuple(Interaction(first=f"s#{number}", second="s#0", value=(-1) ** number * number / 100) for number in range(1, 21))
    grid = interactions_grid(msgspec.structs.replace(ATTRIBUTION, interactions=many))
    assert grid.title == f"Interactions, the {MOST_INTERACTIONS} strongest of 20"
    assert [row[2] for row in grid.rows][:2] == ["+0.2000", "-0.1900"]
    assert len(grid.rows) == MOST_INTERACTIONS


def test_without_an_attribution_it_is_said_why_unless_no_seed_was_kept():
    assert [grid.plain() for grid in attribution_grids(REPORT)] == [
        "Attribution\n  not made: growth.attribution_share is 0, or the report is of format 1"
    ]
    assert attribution_grids(msgspec.structs.replace(REPORT, seeds=REPORT.seeds[1:])) == ()


def test_rollbacks_are_listed_for_both_networks_with_reason_and_remedy():
    text = rollbacks_grid(RICH_REPORT).plain()
    grown, control = (" ".join(line.split()) for line in text.splitlines() if line.startswith(("  grown", "  control")))
    assert grown.startswith("grown 17 16 the training loss 5.31 stands")
    assert "learning rate cut" in grown
    assert control.startswith("control 3 2 a loss is not finite")
    assert rollbacks_grid(RICH_REPORT) in report_grids(RICH_REPORT)
    assert "Rolled back" not in {grid.title for grid in report_grids(REPORT)}


def test_a_report_of_format_1_is_shown_with_what_it_does_not_say_unknown():
    old = msgspec.to_builtins(REPORT) | {"format": 1}
    for name in ("attribution", "rollbacks"):
        del old[name]
    for seed in old["seeds"]:
        del seed["operator"], seed["alpha"]
    report = msgspec.json.decode(msgspec.json.encode(old), type=Report)
    assert row_of(seeds_grid(report), "features.3#1")[2:4] == [numbers.UNKNOWN, numbers.UNKNOWN]
    assert "the report is of format 1, which does not say" in report_grids(report)[-1].plain()


def test_every_refused_arm_is_listed_with_who_refused_it():
    text = refusals_grid(REPORT).plain()
    assert "policy" in text
    assert "score 0.0009 <= rent 0.0124" in text


def test_a_policy_that_did_not_decide_is_told_beside_what_was_refused():
    assert "At 1 decision point the policy decided nothing" in refusals_grid(REPORT).plain()
    silent = msgspec.structs.replace(REPORT, refused=(), policy_unavailable=8)
    assert "At 8 decision points the policy decided nothing, because it failed or did not answer" in refusals_grid(silent).plain()
    assert "decided nothing" not in refusals_grid(msgspec.structs.replace(REPORT, policy_unavailable=0)).plain()


def test_a_report_without_seeds_says_so():
    report = msgspec.structs.replace(REPORT, seeds=(), refused=())
    assert seeds_grid(report).plain() == "Seeds\n  no seed was germinated"


def test_plain_tables_align_and_carry_no_escape_codes_or_trailing_spaces():
    for grid in report_grids(RICH_REPORT):
        text = grid.plain()
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.splitlines())
        assert max(len(line) for line in text.splitlines()) <= 100


def test_on_a_terminal_the_same_cells_are_shown_within_100_columns():
    for grid in report_grids(RICH_REPORT):
        stream = io.StringIO()
        Console(file=stream, width=100, force_terminal=True, color_system="truecolor").print(grid.rich())
        assert "[" in stream.getvalue()
    assert "features.3#1" in stream_of(seeds_grid(REPORT))
    assert "no seed" in stream_of(seeds_grid(msgspec.structs.replace(REPORT, seeds=())))


def test_a_note_stands_under_its_table_and_nowhere_without_rows():
    note = "what these numbers mean " * 8
    grid = Grid("t", [Column("a")], [("x",)], note=note)
    assert grid.plain().splitlines()[3:] == [
        "  what these numbers mean what these numbers mean what these numbers mean what these numbers",
        "  mean what these numbers mean what these numbers mean what these numbers mean what these",
        "  numbers mean",
    ]
    assert "what these numbers mean" in stream_of(grid)
    bare = Grid("t", [Column("a")], empty="none", note=note)
    assert bare.plain() == "t\n  none"
    assert "numbers" not in stream_of(bare)


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
