"""Shared passes: from a slot on, a pass computes what a whole one would, whatever the host does with its tensors."""

from __future__ import annotations

import pytest
import torch
from small_growth import BATCH, TRAIN, batches, epoch, germinate, grower, loss, network, same, seed_of, steps
from torch import nn

from esperd.builtins.seeds.cnn import conv_light
from esperd.growth.flops import count_flops
from esperd.growth.gradients import gradient_norms
from esperd.growth.incubation import Incubator, lookahead_gradients
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork
from esperd.growth.precision import Precision
from esperd.growth.replay import OrderChanged, Recording, calls_before
from esperd.growth.slots import find_slots
from esperd.growth.streams import Streams

X, Y = TRAIN[0][:BATCH], TRAIN[1][:BATCH]


class Residual(nn.Module):
    """A block as torchvision writes it: activations in place, ``out += identity``, one ReLU module called twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Residual(4), Residual(4), Residual(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.blocks(self.relu(self.stem(x))).mean((2, 3)))


class Skips(nn.Module):
    """Carries a tensor around its slot and adds to it, in place, what the slot's module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Conv2d(1, 4, 1)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        aside = self.aside(x)
        aside += self.second(self.drop(self.first(x)))
        return self.head(self.drop(aside).relu().mean((2, 3)))


class Moody(nn.Module):
    """Takes another way in every other pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        x = self.first(x)
        x = self.second(x) if self.passes % 2 else self.second(self.second(x))
        return self.head(x.mean((2, 3)))


class Forgets(nn.Module):
    """Hands a tensor on through an attribute instead of a return value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Keeps()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.second(self.first(x))
        y = y + self.first.kept
        self.first.kept = None
        return self.head(y.mean((2, 3)))


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        self.kept = self.conv(x)
        return self.kept.relu()


def grown_host(host: nn.Module, slot: str) -> GrowingNetwork:
    net = GrowingNetwork(host, find_slots(host, X[:4], patterns=(slot,))).train()
    net.insert(seed_of(conv_light((4, 6, 6)), net.slots[0], alpha=0.0))
    with torch.no_grad():  # not at birth: a zero-initialised layer hides what stands before it
        for parameter in next(iter(net.seeds())).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return net


def taught(net: GrowingNetwork, passes: int = 3) -> tuple[Incubator, list[torch.Tensor]]:
    """An incubator that taught the network's seed for some steps, and the gradients of the last one."""
    seed = next(iter(net.seeds()))
    incubator = Incubator(net, loss, Ledger(), Precision(), 100)
    for _ in range(passes):
        with incubator.beside([seed], X):
            loss(net(X), Y).mean().backward()
        incubator.teach(seed, "host", X, Y)
    return incubator, [parameter.grad.clone() for parameter in seed.parameters()]


