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
from esperd.messages.growth import SeedRecord, Stage
from esperd.messages.jobs import JobError, JobState
from esperd.messages.policy import Arm, Decision
from esperd.messages.telemetry import (
    CheckpointSaved,
    DecisionMade,
    EpochCompleted,
    ExportFailed,
    JobStateChanged,
    NetworkCompiled,
    NetworkNotCompiled,
    ProspectMeasured,
    StageChanged,
    TrialMeasured,
)

EVENTS = synthetic_job.events()
RICH_EVENTS = synthetic_job.numbered(synthetic_job.rich_bodies())


def view_after(events=EVENTS):
    return functools.reduce(fold, events, begin(synthetic_job.info()))


def until(kind, **fields):
    """Events up to and with the first one of this kind and content."""
    for index, event in enumerate(EVENTS):
        if isinstance(event.body, kind) and all(getattr(event.body, name) == value for name, value in fields.items()):
            return EVENTS[: index + 1]
    raise AssertionError(f"no {kind.__name__} with {fields}")


def bodies_until(epoch):
    """What was told until this epoch of growth ended."""
    events = until(EpochCompleted, phase="growth", epoch=epoch)
    return [event.body for event in events]


def screening():
    """What was told while three candidates were screened: until the end of their first epoch, and what follows it."""
    candidates = tuple(
        SeedRecord(
            seed=each.seed,
            slot=each.slot,
            blueprint=each.blueprint,
            stage=Stage.TRAINING,
            alpha=0.0,
            parameters=544,
            flops_per_sample=1_024.0,
            germinated_epoch=7,
            epochs_in_stage=0,
            screening="point 7",
        )
        for each in synthetic_job.SCREENED.candidates
    )
    *before, epoch = bodies_until(7)
    measured = [
        ProspectMeasured(epoch=8, seed=each.seed, prospect=each.prospect)
        for each in synthetic_job.SCREENED.candidates
        if each.prospect is not None
    ]
    out = [
        StageChanged(
            epoch=8,
            seed=each.seed,
            slot=each.slot,
            blueprint=each.blueprint,
            before=Stage.TRAINING,
            after=Stage.CULLED,
            reason="screened out for features.7#3",
        )
        for each in synthetic_job.SCREENED.candidates[1:]
    ]
    return [*before, msgspec.structs.replace(epoch, seeds=epoch.seeds + candidates)], measured, [synthetic_job.SCREENED, *out]


def rows(picture):
    """The picture's lines, without frame and spacing."""
    return [" ".join(line.strip("│").split()) for line in picture.splitlines()]


def view_of(*bodies):
    return view_after(synthetic_job.numbered(bodies))


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


def test_a_screening_that_runs_is_shown_as_one_group_of_its_candidates():
    told, _, _ = screening()
    shown = rows(drawn(view_of(*told)))
    place = shown.index("screening ● 3 candidates")
    assert shown[place + 1 : place + 4] == [
        "├ features.7#3 conv_light not measured",
        "├ features.7#5 bottleneck not measured",
        "└ features.7#6 pointwise not measured",
    ]


def test_what_switching_candidates_on_would_bring_is_shown_before_the_screening_ends():
    told, measured, _ = screening()
    shown = rows(drawn(view_of(*told, *measured)))
    assert "├ features.7#3 conv_light if on +0.0122 [+0.0082, +0.0162]" in shown
    assert "├ features.7#5 bottleneck if on +0.0031 [-0.0009, +0.0071]" in shown
    assert "└ features.7#6 pointwise not measured" in shown


def test_after_a_screening_its_winner_is_a_seed_as_any_other_and_the_others_are_a_number():
    told, measured, end = screening()
    shown = rows(drawn(view_of(*told, *measured, *end)))
    assert "features.7#3 conv_light ● training ░░░░░░ 0.00 if on +0.0122 [+0.0082, +0.0162]" in shown
    assert "2 screened out" in shown
    assert not any("features.7#5" in row or "screening" in row for row in shown)


def test_a_trial_stands_below_the_contribution_and_a_prospect_in_place_of_one():
    trial = TrialMeasured(epoch=8, seed="features.3#1", trial=synthetic_job.trial(8, 0.0101, 0.004))
    prospect = ProspectMeasured(epoch=4, seed="features.3#1", prospect=synthetic_job.contribution(4, 0.031, 0.01))
    before = rows(drawn(view_of(*bodies_until(4), prospect)))
    assert any(row.endswith("if on +0.0310 [+0.0210, +0.0410]") for row in before)
    shown = rows(drawn(view_of(*bodies_until(8), prospect, trial)))
    place = next(number for number, row in enumerate(shown) if row.startswith("features.3#1"))
    assert shown[place].endswith("1.00 +0.0240 [+0.0140, +0.0340]")
    assert shown[place + 1] == "trial +0.0101 [+0.0061, +0.0141]"
    assert not any("if on" in row for row in shown)


def test_where_a_terminal_is_narrow_blueprints_give_way_to_names_and_numbers():
    told, measured, _ = screening()
    shown = rows(drawn(view_of(*told, *measured), width=80))
    assert "├ features.7#3 if on +0.0122 [+0.0082, +0.0162]" in shown
    assert "features.7#1 ● blending 0.33 +0.0013 [-0.0023, +0.0049]" in shown


