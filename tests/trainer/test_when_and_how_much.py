"""What a run measures for the policy to decide when and how much: histories, slots, seconds, memory, and hard budgets."""

from __future__ import annotations

import itertools
from itertools import pairwise

import desks
import msgspec
import pytest
import torch
from small_growth import GATE, Kernels, germinate, grower, same, steps, tensors_of
from small_growth import batches as batches_of_epoch

from esperd.growth.streams import Streams
from esperd.messages.growth import COOLDOWN_STAGES, Stage
from esperd.messages.jobs import Budget
from esperd.messages.policy import Arm, Decided, Decision, Headroom
from esperd.messages.telemetry import DecisionMade, EpochCompleted, StageChanged, TrainingStarted
from esperd.store.blobs import Blobs
from esperd.trainer import run as runs
from esperd.trainer.epoch_cost import gate_cost, training_cost
from esperd.trainer.offers import Offers
from esperd.trainer.session import Session
from esperd.trainer.stopwatch import ROUNDS, seconds_share


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return Blobs(tmp_path_factory.mktemp("when") / "blobs")


def job(**policy):
    return desks.growing_job(budget={"epochs": 8}, policy={"warmup_epochs": 1, "rent_parameters": 0.001, **policy})


@pytest.fixture(scope="module")
def ended(blobs):
    return desks.train(job(), blobs)


def test_an_observation_holds_every_epochs_losses_and_what_they_cost(ended):
    *_, last = ended.desk.observations
    epochs = ended.desk.of(EpochCompleted)
    assert last.train_losses == tuple(event.train_loss for event in epochs)
    assert last.gate_losses == tuple(event.gate_loss for event in epochs)
    assert last.gate_flops == tuple(sorted(last.gate_flops))
    assert len(last.gate_flops) == last.epoch
    assert last.gate_flops[-1] == epochs[-1].training_flops


def test_an_observation_says_what_was_measured_at_every_slot(ended):
    for observation in ended.desk.observations:
        told = {each.slot: each for each in observation.slot_statistics}
        assert set(told) == {record.slot for record in observation.slots}
        assert all(each.gradient > 0.0 and each.steps == 1 and each.seconds > 0.0 for each in told.values())
        assert all(each.activation_bytes > 0 for each in told.values())
        assert 0 < observation.headroom.free_bytes <= observation.headroom.total_bytes


@pytest.mark.parametrize("trigger", ["gradient_bottleneck", "plateau", "generalisation_gap"])
def test_a_job_whose_trigger_goes_by_measurements_ends_bit_identical_when_it_is_stopped(blobs, trigger):
    sensitive = {"plateau_window": 1, "plateau_looks": 1, "plateau_improvement": 0.2, "plateau_release": 0.5}
    asked = job(trigger=trigger, bottleneck_ratio=2.8, **sensitive)
    undisturbed = desks.train(asked, blobs)
    reasons = [event.decision.reason for event in undisturbed.desk.of(DecisionMade)]
    assert any(f"not now ({trigger})" in reason for reason in reasons) or trigger == "generalisation_gap"
    checkpoint = None
    for _ in range(4):
        stopped = desks.train_until(asked, blobs, desks.after_steps(8), resume_from=checkpoint)
        checkpoint = stopped.checkpoints[-1][0]
    resumed = desks.train(asked, blobs, resume_from=checkpoint)
    assert resumed.files["model.safetensors"] == undisturbed.files["model.safetensors"]
    done = len(undisturbed.desk.observations) - len(resumed.desk.observations)
    gradients = [[each.gradient for each in seen.slot_statistics] for seen in undisturbed.desk.observations[done:]]
    assert [[each.gradient for each in seen.slot_statistics] for seen in resumed.desk.observations] == gradients
    assert resumed.desk.of(DecisionMade) == undisturbed.desk.of(DecisionMade)[-len(resumed.desk.of(DecisionMade)) :]


def test_a_trigger_that_never_fires_grows_nothing_and_is_told(blobs):
    never = desks.train(job(trigger="never"), blobs)
    assert never.report.seeds == ()
    assert "not now (never): the trigger never fires" in {event.decision.reason for event in never.desk.of(DecisionMade)}


def test_a_budget_of_flops_per_sample_refuses_arms_that_would_exceed_it(blobs, ended):
    host = ended.desk.observations[0].host_flops_per_sample
    bounded = desks.growing_job(budget={"epochs": 8, "flops_per_sample": host + 1.0}, policy={"warmup_epochs": 1})
    told = desks.train(bounded, blobs)
    assert told.report.seeds == ()
    assert told.report.grown.flops_per_sample == host
    reasons = " ".join(event.decision.reason for event in told.desk.of(DecisionMade))
    assert f"FLOPs per sample would exceed the budget's {host + 1.0:.4g}" in reasons


