"""A job from its first line to its report, in one process: what it leaves, how it is stopped and resumed, what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
import types

import desks
import msgspec
import pytest
import safetensors.torch
import torch
from torch.nn import functional

from esperd.declarations import Blueprint
from esperd.errors import (
    ActorUnavailable,
    AskTimeout,
    CheckpointRejected,
    EsperError,
    HandlerFailed,
    ImportFailed,
    InvalidData,
    InvalidJob,
    InvalidModel,
    TrainingDiverged,
    UnknownName,
)
from esperd.growth.export import load
from esperd.hookspecs import hookimpl
from esperd.messages.growth import Stage
from esperd.messages.telemetry import (
    AuditMeasured,
    CheckpointSaved,
    DecisionMade,
    EpochCompleted,
    Event,
    ExportFailed,
    KernelLoaded,
    PolicyUnavailable,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrainingStarted,
    TrialMeasured,
)
from esperd.plugins import load_plugins
from esperd.policy.state import decode_state
from esperd.report.html import render_html
from esperd.report.verdict import judge
from esperd.store.blobs import Blobs
from esperd.trainer import checkpoint
from esperd.trainer.attribution import attribution_of
from esperd.trainer.checkpoint import SessionState, decode
from esperd.trainer.data import epoch_order
from esperd.trainer.kernel_source import RETRY_AFTER_S
from esperd.trainer.passes import Stopped
from esperd.trainer.session import Session, job_digest

GROWING = desks.growing_job()
ALWAYS_CHECKPOINTED = desks.growing_job(checkpoint_every_s=0.0)
KEEPING = desks.growing_job(
    control=True,
    budget={"epochs": 12},
    optimizer={"learning_rate": 2e-2},
    growth={
        "blueprints": ["conv_light"],
        "incubation_epochs": 1,
        "blending_epochs": 1,
        "shadowing_epochs": 1,
        "embargo_epochs": 0,
        "attribution_share": 0.5,
    },
    gates={"confidence": 0.6},
    policy={"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.0, "rent_flops": 0.0},
)
"""Keeps four seeds, with as many FLOPs for attributing as all sixteen coalitions of them cost."""
CONTROLLED = desks.growing_job(control=True, budget={"epochs": 6}, growth={"blueprints": ["squeeze_excite"]})


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return Blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def grown(blobs):
    """The job ``GROWING``, undisturbed."""
    return desks.train(GROWING, blobs)


@pytest.fixture(scope="module")
def begun(blobs):
    """A checkpoint of the job ``GROWING``, from the middle of its first epoch."""
    desk = desks.train_until(GROWING, blobs, lambda desk: "drain" if desk.steps_in_epoch == 1 else None)
    return desk.checkpoints[-1][0]


@pytest.fixture(scope="module")
def kept(blobs):
    """The job ``KEEPING``, undisturbed."""
    return desks.train(KEEPING, blobs)


@pytest.fixture(scope="module")
def controlled(blobs):
    """A job with a control, undisturbed."""
    return desks.train(CONTROLLED, blobs)


def same_end(one, other):
    """Whether two runs of one job ended alike: weights, structure and history to the byte, report but for durations."""
    assert one.files["model.safetensors"] == other.files["model.safetensors"]
    assert one.files["growth.json"] == other.files["growth.json"]
    assert one.comparable_report == other.comparable_report
    return True


def without_seconds(events):
    return [msgspec.structs.replace(event, seconds=0.0) for event in events]


# --- what a job leaves -------------------------------------------------------------------------------------------------------


def test_a_job_leaves_its_model_its_structure_its_report_and_a_card(grown):
    names = [artifact.name for artifact in grown.outcome.artifacts]
    assert names == ["model.safetensors", "growth.json", "report.json", "README.md"]
    assert grown.outcome.epoch == 9
    assert grown.report.grown.epochs == 9.0
    assert grown.report.metric_name == "accuracy"
    assert grown.report.control is None
    assert grown.report.resumed == 0


def test_a_job_grows_seeds_and_culls_those_that_do_not_pay(grown):
    ends = {seed.stage for seed in grown.report.seeds}
    assert ends == {Stage.FOSSILIZED, Stage.CULLED}
    kept = [seed for seed in grown.report.seeds if seed.stage is Stage.FOSSILIZED]
    added = sum(seed.parameters for seed in kept)
    started = grown.desk.of(TrainingStarted)[0]
    assert grown.report.grown.parameters == started.host_parameters + added
    assert all(seed.contribution.lower > 0 for seed in kept)


def test_the_structure_lists_what_was_kept_and_the_history_everything(grown):
    structure = json.loads(grown.files["growth.json"])
    kept = [seed.seed for seed in grown.report.seeds if seed.stage is Stage.FOSSILIZED]
    assert [seed["name"] for seed in structure["seeds"]] == kept
    assert [seed["seed"] for seed in structure["history"]] == [seed.seed for seed in grown.report.seeds]
    assert structure["manifest"]["job"] == "job-1"


def test_events_tell_the_job_in_order(grown):
    kinds = [type(event) for event in grown.desk.events]
    assert kinds[0] is TrainingStarted
    assert kinds[-1] is AuditMeasured
    assert [event.epoch for event in grown.desk.of(EpochCompleted)] == list(range(1, 10))
    epochs = [event.epoch for event in grown.desk.events if not isinstance(event, TrainingStarted | AuditMeasured)]
    assert epochs == sorted(epochs)


def test_every_seed_is_seen_to_move_from_stage_to_stage(grown):
    for name, moves in itertools.groupby(sorted(grown.desk.of(StageChanged), key=lambda event: event.seed), lambda e: e.seed):
        moves = list(moves)
        assert moves[0].before is Stage.DORMANT, name
        assert all(earlier.after is later.before for earlier, later in itertools.pairwise(moves)), name


def test_a_germinated_seed_says_which_kernel_it_runs_on(grown):
    loaded = {event.seed: event.manifest_id for event in grown.desk.of(KernelLoaded)}
    recorded = {seed.seed: seed.kernel for event in grown.desk.of(EpochCompleted) for seed in event.seeds}
    assert loaded == recorded


def test_training_seconds_leave_out_the_audit_pass(blobs):
    clock = itertools.count()
    session = Session(desks.growing_job(growth={"enabled": False}), desks.PLUGINS, desks.InProcessDesk(), blobs)
    run = session._run("growth", session.job.budget)
    run.clock = lambda: next(clock)
    run._started = run.clock()
    run.grower.epoch = 1
    _, metrics = run.audit()
    assert metrics.training_seconds == 1.0


def test_the_audit_split_is_read_once_for_each_network_after_everything_was_decided(blobs):
    desk = desks.InProcessDesk()
    session = Session(CONTROLLED, desks.PLUGINS, desk, blobs)
    reads = []

    class Watched:
        def __init__(self, split):
            self.split = split
            self.samples = split.samples

        def batch(self, indices):
            reads.append((len(desk.of(EpochCompleted)), len(indices)))
            return self.split.batch(indices)

    session.splits = dataclasses.replace(session.splits, audit=Watched(session.splits.audit))
    session.train()
    growth = [event for event in desk.of(EpochCompleted) if event.phase == "growth"]
    everything = len(desk.of(EpochCompleted))
    assert reads == [(len(growth), session.splits.audit.samples), (everything, session.splits.audit.samples)]


# --- what the kept seeds bring -----------------------------------------------------------------------------------------------


def when_growth_is_over(job):
    """A reason to stop: once the last epoch of growth is done."""
    return lambda desk: "drain" if len(desk.of(EpochCompleted)) == job.budget.epochs else None


def without_attribution(ended):
    """What a job left, but for the attribution and what names the job's own keys."""
    report, structure = ended.comparable_report, json.loads(ended.files["growth.json"])
    report.pop("attribution")
    structure["manifest"].pop("job_sha256")
    return report, structure, ended.files["model.safetensors"]


