from __future__ import annotations

import functools
import io

import msgspec
import pytest
import synthetic_job
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from esperd.cli.job_view import DECISIONS_KEPT, begin, fold, metric_name_of
from esperd.cli.lines import describe
from esperd.cli.picture import alpha_bar, draw, sparkline
from esperd.messages.growth import Stage
from esperd.messages.jobs import JobError, JobState
from esperd.messages.policy import Arm, Decision
from esperd.messages.telemetry import (
    CheckpointSaved,
    DecisionMade,
    ExportFailed,
    JobStateChanged,
    NetworkCompiled,
    NetworkNotCompiled,
    StageChanged,
)

EVENTS = synthetic_job.events()


def view_after(events=EVENTS):
    return functools.reduce(fold, events, begin(synthetic_job.info()))


def until(kind, **fields):
    """Events up to and with the first one of this kind and content."""
    for index, event in enumerate(EVENTS):
        if isinstance(event.body, kind) and all(getattr(event.body, name) == value for name, value in fields.items()):
            return EVENTS[: index + 1]
    raise AssertionError(f"no {kind.__name__} with {fields}")


def drawn(view, width=100):
    stream = io.StringIO()
    Console(file=stream, width=width).print(draw(view))
    return stream.getvalue()


def test_nothing_is_known_of_a_job_before_its_first_event():
    view = begin(synthetic_job.info())
    assert (view.epoch, view.elapsed_s, view.seeds, view.is_over) == (None, None, {}, False)
    assert "no epoch yet" in drawn(view)


def test_a_finished_job_shows_its_last_figures():
    view = view_after()
    assert view.state is JobState.SUCCEEDED
    assert view.is_over
    assert view.epoch.phase == "control"
    assert view.kernels == {"disk": 3}
    assert view.checkpoints == 4
    assert view.policy_unavailable == 1
    assert set(view.audits) == {"grown", "control"}
    assert view.elapsed_s == EVENTS[-1].at - EVENTS[3].at


def test_gate_losses_start_anew_with_the_control():
    growth = view_after(until(StageChanged, after=Stage.FOSSILIZED))
    assert len(growth.gate_losses) == 13
    assert len(view_after().gate_losses) == synthetic_job.EPOCHS + 5


def test_a_copy_that_could_not_be_written_is_shown_with_what_to_do():
    failed = ExportFailed(directory="/full/model", reason="[Errno 28] No space left on device")
    (event,) = synthetic_job.numbered([failed])
    told = f"/full/model could not be written: [Errno 28] No space left on device; `esper export {event.job}` writes"
    assert told in describe(event)
    shown = " ".join(drawn(fold(view_after(), event), width=250).replace("│", " ").split())
    assert told in shown


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (NetworkCompiled(epoch=3, structure="host", graphs=1, seconds=9.87), "compiled   host: 1 graph in 9.9 s"),
        (NetworkCompiled(epoch=3, structure="a#1 whole", graphs=2, seconds=30.0), "compiled   a#1 whole: 2 graphs in 30.0 s"),
        (
            NetworkNotCompiled(epoch=3, structure="host", reason="it peeks"),
            "compiled   not host, whose training passes run eager: it peeks",
        ),
    ],
)
def test_what_was_compiled_and_what_was_not_is_one_line(body, line):
    (event,) = synthetic_job.numbered([body])
    assert describe(event) == line


def test_a_stage_change_shows_before_the_epoch_ends():
    view = view_after(until(StageChanged, after=Stage.CULLED))
    assert view.seeds["features.7#1"].stage is Stage.CULLED
    assert view.seeds["features.7#1"].alpha == 0.0
    assert view.live_seeds == 0


def test_contributions_show_before_the_epoch_ends():
    measured = next(event for event in EVENTS if type(event.body).__name__ == "ContributionMeasured")
    view = view_after(EVENTS[: measured.sequence])
    assert view.seeds[measured.body.seed].contribution == measured.body.contribution


