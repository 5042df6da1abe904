"""What a module keeps for its backward pass is counted, once, without what is there anyway."""

from __future__ import annotations

import pytest
import torch
from small_growth import epoch, germinate, grower, network, seed_of
from small_growth import loss as per_sample_loss
from torch import nn

from esperd.execution.oplist import load_kernel
from esperd.growth.kept import kept_for_backward
from esperd.growth.probe import probe
from esperd.growth.snapshot import restore, take

X = torch.randn(5, 8)
FLOAT_BYTES = 4


def kept_by(module, inputs=X):
    entering = inputs.clone().requires_grad_().clone()
    with kept_for_backward(module, [entering]) as kept:
        output = module(entering)
    del output
    return kept.size_bytes


def test_a_linear_layer_keeps_its_input_and_weights_which_are_there_anyway():
    assert kept_by(nn.Linear(8, 3)) == 0


def test_what_lies_between_two_layers_is_kept():
    assert kept_by(nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8))) == 5 * 3 * FLOAT_BYTES


def test_a_tensor_that_two_operations_keep_is_counted_once():
    # tanh keeps its output, and the next layer keeps the same tensor as its input.
    assert kept_by(nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8))) == 5 * 3 * FLOAT_BYTES


@pytest.mark.parametrize("samples", [1, 4])
def test_it_grows_with_the_samples(samples):
    layers = nn.Sequential(nn.Linear(8, 3), nn.Tanh())
    assert kept_by(layers, torch.randn(samples, 8)) == samples * 3 * FLOAT_BYTES


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert kept_by(nn.Sequential(nn.Linear(8, 3), nn.Tanh())) == 0


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.Tanh(), nn.Conv2d(2, channels, 1))

    def forward(self, x):
        return x + self.layers(x)


def test_a_probe_measures_it_for_one_sample_and_costs_no_further_pass():
    net = network().train()
    slot = net.slots[0]
    passes = []
    module = Bottleneck(slot.shape[0])
    module.register_forward_hook(lambda *_: passes.append(1))
    net.insert(seed := seed_of(module, slot, alpha=0.0))
    shown = probe(net, seed, torch.randn(6, 1, 6, 6), torch.zeros(6, dtype=torch.int64), per_sample_loss, alpha=1.0)

    assert shown.activation_bytes == 2 * 6 * 6 * FLOAT_BYTES
    assert len(passes) == 1 + 3, "one to look at it, and three to learn"


def test_a_seed_that_writes_into_its_input_is_measured_as_it_is():
    net = network().train()
    net.insert(seed := seed_of(nn.ReLU(inplace=True), net.slots[0], alpha=0.0))
    shown = probe(net, seed, torch.randn(6, 1, 6, 6), torch.zeros(6, dtype=torch.int64), per_sample_loss, alpha=1.0)
    assert shown.shape_kept


def test_what_was_measured_stands_in_the_seeds_record_and_survives_a_checkpoint():
    grown = grower(incubation="lookahead")
    epoch(grown)
    assert grown.apply(germinate("conv_light", "first")) is None
    state, tensors = take(grown)
    restore(again := grower(incubation="lookahead"), state, tensors, lambda graph: load_kernel(graph.encode(), None))

    assert again.records()[0].activation_bytes == grown.records()[0].activation_bytes > 0
