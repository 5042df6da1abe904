"""A policy that measures arms before it grows one: it is asked again with what was found, and the network has not moved."""

from __future__ import annotations

import itertools

import desks
import pytest

from esperd.messages.policy import Arm, Decided, Decision
from esperd.messages.telemetry import ArmGauged, ArmTried, DecisionMade, EpochCompleted, PolicyUnavailable
from esperd.store.blobs import Blobs
from esperd.trainer.scouting import MOST_ROUNDS

STEPS = 5
"""Of an epoch."""
PRICE = {"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.001, "rent_flops": 0.001}


@pytest.fixture(scope="module", autouse=True)
def all_may_be_gauged():
    """In jobs of a few dozen steps a twentieth is not a batch for each arm."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("esperd.policy.gradient_merit.SHARE", 1.0)
        yield


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return Blobs(tmp_path_factory.mktemp("blobs"))


def job(strategy, **fields):
    return desks.growing_job(policy={**PRICE, "strategy": strategy}, **fields)


class Watching(desks.InProcessDesk):
    """Remembers which kernels were asked for; ``asks`` answers in place of the strategy."""

    def __init__(self, asks=None):
        super().__init__()
        self.asks = asks
        self.kernels_of = set()

    def kernel(self, key):
        self.kernels_of.add(key.blueprint)
        return super().kernel(key)

    def decide(self, request):
        return super().decide(request) if self.asks is None else Decided(decisions=self.asks(request), state=b"")


@pytest.fixture(scope="module")
def gauged(blobs):
    return desks.train(job("gradient_merit"), blobs, Watching())


def test_every_available_arm_is_gauged_and_the_largest_gradient_is_grown(gauged):
    told = {(body.merit.arm.slot, body.merit.arm.blueprint): body.merit.norm for body in gauged.desk.of(ArmGauged)}
    first = next(body for body in gauged.desk.of(DecisionMade) if body.decision.action == "germinate")
    at_first = {key: norm for key, norm in told.items() if norm is not None}
    assert len(at_first) >= 2
    assert first.applied
    assert first.decision.score == max(
        body.merit.norm for body in gauged.desk.of(ArmGauged) if body.epoch == first.epoch and body.merit.norm is not None
    )
    assert "largest gradient merit" in first.decision.reason


def test_measuring_is_charged_and_no_kernel_is_asked_for(gauged):
    tried = gauged.desk.observations[-1].trial_flops
    when = {body.epoch for body in gauged.desk.of(ArmGauged)}
    grows = {epoch for epoch, (before, after) in enumerate(itertools.pairwise(tried), start=1) if after > before}
    assert grows == when - {len(tried)}, "what was measured after an epoch is spent when the next one ends"
    assert gauged.report.flops["trial"] >= tried[-1] > 0.0
    grown = {body.decision.arm.blueprint for body in gauged.desk.of(DecisionMade) if body.decision.action == "germinate"}
    assert gauged.desk.kernels_of == grown


def in_epoch(number):
    """A reason to stop: in the middle of the epoch after so many."""
    return lambda desk: "drain" if len(desk.of(EpochCompleted)) == number and desk.steps_in_epoch == 2 else None


def while_it_measures(desk):
    """A reason to stop: an epoch is trained, and not told yet."""
    return "drain" if len(desk.of(EpochCompleted)) == 1 and desk.steps_in_epoch == STEPS else None


def test_a_job_that_is_stopped_while_it_measures_goes_on_from_the_epoch_before(blobs, gauged):
    asked = job("gradient_merit", checkpoint_every_s=0.0)
    stopped = desks.train_until(asked, blobs, while_it_measures)
    assert not any(body.epoch == 2 for body in stopped.of(ArmGauged)), "what was measured of it is not told"
    resumed = desks.train(asked, blobs, resume_from=stopped.checkpoints[-1][0])
    assert resumed.files["model.safetensors"] == gauged.files["model.safetensors"]


def test_a_job_that_measures_first_ends_bit_identical_when_it_is_stopped(blobs, gauged):
    checkpoint = None
    for epochs in (1, 2, 1):
        stopped = desks.train_until(job("gradient_merit"), blobs, in_epoch(epochs), resume_from=checkpoint)
        checkpoint = stopped.checkpoints[-1][0]
    resumed = desks.train(job("gradient_merit"), blobs, resume_from=checkpoint)
    assert resumed.desk.observations[-1].trial_flops == gauged.desk.observations[-1].trial_flops
    assert resumed.files["model.safetensors"] == gauged.files["model.safetensors"]


def test_a_contest_is_held_once_and_told_arm_by_arm(blobs):
    ended = desks.train(job("successive_halving", budget={"epochs": 20}, batch_size=24), blobs)
    tried = [body.tried for body in ended.desk.of(ArmTried)]
    assert len({trial.arm for trial in tried}) >= 2
    assert {trial.epoch for trial in tried} == {tried[0].epoch}
    assert all(trial.trial is not None and trial.trial.flops > 0.0 for trial in tried)


@pytest.mark.parametrize("batch_size", [24, 96, 1000])
def test_a_contest_keeps_to_its_share_however_few_steps_an_epoch_has_or_is_not_held(blobs, batch_size):
    ended = desks.train(job("successive_halving", budget={"epochs": 20}, batch_size=batch_size), blobs)
    tried = ended.desk.of(ArmTried)
    first = ended.desk.observations[0]
    epoch_flops = first.gate_flops[0] / (1.0 + first.gate_pass_epochs)
    allowed = 0.15 * first.epochs_left * epoch_flops
    assert ended.report.flops.get("trial", 0.0) <= allowed
    assert bool(tried) == (batch_size == 24), "of three steps an epoch, or one, the share holds too few"
    reasons = [body.decision.reason for body in ended.desk.of(DecisionMade)]
    assert any("cannot compete: a contest may take" in reason for reason in reasons) == (not tried)


def test_a_network_that_cannot_be_copied_is_not_measured_and_trains_on(blobs):
    ended = desks.train(job("gradient_merit", host="desks:host_that_keeps_a_graph"), blobs)
    told = ended.desk.of(ArmGauged)
    assert told
    assert all(body.merit.norm is None and "cannot be copied" in body.merit.why_not for body in told)
    assert ended.report.seeds == ()


def test_a_slot_that_is_not_there_is_told_and_nothing_else_happens(blobs):
    def asks(request):
        gone = Arm(slot="nowhere", blueprint="norm")
        wanted = (
            Decision(action="gauge", arm=gone, batches=1, reason="which?"),
            Decision(action="try", arm=gone, epochs=0.5, reason="which?"),
        )
        return wanted if request.point == 1 else (Decision(action="wait", reason="done"),)

    ended = desks.train(job("never", budget={"epochs": 2}), blobs, Watching(asks))
    (gauged,), (tried,) = ended.desk.of(ArmGauged), ended.desk.of(ArmTried)
    assert "nowhere" in gauged.merit.why_not
    assert "nowhere" in tried.tried.why_not


def test_a_decision_to_measure_that_says_too_little_is_refused_and_told(blobs):
    def asks(request):
        if request.point > 1:
            return (Decision(action="wait", reason="done"),)
        return (
            Decision(action="gauge", reason="which arm?"),
            Decision(action="try", arm=request.observation.options[0].arm, reason="how long?"),
        )

    ended = desks.train(job("never", budget={"epochs": 2}), blobs, Watching(asks))
    refused = [body.refusal for body in ended.desk.of(DecisionMade) if not body.applied]
    assert ["must name an arm" in refused[0], "must say for how many epochs" in refused[1]] == [True, True]


def test_a_policy_that_only_measures_does_not_stop_the_job(blobs):
    def asks(request):
        arm = next(option.arm for option in request.observation.options if option.available)
        return (Decision(action="gauge", arm=arm, batches=1, reason="once more"),)

    ended = desks.train(job("never", budget={"epochs": 2}), blobs, Watching(asks))
    assert len(ended.desk.of(ArmGauged)) == 2 * MOST_ROUNDS
    assert len([body for body in ended.desk.of(PolicyUnavailable) if "decided nothing" in body.reason]) == 2