def test_a_rollback_shows_what_went_wrong_and_what_is_done_about_it():
    view = view_of(*bodies_until(17), synthetic_job.ROLLED_BACK)
    shown = " ".join(rows(drawn(view)))
    assert (
        "rolled back: the training loss 5.31 stands above its limit of 0.412 <twice>; back from epoch 17 to 16, learning rate"
        " cut to 0.5 of its schedule"
    ) in shown
    again = fold(view, synthetic_job.numbered([msgspec.structs.replace(synthetic_job.ROLLED_BACK, trip=2)])[0])
    assert "rolled back: 2 times, the last time: the training loss" in " ".join(rows(drawn(again)))


def test_seeds_that_a_rollback_took_away_are_shown_as_culled():
    back = msgspec.structs.replace(synthetic_job.ROLLED_BACK, epoch=8, to_epoch=3, gone=("features.7#1", "never seen"))
    view = view_of(*bodies_until(8), back)
    assert (view.seeds["features.7#1"].stage, view.seeds["features.7#1"].alpha) == (Stage.CULLED, 0.0)
    assert view.seeds["features.3#1"].stage is Stage.BLENDING
    assert "never seen" not in view.seeds


def test_epochs_that_are_trained_again_count_once_in_the_curve():
    again = [
        msgspec.structs.replace(event.body, gate_loss=9.0)
        for event in EVENTS
        if isinstance(event.body, EpochCompleted) and event.body.phase == "growth" and event.body.epoch in (4, 5)
    ]
    before = view_of(*bodies_until(6)).gate_losses
    assert view_of(*bodies_until(6), *again).gate_losses == (*before[:3], 9.0, 9.0)


def test_a_wait_for_nothing_is_no_decision_worth_showing_and_a_repeated_refusal_is_shown_once():
    arm = Arm(slot="s", blueprint="b")
    waits = [
        DecisionMade(epoch=epoch, decision=Decision(action="wait", reason=f"no {epoch}", arm=wanted), applied=True)
        for epoch, wanted in enumerate([None, arm, arm, None, arm])
    ]
    view = view_after(synthetic_job.numbered(waits))
    assert [made.decision.reason for made in view.decisions] == ["no 4"]


def test_each_proposal_is_shown_once_and_what_a_person_says_always():
    arm = Arm(slot="features.3", blueprint="conv_light")
    grow = Decision(action="wait", proposes="germinate", arm=arm, reason="awaits approval: never tried")
    cull = Decision(action="wait", proposes="cull", seed="features.7#1", reason="awaits approval: it costs too much")
    waits = Decision(action="wait", reason="ada said: not now", by="ada")
    made = [DecisionMade(epoch=1, decision=decision, applied=True) for decision in (grow, cull, grow, cull, waits)]
    view = view_after(synthetic_job.numbered(made))
    assert [each.decision for each in view.decisions] == [grow, cull, waits]
    assert describe(synthetic_job.numbered(made)[1]) == (
        "decision   propose to cull features.7#1: awaits approval: it costs too much"
    )
    assert describe(synthetic_job.numbered(made)[4]) == "decision   wait: ada said: not now"


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
    picture = drawn(view_after(RICH_EVENTS[:cut]))
    assert max(len(line) for line in picture.splitlines()) <= 100


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_picture_fits_other_terminals(width):
    told, measured, end = screening()
    for view in (view_after(RICH_EVENTS), view_of(*told, *measured), view_of(*told, *measured, *end)):
        assert max(len(line) for line in drawn(view, width).splitlines()) <= min(width, 100)


def test_the_picture_shows_seeds_with_stage_alpha_and_contribution_and_why_it_was_decided():
    picture = drawn(view_after(until(StageChanged, after=Stage.CULLED)))
    assert "features.3#1" in picture
    assert "● fossilized" in picture
    assert "██████ 1.00" in picture
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
        "trial      features.3#1 brought +0.0108 [+0.0047, +0.0169] over its twin without it",
        (
            "screening  features.7#3 goes on of 3 candidates: features.7#3 conv_light +0.0122 [+0.0082, +0.0162];"
            " features.7#5 bottleneck +0.0031 [-0.0009, +0.0071]; features.7#6 pointwise not measured"
        ),
        (
            "rolledback the training loss 5.31 stands above its limit of 0.412 <twice>; back from epoch 17 to 16,"
            " learning rate cut to 0.5 of its schedule"
        ),
    ],
)
def test_lines_say_what_happened(line):
    assert line in [describe(event, "accuracy") for event in RICH_EVENTS]


def test_a_prospect_is_told_as_what_would_be():
    (event,) = synthetic_job.numbered([screening()[1][0]])
    assert describe(event) == "measured   features.7#3 switched on would bring +0.0122 [+0.0082, +0.0162]"


def test_shares_are_told_in_percent():
    audit = next(event for event in EVENTS if type(event.body).__name__ == "AuditMeasured")
    assert "token_accuracy 97.77 %" in describe(audit, "token_accuracy")
    assert "m:f 0.9777" in describe(audit, "m:f")