@pytest.mark.parametrize(
    ("host", "slot", "sharing"),
    [
        (ResNet, "blocks.1", "shared"),
        (ResNet, "blocks.0.conv2", "shared"),
        (ResNet, "blocks.2.bn2", "copied"),
        (Skips, "second", "copied"),
        (Forgets, "second", "whole"),
    ],
)
def test_a_pass_from_the_slot_gives_the_gradients_of_a_whole_one(host, slot, sharing):
    torch.manual_seed(0)
    net = grown_host(host(), slot)
    seed = next(iter(net.seeds()))
    torch.manual_seed(5)
    start = Streams.take(X.device)
    wanted = lookahead_gradients(net, seed, X, Y, loss, alpha=1.0, streams=start)
    incubator, found = taught(net, passes=1)
    assert incubator.sharing[slot] == sharing
    for mine, theirs in zip(found, wanted.gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert all(gradient.norm() > 0 for gradient in found)


HOSTS = [(ResNet, "blocks.1"), (ResNet, "blocks.0.conv2"), (Skips, "second"), (Forgets, "second")]


@pytest.mark.parametrize(("host", "slot"), HOSTS)
def test_a_host_is_the_same_to_the_bit_whether_a_seed_learns_beside_it_or_not(host, slot):
    gradients = []
    for learns in (False, True):
        torch.manual_seed(0)
        net = grown_host(host(), slot)
        torch.manual_seed(9)
        if learns:
            taught(net)
        else:
            for _ in range(3):
                loss(net(X), Y).mean().backward()
        state = {name: tensor for name, tensor in net.state_dict().items() if name.startswith("host.")}
        state |= {f"grad {name}": parameter.grad for name, parameter in net.host.named_parameters()}
        gradients.append({**state, "rng": torch.get_rng_state()})
    assert same(*gradients)


def test_a_pass_from_the_slot_runs_nothing_that_stands_before_it():
    net = grown_host(ResNet(), "blocks.2")
    recording = Recording(net, calls_before(net, X, ["blocks.2"])[0], copies=False)
    with recording.running():
        net(X)
    seed = next(iter(net.seeds()))
    called: list[str] = []
    for name, module in net.host.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.append(name))
    with recording.from_slot("blocks.2", copied=False):
        _, flops = count_flops(lambda: lookahead_gradients(net, seed, X, Y, loss, alpha=1.0))
    assert called == ["", "blocks", "head"]
    head, seed_flops = 2 * 4 * 3, 2 * 9 * 4 * 4 * 36
    assert flops == BATCH * (2 * head + 3 * seed_flops), "head and seed, there and back; the host's weights get no gradient"


def test_a_host_that_takes_another_way_is_noticed_and_served_by_whole_passes():
    torch.manual_seed(0)
    host = Moody()
    net = GrowingNetwork(host, find_slots(host, X[:4], patterns=("first",))).train()
    host.passes = 0
    plan, _ = calls_before(net, X, ["first"])
    recording = Recording(net, {"first": (*plan["first"], (host.second, 5))}, copies=False)
    with pytest.raises(OrderChanged), recording.running():
        net(X)


def test_copies_are_kept_until_it_is_known_that_nobody_needs_them():
    torch.manual_seed(0)
    net = grown_host(ResNet(), "blocks.1")
    incubator, _ = taught(net, passes=2)
    assert incubator.sharing == {"blocks.1": "shared"}
    assert all(kept.copy is None for kept in incubator._recording._kept.values())


def test_seeds_at_several_slots_learn_from_one_pass_of_the_host():
    together = grower(incubation_epochs=9)
    for slot in ("first", "second"):
        assert together.apply(germinate("conv_light", slot)) is None
    torch.manual_seed(3)
    steps(together, batches(0))
    for slot, name in (("first", "first#0"), ("second", "second#1")):
        alone = grower(incubation_epochs=9)
        alone.network.germinated = int(name[-1])
        assert alone.apply(germinate("conv_light", slot)) is None
        torch.manual_seed(3)
        steps(alone, batches(0))
        assert same(alone.network.seed(name).state_dict(), together.network.seed(name).state_dict())


def test_a_resumed_run_traces_again_and_is_charged_nothing_for_it():
    torch.manual_seed(0)
    grown = grower(incubation_epochs=9, dropout=0.0)
    grown.apply(germinate("conv_light", "first"))
    epoch(grown)
    spent, step_cost = grown.ledger.spent["incubation"], grown.ledger.cost("incubation", "host+first#0")
    grown.incubator._plans.clear()
    steps(grown, batches(1)[:1])
    assert grown.ledger.spent["incubation"] - spent == pytest.approx(step_cost * BATCH)


def test_the_networks_own_norms_are_not_touched_by_a_second_pass():
    net = network()
    seed = seed_of(conv_light((4, 6, 6)), net.slots[0], alpha=0.0)
    net.insert(seed)
    net.train()
    assert gradient_norms(net.host.parameters()) is None
    lookahead_gradients(net, seed, X, Y, loss, alpha=1.0)
    assert gradient_norms(net.host.parameters()) is None