def test_seeds_that_live_count_for_the_budget_of_flops_per_sample(blobs, ended):
    """Offered again with room for one seed only, a second one is refused while the first lives."""
    dearest = max(option.flops_per_sample for option in ended.desk.observations[0].options)
    limit = ended.desk.observations[0].host_flops_per_sample + dearest + 1.0
    told = desks.train(
        desks.growing_job(budget={"epochs": 7, "flops_per_sample": limit}, policy={"warmup_epochs": 1, "rent_parameters": 0.001}),
        blobs,
    )
    assert told.desk.of(StageChanged), "one fits"
    for seen in told.desk.observations:
        assert seen.host_flops_per_sample + sum(each.flops_per_sample for each in seen.seeds) <= limit
        taken = sum(each.flops_per_sample for each in seen.seeds if each.stage not in COOLDOWN_STAGES)
        offered = [option.flops_per_sample for option in seen.options if option.available]
        assert all(seen.host_flops_per_sample + taken + more <= limit for more in offered)


class Insisting(desks.InProcessDesk):
    """Germinates the dearest arm of each slot, the dearest of all first, whatever is offered."""

    def decide(self, request):
        by_slot = {}
        for option in sorted(request.observation.options, key=lambda option: option.parameters):
            by_slot[option.arm.slot] = option
        wanted = sorted(by_slot.values(), key=lambda option: -option.parameters)
        made = [Decision(action="germinate", arm=option.arm, reason="for tests") for option in wanted]
        return Decided(decisions=tuple(made), state=b"")


@pytest.mark.parametrize("limit", ["parameters", "flops_per_sample"])
def test_a_hard_limit_holds_for_a_strategy_that_germinates_what_it_was_not_offered(blobs, ended, limit):
    first = ended.desk.observations[0]
    dearest = max(first.options, key=lambda option: option.parameters)
    standing = {"parameters": first.host_parameters, "flops_per_sample": int(first.host_flops_per_sample)}[limit]
    asked = desks.growing_job(budget={"epochs": 2, limit: int(standing + getattr(dearest, limit) + 1)})
    told = desks.train(asked, blobs, Insisting())
    one, other, *_ = (event for event in told.desk.of(DecisionMade) if event.decision.action == "germinate")
    assert one.applied, "it fits"
    assert "would exceed the budget's" in other.refusal


def test_the_candidates_of_a_screening_count_as_their_dearest_by_each_measure_and_not_for_each_other():
    """The one with more parameters is not the one with more FLOPs: its slot lies deeper."""
    grown = grower(source=Kernels())
    steps(grown, batches_of_epoch(0))
    grown.measure([GATE])
    for slot in ("first", "second"):
        assert grown.apply(msgspec.structs.replace(germinate("conv_light", slot), screening="point 1")) is None
    candidates = list(grown.network.seeds())
    sizes = [sum(parameter.numel() for parameter in seed.parameters()) for seed in candidates]
    flops = [seed.flops_per_sample for seed in candidates]
    assert sizes.index(max(sizes)) != flops.index(max(flops))
    host = grown.ledger.cost("gate", "host")

    def over(size, price, screening="", **most):
        budget = Budget(epochs=1, **most)
        offers = Offers(grower=grown, source=None, plugins=desks.PLUGINS, job=None, budget=budget, formula_failed=lambda *_: None)
        return offers.over_budget(size, price, screening)

    most = grown.host_parameters + max(sizes)
    assert over(1, 0.0, parameters=most + 1) == ""
    assert f"{most + 2} parameters" in over(2, 0.0, parameters=most + 1)
    assert over(max(sizes), 0.0, "point 1", parameters=most) == "", "one of them at most goes on"
    limit = int(host + max(flops) + 10)
    assert over(0, 9.0, flops_per_sample=limit) == ""
    assert "FLOPs per sample would exceed" in over(0, 11.0, flops_per_sample=limit)
    assert over(0, max(flops), "point 1", flops_per_sample=limit) == ""


def test_the_budget_says_how_much_it_allows_also_of_a_network_that_was_never_trained_as_it_is(blobs, ended):
    short = {"incubation_epochs": 1, "blending_epochs": 1, "shadowing_epochs": 1, "probation_epochs": 1, "embargo_epochs": 0}
    asked = desks.growing_job(
        growth=short,
        policy={"strategy": "uniform", "nursery": 2, "rent_parameters": 0.001, "latest_germination": 1.0},
        budget={"flops": ended.report.grown.training_flops},
    )
    told = desks.train(asked, blobs).desk
    assert any(change.after is Stage.BLENDING for change in told.of(StageChanged)), "a seed that is heard from here on"
    assert None not in {seen.epochs_left for seen in told.observations}
    assert None not in {seen.gate_pass_epochs for seen in told.observations}


def test_a_network_that_was_never_trained_as_it_is_costs_what_it_will_be_counted_to_cost():
    grown = grower(incubation="joint", dropout=0.0)
    assert training_cost(grown) is None
    assert gate_cost(grown) is None
    steps(grown, batches_of_epoch(0))
    grown.measure([GATE])
    grown.network.train()
    assert grown.apply(germinate("conv_light", "first")) is None
    assert grown.ledger.cost("train", grown.structure()) is None
    estimated = training_cost(grown), gate_cost(grown)
    steps(grown, batches_of_epoch(1))
    grown.measure([GATE])
    assert estimated == (grown.ledger.cost("train", "first#0"), grown.ledger.cost("gate", "first#0"))


