"""Grown networks whose seeds are there for good: what leaves esperd, in the tests of every way out."""

from __future__ import annotations

import small_growth as small
import torch
from torch import nn

from esperd.execution.oplist import load_kernel
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots


def add_seed(network: GrowingNetwork, blueprint: str, slot: str, *, alpha: float = 1.0) -> None:
    """A fossilized seed on its kernel, with weights that do something."""
    record = network.port(slot).record
    compiled = small.kernel(blueprint, record.shape)
    module = load_kernel(compiled.graph, compiled.weights)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    seed = small.seed_of(module, record, network.germinated, alpha=alpha, graph=compiled.graph.decode())
    seed.blueprint = blueprint
    network.germinated += 1
    network.insert(seed)


def convolutional() -> tuple[GrowingNetwork, torch.Tensor]:
    """BatchNorm, dropout, two slots that are containers, one seed that is heard at 0.7."""
    network = small.network()
    add_seed(network, "conv_light", "first", alpha=0.7)
    add_seed(network, "squeeze_excite", "second")
    return network, small.GATE[0][:5]


class Perceptron(nn.Module):
    """Looks at a layer that a seed stands behind, as well as calling it."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.head = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.act(self.first(x))) + self.first.weight.sum()


def perceptron() -> tuple[GrowingNetwork, torch.Tensor]:
    """Two seeds behind one layer, the second of them with layers of its own that tools look for."""
    host, x = Perceptron(), torch.randn(4, 8)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("first", "act")))
    add_seed(network, "mlp_low_rank", "first", alpha=0.4)
    add_seed(network, "mlp_residual", "first")
    return network, x


def channels_last() -> tuple[GrowingNetwork, torch.Tensor]:
    """Its tensors lie in memory as (B, H, W, C), and its seed normalises groups of channels."""
    host = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    host = host.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("1",)))
    add_seed(network, "norm", "1", alpha=0.9)
    return network, x


class Tied(nn.Module):
    """One matrix under two names, and one layer under two names and in a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.b.weight = self.a.weight
        self.alias = self.b
        self.order = [self.a, self.b]

    def forward(self, x):
        for layer in self.order:
            x = layer(x).tanh()
        return self.head(x)


def tied() -> tuple[GrowingNetwork, torch.Tensor]:
    """A seed behind the layer that is called by no name of its own."""
    host, x = Tied(), torch.randn(4, 6)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("b",)))
    add_seed(network, "mlp_low_rank", "b", alpha=0.8)
    return network, x


class Fused(nn.Module):
    """As torch's transformer layers do: evaluating without gradients, it reads its layer's weights, unless that is hooked."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        fused = not self.training and not self.first._forward_hooks and not torch.is_grad_enabled()
        return self.head(nn.functional.linear(x, self.first.weight, self.first.bias) if fused else self.first(x))


def fused() -> tuple[GrowingNetwork, torch.Tensor]:
    """A seed that the host would step around."""
    host, x = Fused(), torch.randn(4, 6)
    network = GrowingNetwork(host, find_slots(host, x, patterns=("first",)))
    add_seed(network, "mlp_low_rank", "first")
    return network, x


BUILDERS = {"cnn": convolutional, "mlp": perceptron, "channels_last": channels_last, "tied": tied, "fused": fused}


def build(name: str) -> tuple[GrowingNetwork, torch.Tensor]:
    """A network, in eval mode, and inputs (B, ...) for it; the same at every call."""
    torch.manual_seed(7)
    network, x = BUILDERS[name]()
    return network.eval(), x
