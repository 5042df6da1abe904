"""A world in which growing has its price: FLOPs are limited, seeds take their share, and training on brings something, too.

The loss is what no training removes, plus what is left to be learned, which each epoch makes smaller by the same factor. A seed
lowers the part that no training removes, by its worth; it takes FLOPs from its germination on, so that fewer epochs are left, and
a culled one took them for nothing. What is measured of a seed is its worth times ``overstated``: contributions overstate what a
seed brought, because the host adapts to it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec
from bandit_world import ARMS, DECIDE
from policy_requests import contribution, observation, option, request, seed

from esperd.builtins.triggers import TRIGGERS
from esperd.messages.growth import Stage
from esperd.messages.policy import PolicySettings
from esperd.policy.trigger import with_signal

FIRES = {trigger.name: trigger.fires for trigger in TRIGGERS}
HOST = 10_000.0
"""FLOPs of the host for one sample, as in ``observation()``."""
LIFE = 4
"""Epochs from germination to a verdict."""


@dataclass(frozen=True)
class World:
    """What a job meets.

    Args:
        worth: largest worth of an arm.
        good: share of the arms that are worth anything.
        price: FLOPs of a seed over the host's.
        rate: what an epoch takes from what is left to be learned, as a share.
        budget: host-epochs.
        overstated: measured contribution over true worth.
    """

    worth: float = 0.05
    good: float = 0.5
    price: float = 0.3
    rate: float = 0.05
    budget: float = 60.0
    overstated: float = 1.0


def final_loss(world, *, rng_seed, policy, strategy="ucb"):
    """The loss at the end of the budget, and how many seeds were germinated and kept."""
    rng = random.Random(f"{rng_seed}")
    worth = {arm: world.worth * rng.random() * (rng.random() < world.good) for arm in ARMS}
    options = [option(arm.slot, arm.blueprint, flops=world.price * HOST) for arm in ARMS]
    floor, left, spent, epoch, germinated = 0.3, 1.0, 0.0, 0, 0
    state, gate, train, flops = b"", [], [], []
    living, kept, gone = {}, {}, ()
    while True:
        cost = 1.0 + world.price * (len(living) + len(kept))
        if spent + cost > world.budget:
            return floor + left - sum(worth[arm] for arm in kept.values()), germinated, len(kept)
        spent, epoch, left = spent + cost, epoch + 1, left * (1.0 - world.rate)
        true = floor + left - sum(worth[arm] for arm in kept.values())
        gate.append(true + rng.gauss(0.0, 0.003))
        train.append(true)
        flops.append(spent * 1e6)
        records = [
            record(name, Stage.PROBATIONARY if epoch - born >= LIFE else Stage.TRAINING, arm, world, worth, rng, epoch)
            for name, (arm, born) in living.items()
        ]
        records += [record(name, Stage.FOSSILIZED, arm, world, worth, rng, epoch) for name, arm in kept.items()]
        seen = observation(
            epoch=epoch,
            progress=spent / world.budget,
            epochs_left=(world.budget - spent) / cost,
            shortest_life_epochs=LIFE,
            gate_loss=gate[-1],
            gate_losses=tuple(gate),
            train_losses=tuple(train),
            gate_flops=tuple(flops),
            seeds=(*records, *gone),
            options=tuple(
                msgspec.structs.replace(each, available=all(each.arm != arm for arm, _ in living.values())) for each in options
            ),
        )
        asked = with_signal(request(seen, policy=policy, state=state, point=epoch, rng_seed=rng_seed), FIRES[policy.trigger])
        answer = DECIDE[strategy](asked)
        state, gone = answer.state, ()
        for decision in answer.decisions:
            if decision.action == "germinate":
                living[f"{decision.arm.slot}#{epoch}"] = (decision.arm, epoch)
                germinated += 1
            elif decision.action == "fossilize":
                kept[decision.seed] = living.pop(decision.seed)[0]
            elif decision.action == "cull":
                arm, _ = living.pop(decision.seed)
                gone = (*gone, seed(decision.seed, stage=Stage.CULLED, blueprint=arm.blueprint))


def record(name, stage, arm, world, worth, rng, epoch):
    """A seed as the trainer tells of it."""
    shown = contribution(world.overstated * worth[arm] + rng.gauss(0.0, 0.003), 0.005, epoch)
    told = seed(name, stage=stage, blueprint=arm.blueprint, measured=None if stage is Stage.TRAINING else shown)
    return msgspec.structs.replace(told, flops_per_sample=world.price * HOST)


SETTINGS = PolicySettings(latest_germination=0.9, max_live_seeds=1, stop_rule=False)
