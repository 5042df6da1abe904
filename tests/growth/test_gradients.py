"""Gradient statistics: the ratio's formula, its bias correction, and what is unknown stays unknown."""

from __future__ import annotations

import pytest
import torch
from small_growth import batches, germinate, grower, steps
from torch import nn

from esperd.growth.gradients import DECAY, EXPLODING, RATIO_CEILING, STRIDE, GradientHealth, GradientRatio, gradient_norms
from esperd.growth.optimizer import set_learning_rate
from esperd.messages.jobs import Optimizer


def ratio(host: int = 100, *sizes: int) -> GradientRatio:
    return GradientRatio(host, sizes or (25,))


def test_norms_are_one_for_each_parameter_and_zero_where_there_is_no_gradient():
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    assert gradient_norms(parameters) is None
    parameters[0].grad, parameters[2].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert torch.equal(gradient_norms(parameters), torch.tensor([5.0, 0.0, 2.0]))


def test_the_ratio_is_of_norms_per_root_of_parameters():
    gathered = ratio(100, 25)
    gathered.observe(torch.tensor([3.0, 4.0]), torch.tensor([1.0]))  # norms 5 and 1
    assert gathered.read().ratio == pytest.approx(1 / 5 * (100 / 25) ** 0.5)


def test_a_seed_whose_parameters_move_as_the_hosts_do_has_a_ratio_of_one():
    gathered = ratio(400, *[1] * 9)
    gathered.observe(torch.full((400,), 0.1), torch.full((9,), 0.1))
    assert gathered.read().ratio == pytest.approx(1.0)


def test_first_samples_count_as_what_they_are():
    gathered = ratio(1, 1)
    for samples in range(1, 6):
        gathered.observe(torch.ones(1), torch.ones(1) * 0.3)
        assert gathered.read().ratio == pytest.approx(0.3), f"after {samples} samples"


def test_later_samples_weigh_more():
    gathered = ratio(1, 1)
    for value in (1.0, 2.0):
        gathered.observe(torch.ones(1), torch.ones(1) * value)
    expected = ((1 - DECAY) * DECAY * 1.0 + (1 - DECAY) * 2.0) / (1 - DECAY**2)
    assert gathered.read().ratio == pytest.approx(expected)


def test_the_vanished_share_is_a_mean_over_tensors_and_samples():
    gathered = ratio(100, 1, 1, 1, 1)
    gathered.observe(torch.ones(1), torch.tensor([1.0, 1e-9, 0.0, 1.0]))
    gathered.observe(torch.ones(1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert gathered.read().vanished_share == pytest.approx((0.5 + 0.25) / 2)


def test_a_gradient_has_exploded_when_its_elements_are_far_above_the_hosts_or_no_number():
    gathered = ratio(100, 4, 4, 4, 1)
    host = torch.tensor([10.0])  # of 100 parameters: root mean square 1
    above, below = 2 * EXPLODING * 1.01, 2 * EXPLODING * 0.99  # of 4 elements
    gathered.observe(host, torch.tensor([above, below, float("inf"), 1.0]))
    assert gathered.read().exploded_share == pytest.approx(0.5)


def test_nothing_measured_is_unknown_not_zero():
    gathered = ratio()
    gathered.observe(torch.ones(1), None)
    assert gathered.read() == GradientHealth(ratio=None, vanished_share=None, exploded_share=None)


def test_without_a_host_to_compare_with_health_is_known_and_the_ratio_is_not():
    gathered = ratio(100, 1, 1)
    gathered.observe(None, torch.tensor([1e9, 0.0]))
    assert gathered.read() == GradientHealth(ratio=None, vanished_share=0.5, exploded_share=0.0)
    gathered.observe(None, torch.tensor([float("inf"), 1.0]))
    assert gathered.read() == GradientHealth(ratio=None, vanished_share=0.25, exploded_share=0.25)


def test_a_host_without_gradient_has_no_ratio_to_give():
    gathered = ratio()
    gathered.observe(torch.zeros(3), torch.ones(1))
    assert gathered.read() == GradientHealth(ratio=None, vanished_share=0.0, exploded_share=0.0)


def test_a_step_without_a_host_gradient_leaves_what_is_known_as_it_was():
    gathered = ratio(1, 1)
    gathered.observe(torch.ones(1), torch.ones(1) * 0.4)
    gathered.observe(torch.zeros(1), torch.ones(1))
    assert gathered.read().ratio == pytest.approx(0.4)


def test_a_ratio_is_clamped_where_it_carries_no_information():
    gathered = ratio()
    gathered.observe(torch.full((1,), 1e-6), torch.full((1,), 1e6))
    assert gathered.read().ratio == pytest.approx(RATIO_CEILING)


def test_a_gradient_that_is_not_a_number_gives_no_ratio_and_hides_none():
    gathered = ratio()
    gathered.observe(torch.ones(1), torch.tensor([float("nan")]))
    assert gathered.read().ratio is None
    gathered.observe(torch.ones(1), torch.ones(1))
    assert gathered.read() == GradientHealth(ratio=pytest.approx(2.0), vanished_share=0.0, exploded_share=0.5)


def test_a_host_whose_norm_is_not_finite_says_nothing_of_the_ratio():
    ratio = GradientRatio(10, [4])
    ratio.observe(torch.tensor([torch.inf]), torch.tensor([1.0]))
    assert ratio.read().ratio is None


def test_statistics_are_of_gradients_as_they_are_and_not_as_they_are_clipped():
    plain, clipped = (grower(optimizer=Optimizer(max_gradient_norm=limit), dropout=0.0) for limit in (None, 1e-3))
    for grown in (plain, clipped):
        assert grown.apply(germinate("conv_light", "first")) is None
        set_learning_rate(grown.optimizer, 0.0, 0)  # so that both have the same gradients at every step
        steps(grown, batches(0)[:STRIDE])
    norms = [gradient_norms(grown.network.seed("first#0").parameters()).norm() for grown in (plain, clipped)]
    assert norms[0] > 1e-3 >= norms[1] * (1 - 1e-3)
    health = [grown.incubator.health(grown.network.seed("first#0")) for grown in (plain, clipped)]
    assert health[0].ratio is not None
    assert health[0] == health[1]