# --- seconds -----------------------------------------------------------------------------------------------------------------


def test_the_seconds_of_an_arm_are_known_once_a_seed_of_it_lives_and_not_before(blobs):
    seen = desks.train(job(rent_seconds=0.001), blobs).desk.observations
    grown = {(each.slot, each.blueprint) for each in seen[-1].seeds}
    first = {option.arm: option.seconds_share for option in seen[0].options}
    assert set(first.values()) == {None}
    known = {option.arm: option.seconds_share for option in seen[-1].options}
    assert grown
    assert all(known[arm] > 0.0 for arm in known if (arm.slot, arm.blueprint) in grown)
    assert None in known.values(), "an arm that never lived has no measured price"


class Mistyping(desks.InProcessDesk):
    """Its first answer names a slot that is not there."""

    def decide(self, request):
        arm = Arm(slot="nowhere", blueprint="norm")
        made = Decision(action="germinate", arm=arm, reason="a slip of the pen", by="ada")
        return Decided(decisions=(made if request.point == 1 else Decision(action="wait", reason="done"),), state=b"")


def test_a_mistyped_slot_is_refused_where_seconds_are_charged_and_the_job_goes_on(blobs):
    short = desks.growing_job(policy={"strategy": "never", "rent_seconds": 0.001}, budget={"epochs": 2})
    first, last = desks.train(short, blobs, Mistyping()).desk.of(DecisionMade)
    assert not first.applied
    assert "invalid_slot" in first.refusal
    assert "nowhere" in first.refusal
    assert last.applied


def test_epochs_left_of_a_budget_of_seconds_go_by_what_an_epoch_takes_now(blobs):
    """Whatever was waited for at decision points, as a kernel that is compiled, does not come again each epoch."""
    ticks, waited = itertools.count(), []

    class Slow(desks.InProcessDesk):
        def decide(self, request):
            waited.append(1000.0)
            return super().decide(request)

    seconds = desks.growing_job(budget={"seconds": 3100.0}, policy={"strategy": "never"})
    desk = Slow()
    Session(seconds, desks.PLUGINS, desk, blobs, clock=lambda: 0.01 * next(ticks) + sum(waited)).train()
    left = [seen.epochs_left for seen in desk.observations]
    assert len(left) == 4
    (epochs,) = {round(before / after, 1) for before, after in pairwise(left[:2])}
    assert epochs == pytest.approx(3100 / 2100, abs=0.1), "a third of the seconds went, and a third of the epochs"


def test_seconds_are_not_measured_where_nobody_charges_for_them(ended):
    assert {option.seconds_share for seen in ended.desk.observations for option in seen.options} == {None}


@pytest.mark.parametrize("policy", [{"rent_seconds": 0.1}, {"min_free_memory": 0.01}], ids=["seconds", "memory"])
def test_a_job_whose_decisions_depend_on_the_machine_says_that_it_cannot_be_resumed_exactly(blobs, policy):
    (key,) = policy
    started = desks.train_until(job(**policy), blobs, lambda _desk: "pause").of(TrainingStarted)[0]
    assert not started.exact_resume
    assert f"policy.{key}" in started.inexact_because


def test_taking_the_time_of_a_seed_leaves_everything_as_it_was():
    grown = grower(source=Kernels())
    steps(grown, batches_of_epoch(0))
    assert grown.apply(germinate("conv_light", "first")) is None
    seed = next(grown.network.seeds())
    before, streams = tensors_of(grown), Streams.take(torch.device("cpu"))
    ticks = iter(range(1000))
    assert seconds_share(grown, seed, clock=lambda: next(ticks)) == 1.0
    assert same(tensors_of(grown), before)
    assert torch.equal(torch.get_rng_state(), streams.cpu)
    assert seed.stage is Stage.TRAINING
    (record,) = grown.records()
    (cost,) = (cost for work, cost in grown.ledger.costs.items() if work.startswith("trial:seconds"))
    assert cost > record.flops_per_sample
    assert grown.ledger.spent["trial"] == pytest.approx((ROUNDS + 1) * len(grown.sample[0]) * cost), "every pass is charged"
    assert seconds_share(grown, seed, clock=lambda: 0.0) is None, "a clock that does not move says nothing"
    grown.sample = None
    assert seconds_share(grown, seed) is None


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_where_memory_is_short_nothing_is_grown(blobs, monkeypatch):
    monkeypatch.setattr(runs, "headroom", lambda _device: Headroom(where="machine", free_bytes=2**20, total_bytes=2**30))
    told = desks.train(job(min_free_memory=0.05), blobs)
    assert told.report.seeds == ()
    reasons = " ".join(event.decision.reason for event in told.desk.of(DecisionMade))
    assert "memory is short: 1 of 1024 MiB are free (machine)" in reasons
