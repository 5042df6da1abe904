"""Contribution: what the network loses without a seed, paired by sample, with an interval that says how sure that is."""

from __future__ import annotations

import pytest
import torch
from small_growth import GATE, SAMPLES, TRAIN, accuracy, epoch, grower, loss, network, same, seed_of
from torch import nn

from esperd.errors import InvalidSlot
from esperd.growth.contribution import (
    Measured,
    ablations,
    evaluate,
    flops_of,
    fuses,
    measure,
    samples_tried,
)
from esperd.growth.flops import count_flops
from esperd.growth.interval import mean_interval
from esperd.growth.lifecycle import Life
from esperd.messages.growth import Stage


class Shift(nn.Module):
    """Adds a constant to each channel."""

    def __init__(self, *shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift).view(1, -1, 1, 1))

    def forward(self, x):
        return x + self.shift


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


class MixesSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x + self.anchor * (x - x.mean(0))


@pytest.fixture(scope="module")
def trained():
    """A grower whose network has learned its task."""
    grown = grower(dropout=0.0)
    torch.manual_seed(0)
    for _ in range(12):
        epoch(grown)
    assert grown.gate_loss < 0.7, "it is worth ablating"
    return grown.network


@pytest.fixture
def net(trained):
    yield trained
    trained.host._forward_pre_hooks.clear()
    for seed in list(trained.seeds()):
        trained.remove(seed.name)


def contribution(net, name, *, fused=False):
    measured = measure(net, [GATE], loss, accuracy, variants=ablations([name]), fused=fused)
    return measured.contribution(name, confidence=0.95, epoch=3)


def test_a_seed_that_harms_the_network_has_an_interval_below_0(net):
    net.insert(seed_of(Noise(), net.slots[1]))
    harmful = contribution(net, "second#0")
    assert harmful.upper < 0.0
    assert harmful.loss < 0.0
    assert harmful.metric < 0.0


def test_a_seed_that_carries_the_network_contributes_with_an_interval_above_0(net):
    # It undoes what the head was made to expect: the head's bias is moved, the seed moves it back.
    shift = torch.tensor([3.0, -2.0, 1.0, 2.0, -3.0, 1.0])
    bias = net.host.head.bias
    moved = net.host.head.weight @ shift
    with torch.no_grad():
        bias.sub_(moved)
    net.insert(seed_of(Shift(*shift.tolist()), net.slots[1]))
    helpful = contribution(net, "second#0")
    with torch.no_grad():
        bias.add_(moved)
    assert helpful.lower > 0.0
    assert helpful.lower < helpful.loss < helpful.upper
    assert helpful.metric > 0.0
    assert (helpful.samples, helpful.epoch, helpful.confidence) == (64, 3, 0.95)


def test_a_contribution_is_the_paired_mean_of_losses_without_minus_with(net):
    net.insert(seed_of(Noise(), net.slots[0], alpha=0.5))
    with_seed = measure(net, [GATE], loss).loss
    with net.alphas({"first#0": 0.0}):
        without = measure(net, [GATE], loss).loss
    found = contribution(net, "first#0")
    mean, lower, upper = mean_interval(without - with_seed, 0.95)
    assert (found.loss, found.lower, found.upper) == (mean, lower, upper)


def test_a_metric_that_nobody_asked_for_stays_unknown():
    measured = Measured(loss=torch.ones(9), metric=None, variants={"a#0": (torch.ones(9), None)})
    assert measured.mean_metric is None
    assert measured.contribution("a#0", confidence=0.9, epoch=1).metric is None


def test_a_contribution_can_have_a_bootstrap_interval(net):
    net.insert(seed_of(Noise(), net.slots[0], alpha=0.5))
    measured = measure(net, [GATE], loss, variants=ablations(["first#0"]))
    found = measured.contribution("first#0", confidence=0.9, epoch=3, interval="bootstrap", rng_seed=4)
    differences = measured.variants["first#0"][0] - measured.loss
    assert (found.loss, found.lower, found.upper) == mean_interval(differences, 0.9, "bootstrap", 4)
    assert found.lower != measured.contribution("first#0", confidence=0.9, epoch=3).lower


# --- variants ----------------------------------------------------------------------------------------------------------------


def furnish(net, alpha=1.0):
    """Three seeds at two slots, one of them not heard yet; variants that turn them off, on, up, and several at once."""
    for index, slot in enumerate(net.slots):
        net.insert(seed_of(Shift(*[0.1 * (index + 1)] * slot.shape[0]), slot, index, alpha=alpha))
    net.insert(seed_of(Shift(*[-0.2, 0.9] * 3), net.slots[1], 5, alpha=0.0))
    return {
        **ablations(["first#0", "second#1"]),
        "on": {"second#5": 0.7},
        "swapped": {"second#1": 0.0, "second#5": 1.0},
        "none": {"first#0": 0.0, "second#1": 0.0, "second#5": 0.0},
        "as it is": {},
    }


