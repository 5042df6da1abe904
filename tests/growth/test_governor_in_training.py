"""The governor on real training: what is wild but healthy is left alone, what is injured and does not recover is caught."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from esperd.builtins.data.digits import digits
from esperd.builtins.networks.cnn import cnn
from esperd.growth.governor import GateObserved, Occurrence, Rollback, SnapshotTaken, StepsObserved, TakeSnapshot, Watch, advance
from esperd.messages.jobs import Governor

TRAINED, EPOCHS, RESTARTS, INJURED = 1078, 24, 3, 9
"""Samples that are trained on; epochs; cycles of a cosine with warm restarts; the epoch before which a run is injured."""
CHANCE = math.log(10)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. ``injure`` gets network and learning rate, and returns the rate from then on."""

    host: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    batch: int
    injure: Callable[[nn.Module, float], float] | None = None

    def looks(self) -> Iterator[Occurrence]:
        """What a governor sees of it."""
        torch.manual_seed(0)
        images, labels = (torch.from_numpy(part) for part in digits())
        order = torch.randperm(len(images))
        images, labels = images[order], labels[order]
        network, rate, step = self.host(), self.rate, 0
        optimizer = self.optimizer(network.parameters(), lr=rate)
        for epoch in range(EPOCHS):
            if epoch == INJURED and self.injure is not None:
                rate = self.injure(network, rate)
            network.train()
            for indices in torch.split(torch.randperm(TRAINED), self.batch):
                share = step * self.batch / (TRAINED * EPOCHS)
                for group in optimizer.param_groups:
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (share * RESTARTS % 1)))
                optimizer.zero_grad()
                loss = functional.cross_entropy(network(images[indices]), labels[indices])
                loss.backward()
                optimizer.step()
                step += 1
                yield StepsObserved(loss_sum_finite=math.isfinite(loss.item()), mean_loss=loss.item(), steps=1)
            network.eval()
            with torch.no_grad():
                yield GateObserved(float(functional.cross_entropy(network(images[TRAINED:]), labels[TRAINED:])), epoch + 1)


def first_rollback(looks: Iterable[Occurrence], chance_loss: float | None) -> Rollback | None:
    watch, settings = Watch(), Governor()
    for occurrence in looks:
        watch, told = advance(watch, occurrence, settings, chance_loss=chance_loss)
        for instruction in told:
            if isinstance(instruction, TakeSnapshot):
                watch, _ = advance(watch, SnapshotTaken(epoch=watch.epoch, live_seeds=0), settings)
            else:
                assert isinstance(instruction, Rollback)
                return instruction
    return None


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(cnn, torch.optim.AdamW, 0.03, 64),
        Recipe(cnn, sgd, 0.3, 64),
        Recipe(mlp, sgd, 0.1, 64),
        Recipe(mlp, torch.optim.AdamW, 0.003, 16),
    ],
    ids=["cnn, adamw", "cnn, sgd", "mlp, sgd", "mlp, adamw"],
)
def test_training_at_the_edge_with_warm_restarts_is_left_alone(recipe):
    looks = list(recipe.looks())
    assert first_rollback(looks, CHANCE) is None
    assert first_rollback(looks, None) is None


def zeroed(network: nn.Module, rate: float) -> float:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return rate


def too_fast(_network: nn.Module, rate: float) -> float:
    return 1000 * rate


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(cnn, sgd, 0.03, 64, too_fast),
        Recipe(cnn, torch.optim.AdamW, 0.003, 64, too_fast),
        Recipe(mlp, sgd, 0.03, 64, too_fast),
        Recipe(mlp, torch.optim.AdamW, 0.003, 64, zeroed),
    ],
    ids=["cnn, sgd, rate", "cnn, adamw, rate", "mlp, sgd, rate", "mlp, adamw, weights lost"],
)
def test_an_injured_network_is_caught_in_the_epoch_it_was_injured_in(recipe):
    rollback = first_rollback(recipe.looks(), CHANCE)
    assert rollback is not None
    assert (rollback.epoch, rollback.to_epoch) == (INJURED, INJURED)
