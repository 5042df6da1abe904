"""Contests and gradient merits: arms measured in forks, before anything is grown; the grower itself does not move."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch
from small_growth import BATCH, GATE, PLUGINS, SAMPLES, Kernels, batches, epoch, germinate, grower, same, steps, tensors_of
from torch import nn

from esperd.errors import ActorUnavailable, BlueprintRejected, InvalidModel
from esperd.growth.candidate import NotGrown
from esperd.growth.contest import contest
from esperd.growth.merit import gradient_merit
from esperd.growth.source import GrownModule
from esperd.messages.policy import Arm

ARMS = (Arm(slot="first", blueprint="conv_light"), Arm(slot="first", blueprint="norm"))


def train():
    for number in itertools.count(1000):
        yield from batches(number)


def started(**options):
    """A grower after its first epoch."""
    grown = grower(dropout=options.pop("dropout", 0.2), **options)
    torch.manual_seed(0)
    epoch(grown)
    return grown


def held(grown, arms=ARMS, *, epochs=1.0, **options):
    return list(contest(grown, arms, train, lambda: [GATE], epochs=epochs, **options))


def test_nothing_moves_but_the_ledger():
    grown = started()
    grown.optimizer.zero_grad()
    before, rng, spent = tensors_of(grown), torch.get_rng_state(), dict(grown.ledger.spent)
    standing = (grown.step, grown.epoch, grown.records(), grown.network.germinated)
    found = held(grown)
    gradient_merit(grown, ARMS[0], train, batches=3)
    assert same(before, tensors_of(grown))
    assert torch.equal(rng, torch.get_rng_state())
    assert (grown.step, grown.epoch, grown.records(), grown.network.germinated) == standing
    assert grown.ledger.spent["trial"] > sum(made.trial.flops for made in found)
    assert grown.ledger.spent == {**spent, "trial": grown.ledger.spent["trial"]}
    assert {parameter.grad is None for parameter in grown.network.parameters()} == {True}


def test_every_contender_may_spend_as_much_as_the_network_as_it_is():
    grown = started()
    found = held(grown, epochs=4.0)
    step = grown.ledger.cost("train", "host") * BATCH
    allowed = 4 * grown.steps_per_epoch * step
    light, norm = found
    assert norm.trial.steps_without == 4 * grown.steps_per_epoch == norm.trial.steps_with, "a norm has no products"
    assert 1 < light.trial.steps_with < norm.trial.steps_with, "what costs more takes fewer steps"
    assert light.trial.samples == SAMPLES
    seed = PLUGINS.blueprints["conv_light"].flops(grown.network.port("first").record.shape)
    assert abs(light.trial.steps_with - allowed / (step + 3 * seed * BATCH)) <= 1
    assert grown.ledger.cost("train", "first#0") is None, "the seed that is grown may be another of this name"


def test_contenders_may_take_the_same_steps_instead():
    assert {made.trial.steps_with for made in held(started(), epochs=2.0, equal="steps")} == {2 * (SAMPLES // BATCH)}


def test_who_cannot_afford_a_single_step_is_told_so_and_is_not_measured_at_more_than_the_others_may_spend():
    grown = started()
    light, norm = held(grown, epochs=1.9 / grown.steps_per_epoch)
    assert (norm.trial.steps_with, norm.trial.steps_without) == (1, 1), "an allowance is not rounded up"
    assert light.trial is None
    assert "one step with it takes more than the" in light.why_not


def test_where_not_even_the_network_as_it_is_affords_a_step_nobody_competes_and_nothing_is_spent():
    grown = started()
    before = dict(grown.ledger.spent)
    found = held(grown, epochs=0.8 / grown.steps_per_epoch)
    assert [made.trial for made in found] == [None, None]
    assert all(f"0.2 epochs of {grown.steps_per_epoch} steps are less than one step" in made.why_not for made in found)
    assert grown.ledger.spent == before


def test_a_contest_is_the_same_again_and_does_not_depend_on_who_else_competes():
    grown = started()
    both = held(grown)
    assert held(grown) == both
    assert held(grown, ARMS[1:]) == both[1:]


class Dead(nn.Module):
    """Returns its input, and has nothing to learn with."""

    def forward(self, x):
        return x


class Arms(Kernels):
    """Sketches, and three that go wrong, each in its way; kernels are not to be had."""

    def grow(self, *_):
        raise ActorUnavailable("the cache is between two incarnations")

    def sketch(self, blueprint, slot, seed, operator):
        if blueprint == "broken":
            raise BlueprintRejected("its factory fails")
        grown = super().sketch("norm" if blueprint == "deaf" else blueprint, slot, seed, operator)
        if blueprint == "deaf":
            return GrownModule(module=Dead(), operator=grown.operator, parameters=0, flops_per_sample=0.0)
        return grown

    def min_gradient_ratio(self, blueprint):
        return None

    def unfit(self, blueprint, slot):
        return "it is for transformer slots" if blueprint == "unfit" else ""


@pytest.mark.parametrize(
    ("blueprint", "told"),
    [("unfit", "transformer slots"), ("broken", "blueprint_rejected: its factory fails"), ("deaf", "no parameters")],
)
def test_an_arm_that_cannot_be_grown_is_told_with_the_reason_and_the_others_compete(blueprint, told):
    grown = started(source=Arms())
    wrong, right = held(grown, (Arm(slot="first", blueprint=blueprint), ARMS[1]))
    assert wrong.trial is None
    assert told in wrong.why_not
    assert right.trial is not None
    if blueprint != "deaf":  # no gate is asked about a merit
        with pytest.raises(NotGrown):
            gradient_merit(grown, Arm(slot="first", blueprint=blueprint), train, batches=1)


def test_what_an_arm_cost_that_came_to_nothing_is_charged():
    grown = started(source=Arms())
    before = grown.ledger.spent["trial"]
    held(grown, ())
    nobody = grown.ledger.spent["trial"] - before
    held(grown, (Arm(slot="first", blueprint="deaf"),))
    assert grown.ledger.spent["trial"] - before > 2 * nobody, "a gate refused what its probe showed, and the probe has passes"

    def breaking():
        inputs, targets = next(train())
        yield inputs, targets
        yield inputs[:, :, :0], targets

    before = grown.ledger.spent["trial"]
    gradient_merit(grown, ARMS[0], train, batches=1)
    one = grown.ledger.spent["trial"] - before
    with pytest.raises(NotGrown, match="its pass raised"):
        gradient_merit(grown, ARMS[0], breaking, batches=2)
    assert grown.ledger.spent["trial"] - before == 2 * one > 0.0, "the batch before it was paid for"


def test_an_arm_whose_slot_is_taken_does_not_compete():
    grown = started()
    grown.apply(germinate("conv_light", "first"))
    (found,) = held(grown, ARMS[:1])
    assert found.trial is None
    assert "first" in found.why_not


@pytest.mark.parametrize("incubation", ["frozen_input", "lookahead"])
def test_a_seed_that_incubates_favours_nobody(incubation):
    """Its mode would have the host of the network as it is stand still, or pay for second passes, and no contender's."""
    grown = started(incubation=incubation, incubation_epochs=9, dropout=0.0)
    other = next(record for record in grown.network.slots if record.slot != "first")
    refusal = grown.apply(germinate("mlp_residual" if other.topology == "mlp" else "conv_light", other.slot))
    assert refusal is None
    steps(grown, batches(1))
    assert grown.incubating()
    found = held(grown, epochs=2.0)
    grown.growth = msgspec.structs.replace(grown.growth, incubation="joint")
    assert held(grown, epochs=2.0) == found


