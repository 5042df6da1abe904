"""Controlled trials: twins from one state, the same samples and draws, the same FLOPs; the grower itself does not move."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_growth import (
    BATCH,
    GATE,
    SAMPLES,
    Kernels,
    batches,
    end,
    epoch,
    germinate,
    grower,
    same,
    seed_of,
    steps,
    tensors_of,
    until,
)
from torch import nn

from esperd.errors import IllegalTransition, InvalidModel, InvalidSlot, TrainingDiverged
from esperd.growth.fork import fork
from esperd.growth.lifecycle import Life
from esperd.growth.streams import Streams, forked
from esperd.growth.trial import controlled_trial
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Optimizer
from esperd.messages.policy import Decision
from esperd.messages.telemetry import TrialMeasured


class Samples:
    """The train split over and over, in orders that follow from the epoch."""

    def train(self, start):
        for number in itertools.count(1000 + start):
            yield from batches(number)

    def gate(self):
        return [GATE]


def tried(grown, name, length=8):
    return controlled_trial(grown, name, lambda: Samples().train(0), Samples().gate, steps=length)


class Channels(nn.Module):
    """Mixes channels: something a host with few of them can use."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        self.shift = shift

    def forward(self, x):
        return x + self.mix(x) + self.shift


def growing(module=None, **options):
    """A grower whose network hears one seed, on probation."""
    grown = grower(dropout=options.pop("dropout", 0.2), **options)
    torch.manual_seed(0)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    seed = until(grown, "first#0", Stage.PROBATIONARY)
    if module is not None:
        seed.module = module
    grown.batches = Samples()
    return grown


@pytest.mark.parametrize("optimizer", [Optimizer(name="sgd"), Optimizer(name="adamw")], ids=["sgd", "adamw"])
@pytest.mark.parametrize("incubation", ["lookahead", "joint", "straight_through"])
def test_a_fork_trained_on_ends_where_the_original_would(optimizer, incubation):
    grown = grower(optimizer=optimizer, incubation=incubation, incubation_epochs=2)
    torch.manual_seed(0)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    steps(grown, batches(grown.epoch)[:3])
    start, twin = Streams.take(torch.device("cpu")), fork(grown)
    before = tensors_of(grown)
    with forked(start.device, start):
        steps(twin, batches(9))
        end(twin)
    assert same(before, tensors_of(grown)), "what happens to a fork reaches nobody"
    with forked(start.device, start):
        steps(grown, batches(9))
        end(grown)
    assert same(tensors_of(grown), tensors_of(twin))
    assert grown.records() == twin.records()
    assert grown.gate_loss == twin.gate_loss


def test_a_forks_events_and_costs_are_its_own():
    events = []
    grown = grower(events)
    epoch(grown)
    spent = dict(grown.ledger.spent)
    twin = fork(grown)
    twin.apply(germinate("conv_light", "first"))
    assert twin.ledger.total > 0.0
    assert events == []
    assert grown.ledger.spent == spent
    assert list(grown.network.seeds()) == []


def test_the_grower_does_not_move_and_is_charged_for_both_twins():
    grown = growing()
    before, rng, spent = tensors_of(grown), torch.get_rng_state(), dict(grown.ledger.spent)
    standing = (grown.step, grown.epoch, grown.records())
    found = tried(grown, "first#0")
    assert same(before, tensors_of(grown))
    assert torch.equal(rng, torch.get_rng_state())
    assert (grown.step, grown.epoch, grown.records()) == standing
    assert grown.ledger.spent == {**spent, "trial": found.flops}
    step = grown.ledger.cost("train", "first#0")
    alone = grown.ledger.cost("train", "host")
    gates = SAMPLES * (grown.ledger.cost("gate", "first#0") + grown.ledger.cost("gate", "host"))
    assert found.flops == BATCH * (found.steps_with * step + found.steps_without * alone) + gates


def test_both_twins_cost_the_same_so_the_one_without_takes_more_steps():
    grown = growing()
    found = tried(grown, "first#0", length=20)
    step, alone = grown.ledger.cost("train", "first#0"), grown.ledger.cost("train", "host")
    assert found.steps_with == 20
    assert found.steps_without == int(20 * step / alone)
    assert found.steps_without > 20


def test_a_trial_is_the_same_again():
    grown = growing()
    assert tried(grown, "first#0") == tried(grown, "first#0")


def test_a_seed_that_is_in_the_way_has_a_trial_below_0_and_one_that_carries_one_above_it():
    grown = growing(dropout=0.0)
    seed = grown.network.seed("first#0")
    for parameter in seed.parameters():
        parameter.requires_grad_(False)
    seed.module = Noise()
    harmful = tried(grown, "first#0", length=16)
    assert harmful.upper < 0.0
    assert harmful.metric < 0.0
    assert harmful.samples == SAMPLES
    assert harmful.confidence == grown.settings.confidence