def halves():
    return [(GATE[0][:40], GATE[1][:40]), (GATE[0][40:], GATE[1][40:])]


def assert_agree(first, second):
    """Losses to rounding, metrics exactly."""
    assert first.variants.keys() == second.variants.keys()
    pairs = [((first.loss, first.metric), (second.loss, second.metric))]
    pairs += [(first.variants[name], second.variants[name]) for name in first.variants]
    for (losses, metrics), (losses2, metrics2) in pairs:
        torch.testing.assert_close(losses, losses2)
        assert torch.equal(metrics, metrics2)


def sizes_of_passes(net):
    """Grows while the network runs."""
    sizes = []
    net.host.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_a_variant_is_the_network_with_those_alphas(net):
    variants = furnish(net)
    measured = measure(net, [GATE], loss, accuracy, variants=variants)
    for name, alphas in variants.items():
        own = {seed.name: seed.alpha for seed in net.seeds()}
        for seed in net.seeds():
            seed.alpha = alphas.get(seed.name, seed.alpha)
        alone = measure(net, [GATE], loss, accuracy)
        for seed in net.seeds():
            seed.alpha = own[seed.name]
        assert torch.equal(measured.variants[name][0], alone.loss)
        assert torch.equal(measured.variants[name][1], alone.metric)
        assert torch.equal(alone.loss, measured.loss) == (name == "as it is")


def test_what_a_seed_would_bring_is_negative_minus_what_it_brings(net):
    # The same seed, heard and turned off, or not heard and turned on: one contribution, told from both ends.
    net.insert(seed_of(Noise(), net.slots[0], alpha=1.0))
    off = measure(net, [GATE], loss, accuracy, variants={"v": {"first#0": 0.0}}).contribution("v", confidence=0.9, epoch=0)
    net.seed("first#0").alpha = 0.0
    on = measure(net, [GATE], loss, accuracy, variants={"v": {"first#0": 1.0}}).contribution("v", confidence=0.9, epoch=0)
    assert (on.loss, on.lower, on.upper, on.metric) == (-off.loss, -off.upper, -off.lower, -off.metric)
    assert on.loss > 0.0, "without the noise the network is better"


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_fused_variants_equal_separate_ones(net, alpha):
    variants = furnish(net, alpha)
    assert fuses(net, GATE, loss, variants)
    fused, separate = (measure(net, halves(), loss, accuracy, variants=variants, fused=fused) for fused in (True, False))
    assert_agree(fused, separate)
    assert not torch.equal(separate.variants["swapped"][0], separate.loss)


@pytest.mark.parametrize("largest", [1, 60, 100, 10**6])
def test_a_stack_in_parts_equals_a_whole_one_and_no_part_is_larger_than_the_bound(net, largest):
    variants = furnish(net)
    whole = measure(net, halves(), loss, accuracy, variants=variants, fused=True)
    sizes = sizes_of_passes(net)
    parts = measure(net, halves(), loss, accuracy, variants=variants, fused=True, largest_pass=largest)
    assert_agree(parts, whole)
    assert sum(sizes) == SAMPLES * (1 + len(variants))
    assert max(sizes) <= max(largest, 40), "a batch that is larger by itself goes through alone"
    assert len(sizes) == {1: 14, 60: 7 + 4, 100: 4 + 2, 10**6: 2}[largest]


def test_separate_passes_run_one_configuration_each(net):
    variants = furnish(net)
    sizes = sizes_of_passes(net)
    measure(net, halves(), loss, variants=variants)
    assert sizes == [40] * 7 + [24] * 7


def test_without_variants_a_split_is_read_once(net):
    furnish(net)
    sizes = sizes_of_passes(net)
    measured = measure(net, iter(halves()), loss, fused=True)
    assert sizes == [40, 24]
    assert measured.variants == {}


def test_a_network_that_mixes_samples_is_not_fused(net):
    net.insert(seed_of(Shift(*[0.5] * 4), net.slots[0], 0))
    net.insert(seed_of(MixesSamples(), net.slots[1], 1))
    assert not fuses(net, GATE, loss, ablations(["first#0"]))