def test_the_report_says_what_the_kept_seeds_bring_alone_and_together(kept):
    found = kept.report.attribution
    standing = [seed.seed for seed in kept.report.seeds if seed.stage is Stage.FOSSILIZED]
    assert len(standing) == 4
    assert [seed.seed for seed in found.seeds] == standing
    assert (found.exact, found.coalitions, found.not_measured) == (True, 16, ())
    assert found.epoch == 12
    assert found.samples == kept.desk.of(TrainingStarted)[0].gate_samples
    assert sum(seed.shapley for seed in found.seeds) == pytest.approx(found.loss_all_off - found.loss_all_on, abs=1e-6)
    assert len(found.interactions) == 6
    last = [event for event in kept.desk.of(EpochCompleted) if event.phase == "growth"][-1]
    assert found.loss_all_on == pytest.approx(last.gate_loss, abs=1e-6)


def test_kept_seeds_say_how_they_enter_and_at_which_alpha(kept):
    told = {seed.stage: (seed.operator, seed.alpha) for seed in kept.report.seeds}
    assert told[Stage.FOSSILIZED] == ("add", 1.0)


def test_attribution_is_no_training_it_changes_nothing_but_the_report(kept, blobs):
    growth = msgspec.structs.replace(KEEPING.growth, attribution_share=0.0)
    without = desks.train(msgspec.structs.replace(KEEPING, growth=growth), blobs)
    assert without.report.attribution is None
    assert without_attribution(without) == without_attribution(kept)
    assert 0 < kept.report.attribution.flops <= 0.5 * kept.report.grown.training_flops


def test_attribution_leaves_weights_buffers_modes_optimizer_and_rng_streams_as_they_were(blobs):
    session = Session(KEEPING, desks.PLUGINS, desks.InProcessDesk(), blobs)
    run = session._run("growth", KEEPING.budget)
    run.train()
    run.grower.network.train()
    run.grower.network.host.stem.eval()

    def standing():
        state, tensors = run.state()
        whole = SessionState(
            format=checkpoint.FORMAT, job_digest=job_digest(KEEPING), data_fingerprint=None, run=state, finished=None
        )
        return checkpoint.encode(whole, tensors), [module.training for module in run.grower.network.modules()]

    before = standing()
    assert attribution_of(run) is not None
    assert standing() == before


def test_the_seconds_of_a_run_end_with_its_budget(blobs):
    ticks = itertools.count()
    job = desks.growing_job(budget={"epochs": 1}, growth={"enabled": False})
    session = Session(job, desks.PLUGINS, desks.InProcessDesk(), blobs, clock=lambda: float(next(ticks)))
    run = session._run("growth", job.budget)
    run.train()
    seconds = run.seconds
    assert next(ticks) > seconds > 0
    assert run.seconds == seconds


def test_attribution_goes_no_further_than_its_share_of_the_flops(blobs):
    growth = msgspec.structs.replace(KEEPING.growth, attribution_share=0.02)
    ended = desks.train(msgspec.structs.replace(KEEPING, growth=growth, control=False), blobs)
    found = ended.report.attribution
    assert found.flops <= 0.02 * ended.report.grown.training_flops
    assert found.coalitions < 16
    assert any("the FLOPs cap" in what for what in found.not_measured)


def test_nothing_is_attributed_where_no_seed_was_kept(controlled):
    assert all(seed.stage is not Stage.FOSSILIZED for seed in controlled.report.seeds)
    assert controlled.report.attribution is None


def test_a_job_stopped_while_its_loss_is_attributed_finds_the_same_later(kept, blobs):
    stopped = desks.train_until(KEEPING, blobs, when_growth_is_over(KEEPING))
    assert stopped.of(AuditMeasured) == []
    assert same_end(desks.train(KEEPING, blobs, resume_from=stopped.checkpoints[-1][0]), kept)