class Noise(nn.Module):
    """Drowns what flows by."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return 0.0 * x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) + self.anchor


def test_a_trial_says_less_than_a_contribution_of_what_the_host_has_given_up():
    """The seed undoes a shift that the host has learned to expect: without it the network is lost, until it has trained on."""
    grown = grower(dropout=0.0, optimizer=Optimizer(name="sgd", learning_rate=0.1))
    torch.manual_seed(0)
    seed = seed_of(Channels(shift=1.5), grown.network.slots[0])
    seed.life = Life(stage=Stage.PROBATIONARY)
    grown.network.insert(seed)
    for _ in range(12):
        steps(grown, batches(grown.epoch))
        grown.epoch += 1
    grown.measure([GATE])
    assert seed.contribution.lower > 0.1
    found = tried(grown, "first#0", length=80)
    assert found.loss < 0.5 * seed.contribution.loss


def test_a_trial_needs_a_seed_that_is_heard_and_a_step():
    grown = grower(incubation_epochs=3)
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    with pytest.raises(IllegalTransition, match="first#0 is training at alpha 0; a trial needs a seed that is heard"):
        tried(grown, "first#0")
    with pytest.raises(InvalidSlot, match="no seed 'second#7'"):
        tried(grown, "second#7")
    with pytest.raises(ValueError, match="at least one step, not 0"):
        tried(growing(), "first#0", length=0)


def test_a_twin_that_diverges_is_named():
    grown = growing(settings=Gates(max_loss_drift=1e6, max_loss_spike=1e6))
    for group in grown.optimizer.param_groups:
        group["lr"] = 1e30
    with pytest.raises(TrainingDiverged, match="in the trial of first#0 the twin with it ended with a gate loss of"):
        tried(grown, "first#0", length=3)


def decision(action):
    return Decision(action=action, seed="first#0", reason="a test wants it")


def test_a_decision_may_ask_for_a_trial_and_the_record_holds_what_it_found():
    events = []
    grown = growing()
    grown.emit = events.append
    assert grown.apply(decision("trial")) is None
    (event,) = events
    assert event == TrialMeasured(epoch=grown.epoch, seed="first#0", trial=grown.network.seed("first#0").trial)
    assert grown.records()[0].trial == event.trial
    assert event.trial.steps_with == grown.steps_per_epoch


def test_where_the_proof_is_a_trial_it_is_run_when_somebody_wants_to_fossilize():
    events = []
    grown = growing(settings=Gates(proof="trial", trial_epochs=0.5, min_contribution=-100.0))
    grown.emit = events.append
    assert grown.apply(decision("fossilize")) is None
    seed = grown.network.seed("first#0")
    assert seed.stage is Stage.FOSSILIZED
    assert seed.verdict.numbers["trial"] == seed.trial.loss
    assert seed.trial.steps_with == grown.steps_per_epoch // 2
    assert grown.outcomes[0].trial == seed.trial


def test_a_trial_that_was_just_run_is_not_run_again():
    grown = growing(settings=Gates(proof="trial", min_contribution=100.0))
    grown.apply(decision("trial"))
    spent = grown.ledger.spent["trial"]
    assert "trial" in grown.apply(decision("fossilize"))
    assert grown.ledger.spent["trial"] == spent
    epoch(grown)
    grown.apply(decision("fossilize"))
    assert grown.ledger.spent["trial"] > spent, "the last one is stale"


def test_without_batches_no_trial_is_run():
    grown = growing()
    grown.batches = None
    with pytest.raises(IllegalTransition, match=r"give it some as Grower\.batches"):
        grown.apply(decision("trial"))


def test_a_plain_module_can_be_tried_too():
    grown = grower(source=Kernels(portable=False), dropout=0.0)
    torch.manual_seed(0)
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    assert tried(grown, "first#0", length=2).steps_with == 2


def probationary(**options):
    grown = grower(**{"incubation": "joint", **options})
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    grown.network.train()
    return grown


def test_a_trial_that_fails_is_charged_what_it_spent():
    grown = probationary()
    good = [batch for index in range(5) for batch in batches(index)]
    broken = (torch.full_like(good[0][0], math.nan), good[0][1])
    with pytest.raises(TrainingDiverged):
        controlled_trial(grown, "first#0", lambda: itertools.chain(good, itertools.repeat(broken)), lambda: [GATE], steps=22)
    assert grown.ledger.spent["trial"] > 20 * BATCH * grown.ledger.cost("train", "host")


modes: list[bool] = []


class TellsItsMode(nn.Module):
    def forward(self, x):
        modes.append(self.training)
        return x


def test_the_twins_of_a_trial_keep_what_the_user_froze():
    grown = probationary()
    grown.network.host.dropout = TellsItsMode().eval()
    modes.clear()
    tried(grown, "first#0", 2)
    assert modes
    assert not any(modes)


class KeepsItsLoss(nn.Module):
    """Keeps a term for the loss on itself while it trains, graph and all."""

    def forward(self, x):
        if self.training:
            self.kept = x.square().mean() * nn.Parameter(torch.ones(()))
        return x


def test_a_network_that_cannot_be_copied_says_so():
    grown = probationary()
    grown.network.host.dropout = KeepsItsLoss()
    grown.train_step(*batches(0)[0])
    with pytest.raises(InvalidModel, match=r"cannot be copied, as a fork and a controlled trial need it.*must detach it"):
        controlled_trial(grown, "first#0", lambda: iter(batches(3) * 9), lambda: [GATE], steps=2)