def test_the_rate_falls_to_nothing_on_the_way(monkeypatch):
    told = []
    monkeypatch.setattr(
        "esperd.growth.contest.set_learning_rate",
        lambda optimizer, rate, step: told.append(rate),
    )
    grown = started()
    steps = 2 * grown.steps_per_epoch
    held(grown, (), epochs=2.0)
    assert told == pytest.approx([grown.host_learning_rate() * (1 - taken / steps) for taken in range(steps)])


def test_a_merit_is_the_norm_of_the_mean_gradient_and_asks_nothing_of_the_modules_scale():
    grown = started(dropout=0.0)
    one, many = (gradient_merit(grown, ARMS[0], train, batches=count) for count in (1, 6))
    assert 0.0 < many < one * 1.5
    assert gradient_merit(grown, ARMS[0], train, batches=6) == many


def test_a_contest_takes_a_length_and_a_merit_a_batch():
    grown = started()
    with pytest.raises(ValueError, match="above 0"):
        held(grown, epochs=0.0)
    with pytest.raises(ValueError, match="at least one batch"):
        gradient_merit(grown, ARMS[0], train, batches=0)


def test_a_network_that_cannot_be_copied_says_so():
    grown = started()
    grown.network.host.kept = torch.ones(1, requires_grad=True) * 2  # a graph on the module
    with pytest.raises(InvalidModel, match="cannot be copied"):
        held(grown)