def test_a_job_stopped_in_its_control_keeps_what_was_attributed(kept, blobs):
    stopped = desks.train_until(KEEPING, blobs, desks.in_control)
    assert same_end(desks.train(KEEPING, blobs, resume_from=stopped.checkpoints[-1][0]), kept)


# --- the control -------------------------------------------------------------------------------------------------------------


def test_the_control_is_the_host_alone_for_the_same_flops_within_one_step(controlled):
    report, started = controlled.report, controlled.desk.of(TrainingStarted)[0]
    last = controlled.desk.of(EpochCompleted)[-1]
    whole_epochs = [event for event in controlled.desk.of(EpochCompleted) if event.phase == "control"][:2]
    epoch_flops = whole_epochs[1].training_flops - whole_epochs[0].training_flops
    gate_flops = started.host_flops_per_sample * started.gate_samples
    step_flops = (epoch_flops - gate_flops) / started.train_samples * CONTROLLED.batch_size
    assert last.phase == "control"
    assert report.control.parameters == started.host_parameters
    assert 0 <= report.control.training_flops - report.grown.training_flops <= step_flops


def test_growing_is_compared_with_the_control_sample_by_sample(controlled):
    comparison, report = controlled.report.comparison, controlled.report
    assert comparison.samples == controlled.desk.of(TrainingStarted)[0].audit_samples
    assert comparison.loss == pytest.approx(report.control.loss - report.grown.loss, abs=1e-6)
    assert comparison.metric == pytest.approx(report.grown.metric - report.control.metric, abs=1e-6)
    assert comparison.loss_lower < comparison.loss < comparison.loss_upper


def test_both_phases_start_from_the_same_weights(controlled):
    growth, control = (
        next(event for event in controlled.desk.of(EpochCompleted) if event.phase == phase) for phase in ("growth", "control")
    )
    # The first epoch of each trains the host alone; only the learning rate follows another budget.
    assert control.train_loss == pytest.approx(growth.train_loss, rel=0.05)


# --- stopped and resumed -----------------------------------------------------------------------------------------------------

