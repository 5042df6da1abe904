"""Hosts that broke something once: channels-last, wrapped twice, read by more than one."""

from __future__ import annotations

import pytest
import small_growth as small
import torch
from torch import nn
from torch.nn import functional

from esperd.declarations import resolve
from esperd.errors import InvalidSlot
from esperd.execution.oplist import load_kernel
from esperd.growth.incubation import lookahead_gradients
from esperd.growth.merge import merge
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots
from esperd.plugins import load_plugins


@pytest.mark.parametrize("name", ["norm", "conv_light", "depthwise"])
def test_a_seed_incubates_in_a_channels_last_host(name):
    host = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    host = host.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    network = GrowingNetwork(host, find_slots(host, x, patterns=["1"]))
    module = resolve(load_plugins().blueprints[name].factory)((4, 6, 6))
    seed = small.seed_of(module, network.slots[0])
    network.insert(seed)

    def loss(output, target):
        return functional.cross_entropy(output, target, reduction="none")

    found = lookahead_gradients(network, seed, x, torch.tensor([0, 1, 0, 1]), loss, alpha=1.0).gradients
    assert any(gradient is not None and bool((gradient != 0).any()) for gradient in found)


def test_a_host_that_carries_seeds_of_another_network_is_refused_even_without_slots():
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    GrowingNetwork(host, find_slots(host, torch.randn(2, 4)))
    with pytest.raises(InvalidSlot, match="another network"):
        GrowingNetwork(host, ())


def test_a_reader_that_only_some_inputs_reach_keeps_the_seed():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.head = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x):
            h = self.act(self.first(x))
            y = self.head(h)
            return y + h.sum(1, keepdim=True) * (x.amin() < 0)

    host = Host()
    sample = torch.rand(16, 4)
    network = GrowingNetwork(host, find_slots(host, sample, patterns=["act"]))
    compiled = small.kernel("mlp_low_rank", (3,))
    module = load_kernel(compiled.graph, compiled.weights)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    network.insert(small.seed_of(module, network.slots[0], graph=compiled.graph.decode()))
    assert "no linear layer" in merge(network.eval(), sample).kept["act#0"]