def test_a_wait_for_nothing_is_no_decision_worth_showing_and_a_repeated_refusal_is_shown_once():
    arm = Arm(slot="s", blueprint="b")
    waits = [
        DecisionMade(epoch=epoch, decision=Decision(action="wait", reason=f"no {epoch}", arm=wanted), applied=True)
        for epoch, wanted in enumerate([None, arm, arm, None, arm])
    ]
    view = view_after(synthetic_job.numbered(waits))
    assert [made.decision.reason for made in view.decisions] == ["no 4"]


def test_only_the_last_decisions_are_kept():
    assert len(view_after().decisions) == DECISIONS_KEPT
    assert view_after().decisions[-1].epoch == 18


def test_a_failed_job_shows_its_error():
    failed = JobStateChanged(
        state=JobState.FAILED, attempt=1, error=JobError(code="training_diverged", message="the loss became NaN")
    )
    view = fold(view_after(EVENTS[:20]), synthetic_job.numbered([failed])[0])
    assert view.is_over
    assert "the loss became NaN" in drawn(view)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, len(EVENTS)))
def test_watching_from_any_point_draws_a_picture_within_100_columns(cut):
    picture = drawn(view_after(EVENTS[:cut]))
    assert max(len(line) for line in picture.splitlines()) <= 100


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_picture_fits_other_terminals(width):
    assert max(len(line) for line in drawn(view_after(), width).splitlines()) <= min(width, 100)


def test_the_picture_shows_seeds_with_stage_alpha_and_contribution_and_why_it_was_decided():
    picture = drawn(view_after(until(StageChanged, after=Stage.CULLED)))
    assert "features.3#1" in picture
    assert "● fossilized" in picture
    assert "██████████ 1.00" in picture
    assert "+0.0420 [+0.0320, +0.0520]" in picture
    assert "cull features.7#1" in picture
    assert "growth" in picture


@pytest.mark.parametrize(
    ("loss", "metric", "name"),
    [
        ("cross_entropy", None, "accuracy"),
        ("next_token", None, "token_accuracy"),
        ("mse", None, None),
        ("mse", "m:f", "m:f"),
        ("cross_entropy", "m:f", "m:f"),
    ],
)
def test_the_metric_is_that_of_the_loss_unless_the_job_names_one(loss, metric, name):
    assert metric_name_of(msgspec.structs.replace(synthetic_job.JOB, loss=loss, metric=metric)) == name


def test_a_sparkline_runs_from_lowest_to_highest_and_averages_what_does_not_fit():
    assert sparkline((0.0, 7.0)) == "▁█"
    assert sparkline((1.0, 1.0)) == "▁▁"
    assert sparkline(()) == ""
    assert len(sparkline(tuple(float(number) for number in range(1000)), width=40)) == 40


def test_an_alpha_bar_is_as_full_as_alpha():
    assert alpha_bar(0.5, width=4) == "██░░ 0.50"


def test_every_notable_event_is_one_line_and_bookkeeping_is_none():
    lines = [describe(event, "accuracy") for event in EVENTS]
    told = [line for line in lines if line]
    assert all("\n" not in line for line in told)
    assert [line is None for line in lines].count(True) == sum(
        isinstance(event.body, CheckpointSaved) or getattr(getattr(event.body, "verdict", None), "passed", False)
        for event in EVENTS
    )


@pytest.mark.parametrize(
    "line",
    [
        "decision   germinate conv_residual at features.3: never tried here; bonus 0.0213 above rent 0.0031",
        "decision   decline bottleneck at features.3: score 0.0009 <= rent 0.0124 & nothing better",
        "gate       G5 holds features.7#1 back: interval holds 0",
        "kernel     conv_residual for features.3#1 from disk, c0ffeec0ffee",
        "policy     unavailable at epoch 16, training goes on without growing: no answer within 10 s",
        "audit      grown: loss 0.0831, accuracy 97.77 %, 12,234 parameters",
        "job        succeeded, attempt 1",
    ],
)
def test_lines_say_what_happened(line):
    assert line in [describe(event, "accuracy") for event in EVENTS]