def test_fusing_is_tried_on_one_stack_of_all_variants_within_the_bound(net):
    # In stacks of two, the mixing seed and the one in front of it would never be off and on together.
    net.insert(seed_of(Shift(*[0.5] * 4), net.slots[0], 0))
    net.insert(seed_of(MixesSamples(), net.slots[1], 1))
    net.insert(seed_of(Shift(*[0.5] * 6), net.slots[1], 2))
    variants = {"behind": {"second#2": 0.0}, "before": {"first#0": 0.0}}
    sizes = sizes_of_passes(net)
    assert not fuses(net, GATE, loss, variants, largest_pass=60)
    assert sizes == [60, 20, 20, 20]
    assert samples_tried(64, variants, largest_pass=60) == 20
    assert samples_tried(64, variants) == 64
    assert samples_tried(64, variants, largest_pass=2) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_pass_is_foretold_to_the_flop(fused):
    net = network()
    convolutions = {"first#0": (net.slots[0], 4, 36), "second#1": (net.slots[1], 6, 9), "second#5": (net.slots[1], 6, 9)}
    for name, (slot, channels, _) in convolutions.items():
        module = nn.Conv2d(channels, channels, 3, padding=1)
        net.insert(seed_of(module, slot, int(name[-1]), alpha=0.0 if name == "second#5" else 1.0))
    host = 2 * 9 * 1 * 4 * 36 + 2 * 9 * 4 * 6 * 9 + 2 * 6 * 3
    cost = {name: 2 * 9 * channels**2 * places for name, (_, channels, places) in convolutions.items()}
    configurations = [
        {},
        {"first#0": 0.0},
        {"second#1": 0.0},
        {"first#0": 0.0, "second#1": 0.0},
        {"second#5": 1.0},
        {"second#1": 0.0, "second#5": 0.5},
    ]

    def cost_of(running):
        return host + sum(cost[name] for name in running)

    options = {"fused": fused, "largest_pass": 130}
    _, counted = count_flops(lambda: evaluate(net, halves(), loss, configurations=configurations, **options))
    assert flops_of(net, configurations, [40, 24], cost_of, **options) == counted


def test_a_seed_that_is_not_there_cannot_be_varied(net):
    with pytest.raises(InvalidSlot, match="there is no seed 'first#7'"):
        measure(net, [GATE], loss, variants=ablations(["first#7"]))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_an_alpha_is_between_0_and_1(net, alpha):
    net.insert(seed_of(Shift(*[0.5] * 4), net.slots[0], 0))
    with pytest.raises(ValueError, match=r"alpha .* of seed 'first#0' is not between 0 and 1"):
        measure(net, [GATE], loss, variants={"v": {"first#0": alpha}})


# --- nothing else moves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_measuring_leaves_modes_weights_and_gradients_alone(fused):
    net = network().train()
    net.host.first.eval()  # frozen statistics, as people do
    net.insert(seed_of(Shift(*[0.5] * 4), net.slots[0]))
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def checked(output, target):
        assert not net.host.dropout.training
        return loss(output, target)

    first, second = (measure(net, [TRAIN], checked, variants=ablations(["first#0"]), fused=fused) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert [module.training for module in net.modules()] == modes
    assert same(net.state_dict(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


class Restless(nn.Module):
    """Draws random numbers and counts its calls, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + self.anchor + self.calls * torch.randn_like(x)


def test_a_network_that_draws_in_eval_mode_leaves_no_trace_and_draws_the_same_for_every_variant(net):
    net.insert(seed_of(Restless(), net.slots[0], 0))
    net.insert(seed_of(Shift(*[0.5] * 6), net.slots[1], 1))
    before = torch.get_rng_state()
    measured = measure(net, halves(), loss, variants={"again": {}, "off": {"second#1": 0.0}})
    assert torch.equal(torch.get_rng_state(), before)
    assert net.seed("first#0").module.calls == 0
    assert torch.equal(measured.variants["again"][0], measured.loss), "paired: the same noise"
    assert not torch.equal(measured.variants["off"][0], measured.loss)


def test_modes_come_back_when_the_loss_raises():
    net = network().train()

    def raising(output, target):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        measure(net, [TRAIN], raising)
    assert net.training
    assert net.host.dropout.training


def test_a_grower_measures_its_probationary_seeds_and_remembers_whether_they_fuse():
    events = []
    grown = grower(events, dropout=0.0)
    seed = seed_of(Shift(*[0.3] * 4), grown.network.slots[0])
    seed.life = Life(stage=Stage.PROBATIONARY)
    grown.network.insert(seed)
    grown.epoch = 4
    measured = grown.measure([GATE])
    assert grown.gate_pass.fused is True
    assert seed.contribution == measured.contribution("without first#0", confidence=0.95, epoch=4)
    assert [type(event).__name__ for event in events] == ["ContributionMeasured"]


def test_a_grower_tries_fusing_anew_for_every_seed_it_never_measured():
    grown = grower(dropout=0.0)
    net = grown.network
    mixing = seed_of(MixesSamples(), net.slots[1], 0)
    behind = seed_of(Shift(*[0.3] * 6), net.slots[1], 1)
    before = seed_of(Shift(*[0.3] * 4), net.slots[0], 2)
    net.insert(mixing)
    behind.life = before.life = Life(stage=Stage.PROBATIONARY)
    net.insert(behind)
    grown.measure([GATE])
    assert grown.gate_pass.fused is True, "what mixes samples stands before the seed"
    net.insert(before)
    measured = grown.measure([GATE])
    assert grown.gate_pass.fused is False
    separate = measure(net, [GATE], loss, variants=ablations(["first#2"]))
    assert torch.equal(measured.variants["without first#2"][0], separate.variants["first#2"][0])