STOPS = {
    "before the first step": lambda _desk: "pause",
    "while a seed incubates": desks.in_stage(Stage.TRAINING),
    "while a seed is blended in": desks.in_stage(Stage.BLENDING, step=3),
    "while a seed is on probation": desks.in_stage(Stage.PROBATIONARY),
    "while a slot is at rest": desks.at_rest,
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
def test_a_job_stopped_in_mid_epoch_ends_bit_identical(grown, blobs, stop):
    stopped = desks.train_until(GROWING, blobs, stop)
    resumed = desks.train(GROWING, blobs, resume_from=stopped.checkpoints[-1][0], resumed=1)
    assert same_end(resumed, grown)
    assert resumed.report.resumed == 1


def test_a_job_stopped_again_and_again_ends_bit_identical(grown, blobs):
    checkpoint = None
    for _ in range(6):
        stopped = desks.train_until(GROWING, blobs, desks.after_steps(6), resume_from=checkpoint)
        checkpoint = stopped.checkpoints[-1][0]
    assert same_end(desks.train(GROWING, blobs, resume_from=checkpoint), grown)


def test_pythons_rng_stream_and_unsaved_buffers_are_part_of_a_checkpoint(blobs):
    job = desks.growing_job(host="desks:Restless", host_options={}, growth={"enabled": False}, budget={"epochs": 3})
    whole = desks.train(job, blobs)
    stopped = desks.train_until(job, blobs, desks.after_steps(7))
    resumed = desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0], resumed=1)
    assert same_end(resumed, whole)


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing runs after it."""


def test_a_killed_job_replays_from_an_older_checkpoint_and_ends_bit_identical(blobs):
    def kill(desk):
        if desks.in_stage(Stage.PROBATIONARY)(desk):
            raise Killed

    undisturbed = desks.train(ALWAYS_CHECKPOINTED, blobs)
    killed = desks.InProcessDesk(stop=kill)
    with pytest.raises(Killed):
        Session(ALWAYS_CHECKPOINTED, desks.PLUGINS, killed, blobs).train()
    sha256, epoch = killed.checkpoints[-3]
    resumed = desks.train(ALWAYS_CHECKPOINTED, blobs, resume_from=sha256)
    assert same_end(resumed, undisturbed)
    replayed = [event for event in undisturbed.desk.of(EpochCompleted) if event.epoch > epoch]
    assert without_seconds(resumed.desk.of(EpochCompleted)) == without_seconds(replayed)
    decided = [event for event in undisturbed.desk.of(DecisionMade) if event.epoch > epoch]
    assert resumed.desk.of(DecisionMade) == decided


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "sgd", "learning_rate": 0.1}},
        {"growth": {**msgspec.to_builtins(GROWING.growth), "incubation": "joint"}},
    ],
    ids=["sgd", "joint incubation"],
)
def test_resuming_is_exact_for_other_ways_to_train(blobs, changes):
    job = desks.growing_job(budget={"epochs": 8}, **changes)
    undisturbed = desks.train(job, blobs)
    stopped = desks.train_until(job, blobs, desks.in_stage(Stage.SHADOWING))
    assert same_end(desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0]), undisturbed)


def test_a_job_stopped_in_its_control_ends_bit_identical(controlled, blobs):
    stopped = desks.train_until(CONTROLLED, blobs, desks.in_control)
    resumed = desks.train(CONTROLLED, blobs, resume_from=stopped.checkpoints[-1][0])
    assert same_end(resumed, controlled)
    assert {event.phase for event in resumed.desk.of(EpochCompleted)} == {"control"}
    assert [event.network for event in resumed.desk.of(AuditMeasured)] == ["control"]


def test_while_the_control_trains_a_job_stands_at_the_last_epoch_of_its_growth(controlled, blobs):
    stopped = desks.train_until(CONTROLLED, blobs, desks.in_control)
    assert {epoch for _, epoch in stopped.checkpoints} == {6}
    assert {saved.epoch for saved in stopped.of(CheckpointSaved)} == {6}
    assert stopped.of(EpochCompleted)[-1].epoch < controlled.desk.of(EpochCompleted)[-1].epoch
    resumed = desks.train(CONTROLLED, blobs, resume_from=stopped.checkpoints[-1][0])
    assert resumed.desk.of(TrainingStarted)[0].epoch == 6


def test_a_job_stopped_when_its_budget_is_spent_still_gets_its_last_decision_point(blobs):
    job = desks.growing_job(budget={"flops": 4e6}, checkpoint_every_s=1e9)
    undisturbed = desks.train(job, blobs)
    last = undisturbed.desk.of(EpochCompleted)[-1]
    steps = round(undisturbed.report.grown.epochs * -(-undisturbed.desk.of(TrainingStarted)[0].train_samples // job.batch_size))
    stopped = desks.train_until(job, blobs, desks.after_steps(steps))
    resumed = desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0])
    assert same_end(resumed, undisturbed)
    assert without_seconds(resumed.desk.of(EpochCompleted)[-1:]) == without_seconds([last])


def test_a_cancelled_job_leaves_no_checkpoint(blobs):
    stopped = desks.train_until(GROWING, blobs, desks.in_stage(Stage.TRAINING, why="cancel"))
    assert stopped.checkpoints == []
    assert stopped.of(CheckpointSaved) == []


def test_a_stopped_job_says_why_and_keeps_one_checkpoint(blobs):
    desk = desks.InProcessDesk(stop=desks.in_stage(Stage.TRAINING, why="pause"))
    with pytest.raises(Stopped) as stopped:
        Session(GROWING, desks.PLUGINS, desk, blobs).train()
    assert stopped.value.why == "pause"
    (saved,) = desk.of(CheckpointSaved)
    assert (saved.sha256, saved.epoch) == desk.checkpoints[0]
    assert saved.size_bytes == len(blobs.get(saved.sha256))


def test_a_checkpoint_of_another_job_is_refused(begun, blobs):
    other = desks.growing_job(rng_seed=9)
    with pytest.raises(CheckpointRejected, match="another job"):
        desks.train(other, blobs, resume_from=begun)


def test_data_that_changed_since_the_checkpoint_is_refused(begun, blobs, monkeypatch):
    images = desks.images
    monkeypatch.setattr(desks, "images", lambda: images(shift=1))
    with pytest.raises(CheckpointRejected, match="data changed"):
        desks.train(GROWING, blobs, resume_from=begun)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({}, ""),
        ({"budget": {"epochs": 2, "seconds": 60.0}}, "seconds"),
        ({"threads": 2}, "threads"),
    ],
)
def test_a_job_names_the_condition_that_exact_resuming_lacks(blobs, changes, because):
    desk = desks.train_until(desks.growing_job(**changes), blobs, STOPS["before the first step"])
    torch.set_num_threads(1)
    started = desk.of(TrainingStarted)[0]
    assert started.exact_resume is not bool(because)
    assert because in started.inexact_because


# --- when others fail --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ungrown(blobs):
    """The same job with a strategy that never grows anything."""
    return desks.train(desks.growing_job(budget={"epochs": 4}, policy={"strategy": "never"}), blobs)


def test_training_goes_on_without_structural_change_while_the_policy_is_away(blobs, ungrown):
    desk = desks.InProcessDesk(policy_away={1, 2, 3, 4})
    ended = desks.train(desks.growing_job(budget={"epochs": 4}), blobs, desk)
    assert [event.epoch for event in desk.of(PolicyUnavailable)] == [1, 2, 3, 4]
    assert "actor_unavailable" in desk.of(PolicyUnavailable)[0].reason
    assert ended.report.policy_unavailable == 4
    assert ended.report.seeds == ()
    assert ended.files["model.safetensors"] == ungrown.files["model.safetensors"]


def test_growth_resumes_when_the_policy_is_back(blobs):
    desk = desks.InProcessDesk(policy_away={1, 2})
    desks.train(desks.growing_job(budget={"epochs": 10}), blobs, desk)
    assert desk.decided == list(range(3, 11))
    assert min(event.epoch for event in desk.of(StageChanged)) == 3


def test_a_kernel_that_cannot_be_provided_refuses_the_decision_and_training_goes_on(blobs, ungrown):
    desk = desks.InProcessDesk(kernels=False)
    ended = desks.train(desks.growing_job(budget={"epochs": 10}), blobs, desk)
    wanted = [event for event in desk.of(DecisionMade) if event.decision.action == "germinate"]
    assert wanted
    assert not any(event.applied for event in wanted)
    assert all(event.refusal.startswith("kernel_rejected: ") for event in wanted)
    assert ended.report.seeds == ()
    assert {refused.by for refused in ended.report.refused} == {"gate"}
    assert ended.report.grown.epochs == 10


def test_a_kernel_that_is_there_at_the_second_attempt_is_grown(grown, blobs):
    slept = []
    desk = desks.InProcessDesk(kernel_errors=[ActorUnavailable("cache is between two incarnations")])
    assert same_end(desks.train(GROWING, blobs, desk, sleep=slept.append), grown)
    assert slept == [RETRY_AFTER_S]


@pytest.fixture(scope="module")
def faulty(blobs):
    """The job ``GROWING``, whose first germination met a daemon in trouble."""
    errors = [HandlerFailed("cache: OSError"), AskTimeout("no answer")]
    desk = desks.InProcessDesk(kernel_errors=errors)
    return desks.train(desks.growing_job(checkpoint_every_s=1e9), blobs, desk)


def test_a_kernel_that_cannot_be_had_is_recorded_as_unavailable_and_its_arm_rests_uncharged(blobs, faulty):
    (refused,) = [row for row in faulty.report.refused if row.by == "unavailable"]
    assert (refused.epoch, refused.reason) == (1, "ask_timeout: no answer")
    after = faulty.desk.observations[1]
    (arm,) = after.unavailable
    assert (arm.slot, arm.blueprint) == (refused.slot, refused.blueprint)
    (option,) = [option for option in after.options if option.arm == arm]
    assert "asked for again from epoch 3" in option.why_not
    assert faulty.report.seeds  # others were grown meanwhile
    sha256, _ = faulty.desk.checkpoints[0]
    state, _, _ = decode(blobs.get(sha256))
    assert decode_state(state.run.policy_state).arms == ()


def test_a_resumed_job_that_met_such_a_fault_says_so_and_goes_on_as_it_would_have(blobs, faulty):
    sha256, epoch = faulty.desk.checkpoints[0]  # taken at once, although none was due
    assert epoch == 1
    resumed = desks.train(desks.growing_job(checkpoint_every_s=1e9), blobs, resume_from=sha256)
    assert same_end(resumed, faulty)
    started = resumed.desk.of(TrainingStarted)[0]
    assert not started.exact_resume
    assert "could not be provided at epoch 1" in started.inexact_because


def test_a_job_resumed_after_the_policy_was_away_says_so(blobs):
    desk = desks.InProcessDesk(policy_away={1, 2}, stop=lambda desk: "drain" if len(desk.of(EpochCompleted)) == 2 else None)
    job = desks.growing_job(budget={"epochs": 3})
    with pytest.raises(Stopped):
        desks.train(job, blobs, desk)
    resumed = desks.train_until(job, blobs, lambda _desk: "drain", resume_from=desk.checkpoints[-1][0])
    assert "the policy could not be reached at 2 decision points" in resumed.of(TrainingStarted)[0].inexact_because


@pytest.mark.parametrize("only_measured", [False, True], ids=["in training", "when measured"])
def test_a_loss_that_is_not_finite_ends_the_job(blobs, only_measured):
    job = desks.growing_job(host="desks:exploding", host_options={"only_measured": only_measured})
    with pytest.raises(TrainingDiverged, match=r"lower optimizer\.learning_rate"):
        desks.train(job, blobs)


def test_a_job_with_a_nursery_screens_and_ends_bit_identical_when_it_is_stopped_meanwhile(blobs):
    job = desks.growing_job(
        policy={"warmup_epochs": 1, "patience": 1, "nursery": 3, "rent_parameters": 0.001, "rent_flops": 0.001}
    )
    whole = desks.train(job, blobs)
    (ended, *_) = whole.desk.of(ScreeningEnded)
    assert len(ended.candidates) == 3
    assert ended.winner is not None
    stopped = desks.train_until(job, blobs, desks.in_stage(Stage.TRAINING))
    assert same_end(desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0]), whole)


# --- the governor ------------------------------------------------------------------------------------------------------------

FRAGILE = {"host": "desks:fragile", "host_options": {"limit": 0.045, "since": 12}, "optimizer": {"learning_rate": 6e-2}}
"""Breaks in its third epoch of five steps, because Adam moves weights by about the learning rate; half of it is borne."""


def test_a_run_that_breaks_goes_back_to_its_last_good_point_and_ends_well(blobs):
    ended = desks.train(desks.growing_job(**FRAGILE, growth={"enabled": False}, scheduler={"name": "constant"}), blobs)
    (first, *_) = rolled = ended.desk.of(RolledBack)
    assert first.action == "cut_rate"
    assert first.rate_scale == 0.5
    assert first.to_epoch < first.epoch + 1
    assert "not finite" in first.reason
    assert ended.report.grown.loss < math.log(3)
    epochs = [event.epoch for event in ended.desk.of(EpochCompleted)]
    assert epochs[-1] == 9
    assert len(epochs) >= 9
    assert [event.trip for event in rolled] == list(range(1, len(rolled) + 1))


def test_the_report_tells_what_growth_and_control_were_taken_back_from(blobs):
    job = desks.growing_job(**FRAGILE, growth={"enabled": False}, scheduler={"name": "constant"}, control=True)
    ended = desks.train(job, blobs)
    told, events = ended.report.rollbacks, ended.desk.of(RolledBack)
    assert {each.phase for each in told} == {"growth", "control"}
    assert [(each.trip, each.epoch, each.to_epoch, each.reason, each.action, each.rate_scale) for each in told] == [
        (event.trip, event.epoch, event.to_epoch, event.reason, event.action, event.rate_scale) for event in events
    ]


def test_the_policy_is_told_of_a_rollback_at_its_next_decision_point(blobs):
    ended = desks.train(desks.growing_job(**FRAGILE, policy={"strategy": "never"}, scheduler={"name": "constant"}), blobs)
    told = [observation.rolled_back for observation in ended.desk.observations]
    assert sum(map(len, told)) == len(ended.desk.of(RolledBack)) > 0
    assert any("not finite" in line and "went back to epoch" in line for lines in told for line in lines)
    assert ended.desk.decided == list(range(1, len(ended.desk.decided) + 1)), "no decision point comes twice"


def test_a_job_killed_after_a_rollback_ends_as_the_undisturbed_one(blobs):
    job = desks.growing_job(**FRAGILE, growth={"enabled": False}, scheduler={"name": "constant"}, checkpoint_every_s=0.0)
    undisturbed = desks.train(job, blobs)
    went_back = desks.train_until(job, blobs, lambda desk: "drain" if desk.of(RolledBack) else None)
    resumed = desks.train(job, blobs, resume_from=went_back.checkpoints[-1][0])
    assert same_end(resumed, undisturbed)


def test_a_run_that_breaks_again_and_again_fails_with_its_story(blobs):
    job = desks.growing_job(host="desks:exploding", governor={"max_rollbacks": 2})
    with pytest.raises(TrainingDiverged, match=r"(?s)not finite.*went back to epoch 0 and cut.*then .*lower optim"):
        desks.train(job, blobs)


def test_without_a_governor_the_first_catastrophe_ends_the_job(blobs):
    job = desks.growing_job(host="desks:exploding", governor={"enabled": False})
    with pytest.raises(TrainingDiverged, match="the governor is not enabled; lower"):
        desks.train(job, blobs)


# --- what does not fit -------------------------------------------------------------------------------------------------------

MISFITS = {
    "a host that returns no module": ({"host": "desks:no_module"}, InvalidModel, "returned str"),
    "a host that raises": ({"host": "desks:raising"}, ImportFailed, "out of ideas"),
    "a host option that is none": (
        {"host_options": {"droput": 0.1}},
        ImportFailed,
        "unexpected keyword argument 'droput'; host_options may hold: dropout$",
    ),
    "a host that leaves the interpreter": ({"host": "desks:leaving"}, ImportFailed, "host .*leaving' raised SystemExit: 3"),
    "a module that leaves the interpreter": ({"host": "leaves:net"}, ImportFailed, "could not be imported: SystemExit: 3"),
    "a pass that leaves the interpreter": ({"host": "desks:leaving_within"}, InvalidModel, "does not run .* SystemExit: 3"),
    "such a pass, ungrown": (
        {"host": "desks:leaving_within", "growth": {"enabled": False}},
        InvalidModel,
        "does not run .* SystemExit: 3",
    ),
    "data that leaves the interpreter": ({"data": "desks:leaving"}, ImportFailed, "data function .* raised SystemExit: 3"),
    "a loss that leaves the interpreter": ({"loss": "desks:leaving"}, InvalidModel, "raised SystemExit"),
    "a schedule that leaves the interpreter": ({"scheduler": {"name": "desks:leaving"}}, InvalidJob, "raised SystemExit"),
    "a host that is not there": ({"host": "desks:nowhere"}, ImportFailed, "nowhere"),
    "a host nobody registered": ({"host": "resnet152"}, UnknownName, "cnn"),
    "a host that does not run on the data": ({"host": "desks:unfit"}, InvalidModel, "does not run"),
    "a host that does not run, ungrown": (
        {"host": "desks:unfit", "growth": {"enabled": False}},
        InvalidModel,
        "does not run",
    ),
    "a host with two outputs": ({"host": "desks:two_outputs"}, InvalidModel, "returned a tuple"),
    "a host with nothing to train": ({"host": "desks:frozen"}, InvalidModel, "nothing to train"),
    "labels without an output": ({"data_options": {"labels": 4}}, InvalidData, "label 3"),
    "a loss that does not fit the output": ({"loss": "mse"}, InvalidModel, "mse"),
    "a loss that cuts the gradient": ({"loss": "desks:cutting"}, InvalidModel, "gradient"),
    "a gate split too small to judge by": ({"split": {"gate": 0.02}}, InvalidData, "at least 8"),
    "a strategy nobody registered": ({"policy": {"strategy": "oracle"}}, UnknownName, "ucb"),
    "a blueprint nobody registered": ({"growth": {"blueprints": ["tree*"]}}, UnknownName, "conv_light"),
    "an alpha schedule nobody registered": ({"growth": {"alpha_schedule": "jump"}}, UnknownName, "cosine"),
    "a slot pattern that matches nothing": ({"slots": {"patterns": ["layer9.*"]}}, UnknownName, "body"),
}


@pytest.mark.parametrize(("changes", "error", "told"), MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused_before_anything_is_trained(blobs, changes, error, told, tmp_path, monkeypatch):
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    desk = desks.InProcessDesk()
    with pytest.raises(error, match=told):
        desks.train(desks.growing_job(**changes), blobs, desk)
    assert desk.events == []


def test_a_device_that_is_not_there_is_refused(blobs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidModel, match="no CUDA device"):
        desks.train(desks.growing_job(device="cuda"), blobs)


# --- blueprints that are broken ----------------------------------------------------------------------------------------------


def with_blueprint(**changes):
    """What is installed, and a package with one blueprint more."""
    declared = {"name": "theirs", "topology": "cnn", "factory": "their_package:build", "description": "", "source": ""}
    theirs = Blueprint(**{**declared, "parameters": lambda shape: 3 * shape[0], "flops": lambda _shape: 0.0, **changes})
    plugin = types.ModuleType("their_plugin")
    plugin.esperd_blueprints = hookimpl(lambda: [theirs], specname="esperd_blueprints")
    plugins = load_plugins()
    plugins.add("their_plugin", plugin, "their-package 1.0")
    return plugins


ANY_BLUEPRINT = desks.growing_job(budget={"epochs": 6}, growth={"blueprints": ["conv_light", "t*"], "incubation_epochs": 1})


def test_a_blueprint_that_does_not_import_costs_its_own_arms_and_the_job_goes_on(blobs):
    ended = desks.train(ANY_BLUEPRINT, blobs, plugins=with_blueprint())
    told = "the factory of blueprint 'theirs', from their-package 1.0, does not import: .* No module named 'their_package'"
    refused = [row for row in ended.report.refused if row.blueprint == "theirs"]
    assert {row.slot for row in refused} == {slot.slot for slot in ended.report.slots if slot.topology == "cnn"}
    assert {(row.epoch, row.by) for row in refused} == {(0, "gate")}
    for observation in ended.desk.observations:
        options = [option for option in observation.options if option.arm.blueprint == "theirs"]
        assert len(options) == len(refused)
        for option, row in zip(options, refused, strict=True):
            assert not option.available
            assert re.search(told, option.why_not)
            assert row.reason == option.why_not
            assert option.parameters > 0
    assert any(event.applied and event.decision.action == "germinate" for event in ended.desk.of(DecisionMade))


def test_a_job_that_names_such_a_blueprint_fails_with_its_name_and_package(blobs):
    job = desks.growing_job(growth={"blueprints": ["theirs", "t*"]})
    with pytest.raises(ImportFailed, match=r"'theirs', from their-package 1\.0, does not import: .*growth\.blueprints") as failed:
        desks.train(job, blobs, plugins=with_blueprint())
    assert failed.value.fields["blueprint"] == "theirs"
    assert "ModuleNotFoundError" in failed.value.fields["traceback"]


def test_a_blueprint_for_slots_that_the_host_does_not_have_is_not_imported(blobs):
    job = desks.growing_job(budget={"epochs": 1}, growth={"blueprints": ["conv_light", "theirs"]})
    assert desks.train(job, blobs, plugins=with_blueprint(topology="transformer")).report.refused == ()


@pytest.mark.parametrize(
    ("formula", "told"), [(lambda shape: shape[7], "IndexError"), (desks.leaving, "SystemExit: 3"), (lambda _: None, "TypeError")]
)
def test_an_arm_whose_formula_fails_has_no_price_and_is_not_offered(blobs, formula, told):
    ended = desks.train(ANY_BLUEPRINT, blobs, plugins=with_blueprint(factory="desks:host", parameters=formula))
    offered = {option.arm.blueprint for observation in ended.desk.observations for option in observation.options}
    assert "conv_light" in offered
    assert "theirs" not in offered
    refused = [row for row in ended.report.refused if row.blueprint == "theirs"]
    assert len(refused) == sum(slot.topology == "cnn" for slot in ended.report.slots) > 0
    assert all("a formula of blueprint 'theirs' fails" in row.reason and told in row.reason for row in refused)


@pytest.mark.parametrize("host", ["desks:raising", "desks:leaving", "desks:leaving_within"])
def test_errors_in_the_users_code_carry_its_traceback(blobs, host):
    with pytest.raises(EsperError) as failed:
        desks.train(desks.growing_job(host=host), blobs)
    assert "desks.py" in failed.value.fields["traceback"]


# --- without growth, and out again -------------------------------------------------------------------------------------------


def test_a_job_without_growth_is_the_loop_one_would_write_by_hand(blobs):
    job = desks.growing_job(budget={"epochs": 3}, growth={"enabled": False})
    ended = desks.train(job, blobs)

    torch.manual_seed(job.rng_seed)
    host = desks.host()
    optimizer = torch.optim.AdamW(host.parameters(), lr=job.optimizer.learning_rate, weight_decay=job.optimizer.weight_decay)
    train = Session(job, desks.PLUGINS, desks.InProcessDesk(), blobs).splits.train
    torch.manual_seed(job.rng_seed)
    desks.host()  # leaves the RNG stream where the job's training found it
    steps, step = 3 * -(-train.samples // job.batch_size), 0
    host.train()
    for epoch in range(3):
        for indices in torch.split(epoch_order(job.rng_seed, epoch, train.samples), job.batch_size):
            share = 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64)).item())
            for group in optimizer.param_groups:
                group["lr"] = job.optimizer.learning_rate * share
            x, y = train.batch(indices)
            optimizer.zero_grad()
            functional.cross_entropy(host(x), y, reduction="none").mean().backward()
            optimizer.step()
            step += 1

    weights = safetensors.torch.load(ended.files["model.safetensors"])
    assert set(weights) == {f"host.{name}" for name in host.state_dict()}
    assert all(torch.equal(weights[f"host.{name}"], tensor) for name, tensor in host.state_dict().items())


def test_a_job_without_growth_has_no_slots_and_asks_no_policy(blobs):
    ended = desks.train(desks.growing_job(budget={"epochs": 2}, growth={"enabled": False}), blobs)
    assert ended.report.slots == ()
    assert ended.desk.decided == []
    assert json.loads(ended.files["growth.json"])["seeds"] == []


def test_the_grown_model_is_copied_to_the_directory_the_job_names(tmp_path, grown, blobs):
    job = msgspec.structs.replace(GROWING, workdir=str(tmp_path), export=type(GROWING.export)(directory="out/model"))
    ended = desks.train(job, blobs)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "model").iterdir()}
    assert written == ended.files
    network = load(tmp_path / "out" / "model", host=desks.host)
    assert network.effective_parameters == grown.report.grown.parameters


@pytest.mark.parametrize("directory", ["taken", "taken/below"])
def test_an_export_directory_that_cannot_be_written_is_named_before_anything_is_trained(tmp_path, blobs, directory):
    (tmp_path / "taken").write_text("a file")
    job = desks.growing_job(budget={"epochs": 1}, workdir=str(tmp_path), export={"directory": directory})
    desk = desks.InProcessDesk()
    with pytest.raises(InvalidJob, match=r"export\.directory .*taken.* cannot be written"):
        desks.train(job, blobs, desk)
    assert desk.events == []


def test_a_copy_that_fails_at_the_end_is_told_and_the_job_succeeds(tmp_path, blobs):
    job = desks.growing_job(budget={"epochs": 1}, workdir=str(tmp_path), export={"directory": "out"})
    begun = desks.train_until(job, blobs, desks.after_steps(1)).checkpoints[-1][0]
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("in the way")
    ended = desks.train(job, blobs, resume_from=begun, resumed=1)
    (told,) = ended.desk.of(ExportFailed)
    assert told.directory == str(tmp_path / "out")
    assert "exists" in told.reason
    assert {"model.safetensors", "growth.json", "report.json", "README.md"} == set(ended.files)


def test_the_card_of_a_job_tells_its_numbers(controlled):
    told = controlled.files["README.md"].decode()
    for metrics in (controlled.report.grown, controlled.report.control):
        assert f"{metrics.loss:.4f}" in told
    for seed in controlled.report.seeds:
        assert f"`{seed.seed}`" in told


def test_a_readme_of_the_users_in_the_export_directory_is_left_alone(tmp_path, blobs):
    (tmp_path / "README.md").write_text("# My project")
    job = desks.growing_job(budget={"epochs": 1}, workdir=str(tmp_path), export={"directory": "."})
    ended = desks.train(job, blobs)
    assert (tmp_path / "README.md").read_text() == "# My project"
    assert (tmp_path / "growth.json").read_bytes() == ended.files["growth.json"]


# --- budgets -----------------------------------------------------------------------------------------------------------------


def test_a_budget_of_flops_ends_within_one_step_or_less_than_a_gate_pass(blobs):
    job = desks.growing_job(budget={"flops": 2e7}, growth={"enabled": False})
    ended = desks.train(job, blobs)
    started = ended.desk.of(TrainingStarted)[0]
    gate = started.host_flops_per_sample * started.gate_samples
    step = 3 * started.host_flops_per_sample * job.batch_size
    assert -gate <= ended.report.grown.training_flops - 2e7 <= step
    assert ended.desk.of(EpochCompleted)[-1].progress == 1.0


def test_a_budget_of_seconds_counts_what_the_clock_says(blobs):
    ticks = itertools.count()
    job = desks.growing_job(budget={"seconds": 100.0}, growth={"enabled": False})
    desk = desks.InProcessDesk()
    Session(job, desks.PLUGINS, desk, blobs, clock=lambda: float(next(ticks))).train()
    assert 1 <= len(desk.of(EpochCompleted)) < 20
    assert desk.of(EpochCompleted)[-1].progress > 0.9  # a step takes several ticks


def test_a_budget_that_is_spent_before_the_first_step_says_that_nothing_was_trained(blobs):
    ticks = itertools.count()
    job = desks.growing_job(budget={"seconds": 0.001}, control=True)
    desk = desks.InProcessDesk()
    session = Session(job, desks.PLUGINS, desk, blobs, clock=lambda: float(next(ticks)))
    report = desks.Ended(session, session.train()).report
    assert desk.of(EpochCompleted) == []
    for metrics in (report.grown, report.control):
        assert (metrics.epochs, metrics.training_flops) == (0.0, 0.0)
        assert metrics.flops_per_sample == desk.of(TrainingStarted)[0].host_flops_per_sample > 0
    assert (report.comparison.loss, report.comparison.loss_lower, report.comparison.loss_upper) == (0.0, 0.0, 0.0)
    assert str(judge(report)).startswith("not known: nothing was trained: the budget was spent before the first step")
    told = [Event(job=desk.job_id, sequence=number, at=0.0, body=body) for number, body in enumerate(desk.events, start=1)]
    assert "nothing was trained" in render_html(report, told)


def test_a_budget_that_ends_between_two_epochs_trains_no_empty_epoch(blobs):
    """The clock passes the limit after the loop looked and before the first step: the epoch has one step, and a loss."""
    readings = itertools.chain([0.0] * 6, itertools.repeat(10.0))
    desk = desks.InProcessDesk()
    job = desks.growing_job(budget={"seconds": 5.0}, growth={"enabled": False})
    Session(job, desks.PLUGINS, desk, blobs, clock=lambda: next(readings)).train()
    (epoch,) = desk.of(EpochCompleted)
    assert desk.steps_in_epoch == 0
    assert epoch.train_loss > 0


def test_a_budget_of_parameters_refuses_arms_that_would_exceed_it(blobs):
    started = desks.train_until(GROWING, blobs, STOPS["before the first step"]).of(TrainingStarted)[0]
    job = desks.growing_job(budget={"epochs": 8, "parameters": started.host_parameters + 10})
    ended = desks.train(job, blobs)
    assert ended.report.seeds == ()
    assert ended.report.grown.parameters == started.host_parameters
    reasons = " ".join(event.decision.reason for event in ended.desk.of(DecisionMade))
    assert f"would exceed the budget's {started.host_parameters + 10}" in reasons


BREAKING = desks.growing_job(
    host="desks:fragile",
    host_options={"limit": 0.045, "since": 12},
    optimizer={"learning_rate": 6e-2},
    scheduler={"name": "constant"},
    growth={"enabled": False},
)
"""Breaks between two looks of the governor, and ends well because it is taken back."""


def test_a_job_drained_where_it_has_just_broken_stops_at_once_and_is_taken_back_when_it_goes_on(blobs):
    undisturbed = desks.train(BREAKING, blobs)
    assert undisturbed.desk.of(RolledBack)
    broken = 0
    for steps in range(20, 26):
        stopped = desks.train_until(BREAKING, blobs, desks.after_steps(steps, "drain"))
        _, tensors, _ = decode(blobs.get(stopped.checkpoints[-1][0]))
        weights = [tensor for name, tensor in tensors.items() if name.startswith("model.") and tensor.is_floating_point()]
        broken += not all(torch.isfinite(tensor).all() for tensor in weights)
        resumed = desks.train(BREAKING, blobs, resume_from=stopped.checkpoints[-1][0], resumed=1)
        assert resumed.files["model.safetensors"] == undisturbed.files["model.safetensors"]
    assert broken, "some stops were asked for while it was broken"


def test_a_job_cancelled_where_it_has_just_broken_stops_at_once(blobs):
    desk = desks.train_until(BREAKING, blobs, desks.after_steps(24, "cancel"))
    assert not desk.of(RolledBack)


def test_a_trial_is_abandoned_when_the_job_is_to_stop_and_run_anew_when_it_goes_on(blobs):
    job = desks.growing_job(
        budget={"epochs": 12}, gates={"proof": "trial", "trial_epochs": 1.0, "confidence": 0.6}, checkpoint_every_s=0.0
    )
    undisturbed = desks.train(job, blobs)
    assert undisturbed.desk.of(TrialMeasured)
    in_trial = "esperd/growth/trial.py"

    def stop(desk):
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.endswith(in_trial):
            frame = frame.f_back
        return None if frame is None else "pause"

    stopped = desks.train_until(job, blobs, stop)
    assert not stopped.of(TrialMeasured)
    resumed = desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0], resumed=1)
    assert same_end(resumed, undisturbed)
