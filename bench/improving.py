"""Improving the model you already have: a trained host and an extra budget, grown, continued, or replaced by another one trained
from scratch on that budget.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import lab
import torch
from deciding import Deciding, standing
from torch import nn

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.builtins.networks.cnn import cnn
from esperd.growth import Grower
from esperd.growth.flops import count_flops
from esperd.growth.source import BlueprintSource, GrownModule
from esperd.messages.growth import SlotRecord, Stage
from esperd.messages.jobs import Gates, Growth
from esperd.messages.policy import Arm, Decision, PolicySettings

STAYS = {"incubation_epochs": 1, "blending_epochs": 1, "shadowing_epochs": 1, "probation_epochs": 3, "embargo_epochs": 1}
WIDTHS = (1.0, 4.0)
"""Of static hosts, as multiples of the host's channels: between these one is looked for that matches."""


def grower_of(
    data: lab.Data, host: nn.Module, rng_seed: int, plan: dict[str, Any], growth: Growth, settings: Gates | None = None
) -> Grower:
    """A grower over a host at its stages, or blocks."""
    return lab.grower_of(
        data,
        host,
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=growth,
        settings=settings or Gates(),
        patterns=data.slots,
        learning_rate=plan["rate"],
    )


def host_epoch_flops(data: lab.Data) -> float:
    """What one epoch of the host costs: three forward passes a sample."""
    host = lab.fresh_host(data, 0).eval()
    with torch.no_grad():
        _, flops = count_flops(lambda: host(data.train[0][:4]))
    return 3.0 * flops / 4 * data.epoch_samples


class BornRandom(BlueprintSource):
    """Seeds that change the network from birth: what is zero in them is drawn as torch draws a layer's weights."""

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:
        """As drawn, then stirred."""
        return _stirred(super().grow(blueprint, slot, seed, operator, epoch))

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        """The same weights: a module's parameters have one order."""
        return _stirred(super().sketch(blueprint, slot, seed, operator))


def _stirred(grown: GrownModule) -> GrownModule:
    generator = torch.Generator().manual_seed(0)
    for weight in grown.module.parameters():
        if weight.ndim > 1 and not weight.any():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    return grown


def grow(
    data: lab.Data,
    host: nn.Module,
    rng_seed: int,
    plan: dict[str, Any],
    policy: PolicySettings,
    growth: Growth,
    *,
    born_random: bool = False,
) -> dict[str, object]:
    """The host, grown by a strategy that is asked before the first step and after every epoch, on the budget."""
    grower = grower_of(data, copy.deepcopy(host), rng_seed, plan, growth)
    if born_random:
        grower.source = BornRandom(BLUEPRINTS, rng_seed=rng_seed)
    measured, host_epoch = standing(data, grower, plan["batch_size"])
    flops = plan["extra_host_epochs"] * host_epoch
    deciding = Deciding(policy, rng_seed, flops, data.epoch_samples)
    began = lab.clock()
    deciding(grower, measured)
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    left = flops - grower.ledger.total  # what was measured and probed before the first step is charged
    lab.train(grower, data, flops=left, phase=phase, rng_seed=rng_seed, decide=deciding, losses=deciding.train_losses)
    grower.close()
    kept = [[seed.record.slot, seed.blueprint] for seed in grower.network.seeds() if seed.stage is Stage.FOSSILIZED]
    return {**_ended(grower, data, began), "kept": kept, "decisions": deciding.said}


def train_alone(data: lab.Data, host: nn.Module, rng_seed: int, plan: dict[str, Any], *, host_epochs: float, rate: float) -> dict:
    """A network without seeds, on a budget in epochs of the host: the host continued, or another one."""
    grower = grower_of(data, copy.deepcopy(host), rng_seed, plan, Growth())
    began = lab.clock()
    phase = lab.Phase(rate, plan["batch_size"])
    lab.train(grower, data, flops=host_epochs * host_epoch_flops(data), phase=phase, rng_seed=rng_seed)
    return _ended(grower, data, began)


def train_final(
    data: lab.Data, kept: list[list[str]], rng_seed: int, plan: dict[str, Any], *, host_epochs: float
) -> dict[str, object]:
    """The architecture that was grown, from scratch: every kept seed is there from the first step, at alpha 1."""
    growth = Growth(incubation="joint", incubation_epochs=10**6)
    grower = grower_of(data, lab.fresh_host(data, rng_seed), rng_seed, plan, growth, lab.OPEN_GATES)
    standing(data, grower, plan["batch_size"])
    for slot, blueprint in kept:
        refusal = grower.apply(Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), reason="the final network"))
        if refusal:
            raise RuntimeError(f"{blueprint} at {slot}: {refusal}")
        seed = list(grower.network.port(slot))[-1]
        seed.life = type(seed.life)(stage=Stage.FOSSILIZED)  # another may stand behind it
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    began = lab.clock()
    phase = lab.Phase(plan["pretrain_rate"], plan["batch_size"])
    lab.train(grower, data, flops=host_epochs * host_epoch_flops(data), phase=phase, rng_seed=rng_seed)
    return _ended(grower, data, began)


def widened(data: lab.Data, rng_seed: int, *, parameters: int | None = None, flops_per_sample: float | None = None) -> nn.Module:
    """A fresh host with wider stages: the widest that has no more parameters, or inference FLOPs, than the grown one."""
    best = lab.fresh_host(data, rng_seed)
    for step in range(1, 301):
        width = WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * step / 300
        torch.manual_seed(rng_seed)
        made = cnn([round(width * c) for c in data.channels], in_channels=data.train[0].shape[1], classes=10)
        if parameters is not None and sum(parameter.numel() for parameter in made.parameters()) > parameters:
            break
        if flops_per_sample is not None and _flops_per_sample(made, data) > flops_per_sample:
            break
        best = made.to(memory_format=torch.channels_last)
    return best


def _flops_per_sample(network: nn.Module, data: lab.Data) -> float:
    training = network.training
    network.eval()
    with torch.no_grad():
        _, flops = count_flops(lambda: network(data.train[0][:4]))
    network.train(training)
    return flops / 4


def _ended(grower: Grower, data: lab.Data, began: float) -> dict[str, Any]:
    return {
        **lab.result(grower, data, lab.clock() - began),
        "flops_per_sample": _flops_per_sample(grower.network, data),
    }
