"""Contribution: what the network loses without a seed, paired by sample, with an interval that says how sure that is."""

from __future__ import annotations

import math

import pytest
import torch
from small_growth import GATE, TRAIN, accuracy, epoch, grower, loss, network, same, seed_of
from torch import nn

from esperd.growth.contribution import Measured, fuses, measure
from esperd.growth.interval import SMALLEST_SAMPLE, mean_interval, student_quantile
from esperd.growth.lifecycle import Life
from esperd.messages.growth import Stage

TABLE = [
    (0.975, 7, 2.365),
    (0.975, 10, 2.228),
    (0.975, 30, 2.042),
    (0.975, 120, 1.980),
    (0.95, 10, 1.812),
    (0.95, 29, 1.699),
    (0.995, 7, 3.499),
    (0.995, 10, 3.169),
    (0.995, 60, 2.660),
]
"""Printed tables of Student's t."""


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
    for seed in list(trained.seeds()):
        trained.remove(seed.name)


def off(*names):
    return {name: {name: 0.0} for name in names}


def contribution(net, name, *, fused=False):
    return measure(net, [GATE], loss, accuracy, variants=off(name), fused=fused).contribution(name, confidence=0.95, epoch=3)


@pytest.mark.parametrize(("probability", "degrees", "value"), TABLE)
def test_quantiles_equal_the_printed_tables(probability, degrees, value):
    assert student_quantile(probability, degrees) == pytest.approx(value, rel=1e-3)
    assert student_quantile(1 - probability, degrees) == pytest.approx(-value, rel=1e-3)


def test_the_interval_of_eleven_pairs_equals_one_computed_by_hand():
    # mean 6, sum of squares 110, so variance 11 and half width 2.228 * sqrt(11 / 11)
    mean, lower, upper = mean_interval(torch.arange(1.0, 12.0), 0.95)
    assert (mean, lower, upper) == (6.0, pytest.approx(6 - 2.228, abs=2e-3), pytest.approx(6 + 2.228, abs=2e-3))


def test_the_interval_of_31_pairs_equals_one_computed_by_hand():
    # 15 times -1, 15 times 1 and once 0: mean 0, variance 30 / 30
    values = torch.tensor([-1.0] * 15 + [1.0] * 15 + [0.0])
    assert mean_interval(values, 0.95)[1:] == (
        pytest.approx(-2.042 / 31**0.5, rel=1e-3),
        pytest.approx(2.042 / 31**0.5, rel=1e-3),
    )


def test_a_higher_confidence_is_a_wider_interval():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    widths = [mean_interval(values, confidence)[2] - mean_interval(values, confidence)[1] for confidence in (0.8, 0.95, 0.99)]
    assert widths == sorted(widths)


@pytest.mark.parametrize("count", [1, 2, SMALLEST_SAMPLE - 1])
def test_too_few_pairs_bound_nothing(count):
    assert mean_interval(torch.ones(count), 0.95) == (1.0, -math.inf, math.inf)
    assert mean_interval(torch.ones(SMALLEST_SAMPLE), 0.95) == (1.0, 1.0, 1.0)


def test_no_pairs_have_no_mean():
    mean, lower, upper = mean_interval(torch.empty(0), 0.95)
    assert math.isnan(mean)
    assert (lower, upper) == (-math.inf, math.inf)


def test_nine_in_ten_intervals_of_level_09_hold_the_true_mean():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        _, lower, upper = mean_interval(torch.randn(12, generator=generator) + 2.0, 0.9)
        hits += lower <= 2.0 <= upper
    assert 870 <= hits <= 930


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


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_fused_ablations_equal_separate_ones(net, alpha):
    for index, slot in enumerate(net.slots):
        net.insert(seed_of(Shift(*[0.1 * (index + 1)] * slot.shape[0]), slot, index, alpha=alpha))
    net.insert(seed_of(Shift(*[-0.2] * 6), net.slots[1], 5, alpha=0.7))
    names = [seed.name for seed in net.seeds()]
    assert fuses(net, GATE, loss, off(*names))
    halves = [(GATE[0][:40], GATE[1][:40]), (GATE[0][40:], GATE[1][40:])]
    fused, separate = (measure(net, halves, loss, accuracy, variants=off(*names), fused=fused) for fused in (True, False))
    torch.testing.assert_close(fused.loss, separate.loss)
    for name in names:
        torch.testing.assert_close(fused.variants[name][0], separate.variants[name][0])
        assert torch.equal(fused.variants[name][1], separate.variants[name][1])
        assert not torch.equal(separate.variants[name][0], separate.loss)


def test_a_network_that_mixes_samples_is_not_fused(net):
    net.insert(seed_of(Shift(*[0.5] * 4), net.slots[0], 0))
    net.insert(seed_of(MixesSamples(), net.slots[1], 1))
    assert not fuses(net, GATE, loss, off("first#0"))


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

    first, second = (measure(net, [TRAIN], checked, variants=off("first#0"), fused=fused) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert [module.training for module in net.modules()] == modes
    assert same(net.state_dict(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


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
    separate = measure(net, [GATE], loss, variants=off("first#2"))
    assert torch.equal(measured.variants["without first#2"][0], separate.variants["first#2"][0])
