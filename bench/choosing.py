"""Choosing well, cheaply: what each of a dozen arms brings, what cheap scores say of it, and what strategies pick by them.

Every arm is trained from one and the same host for the same FLOPs, so what a strategy would have got by its pick is known
exactly, without training it again. What it spent on choosing is charged on top, and the host continued gets as much.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import lab
import torch
from deciding import Deciding, options, standing
from improving import BornRandom
from torch import nn

from esperd.growth import Grower
from esperd.growth.contest import contest
from esperd.growth.contribution import Measured, measure
from esperd.growth.merit import gradient_merit
from esperd.messages.jobs import Growth
from esperd.messages.policy import Arm, Decision, PolicySettings

BLUEPRINTS = ("conv_light", "depthwise", "inverted_residual", "squeeze_excite")
FOR_EVER = Growth(incubation="joint", incubation_epochs=10**6)
"""A seed that trains jointly from its first step, and is not judged: what is compared are arms."""
APART = Growth(incubation="straight_through", incubation_epochs=1, blending_epochs=1, shadowing_epochs=1, probation_epochs=10**6)
"""A seed that incubates behind the host for an epoch, is blended in over the next, and is not judged."""
SHORT_LIVES = Growth(
    incubation="joint", incubation_epochs=1, blending_epochs=1, shadowing_epochs=1, probation_epochs=1, embargo_epochs=0
)
"""Where only the choice counts, and the budget is short."""
LENGTHS = (0.5, 1.0)
"""Of contests of all arms, in host-epochs, for calibration."""


def grower_of(data: lab.Data, host: nn.Module, rng_seed: int, plan: dict[str, Any], growth: Growth = FOR_EVER) -> Grower:
    """A grower over a copy of the host; gates are open."""
    return lab.grower_of(
        data,
        copy.deepcopy(host),
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=growth,
        patterns=("features.stage?",),
        learning_rate=plan["rate"],
    )


def arms_of(grower: Grower) -> list[Arm]:
    """Three slots × four blueprints on CIFAR."""
    return [option.arm for option in options(grower, BLUEPRINTS)]


def name_of(arm: Arm) -> str:
    """As lines call it."""
    return f"{arm.blueprint} at {arm.slot}"


def germinate(grower: Grower, arm: Arm, screening: str = "") -> None:
    """Grow an arm, or say why not."""
    refusal = grower.apply(Decision(action="germinate", arm=arm, reason="as the protocol says", screening=screening))
    if refusal:
        raise RuntimeError(f"{name_of(arm)}: {refusal}")


def train_arm(
    data: lab.Data, host: nn.Module, arm: str, rng_seed: int, plan: dict[str, Any], *, host_epochs: float
) -> dict[str, object]:
    """One arm, or ``continued``, for a budget. ``curve``: host-epochs spent and gate loss, after every epoch."""
    grower = grower_of(data, host, rng_seed, plan)
    _, host_epoch = standing(data, grower, plan["batch_size"])
    chosen = {name_of(made): made for made in arms_of(grower)}.get(arm)
    began = lab.clock()
    if chosen is not None:
        germinate(grower, chosen)
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    curve: list[tuple[float, float]] = []

    def look(grown: Grower, measured: Measured) -> None:
        curve.append((round(grown.ledger.total / host_epoch, 3), measured.mean_loss))

    flops = host_epochs * host_epoch - grower.ledger.total
    lab.train(grower, data, flops=flops, phase=phase, rng_seed=rng_seed, decide=look)
    return {**lab.result(grower, data, lab.clock() - began), "contribution": _contribution(grower, data), "curve": curve}


def train_born(data: lab.Data, host: nn.Module, birth: str, rng_seed: int, plan: dict[str, Any]) -> dict[str, object]:
    """The host with a seed at each of the last two stages, trained on the arms' budget; their last layers start as zero, or as
    torch draws a layer (``birth`` ``random``). They incubate apart, so that the network first hears what they have learned.
    """
    grower = grower_of(data, host, rng_seed, plan, APART)
    if birth == "random":
        grower.source = BornRandom(grower.source.blueprints.values(), rng_seed=rng_seed)
    _, host_epoch = standing(data, grower, plan["batch_size"])
    began = lab.clock()
    for record in grower.network.slots[-2:]:
        germinate(grower, Arm(slot=record.slot, blueprint="conv_light"))
    flops = plan["arm_epochs"] * host_epoch - grower.ledger.total
    lab.train(grower, data, flops=flops, phase=lab.Phase(plan["rate"], plan["batch_size"]), rng_seed=rng_seed)
    alphas = [seed.alpha for seed in grower.network.seeds()]
    return {**lab.result(grower, data, lab.clock() - began), "alphas": alphas}


def _contribution(grower: Grower, data: lab.Data) -> float | None:
    """Gate loss without the seed minus with it; None where there is none."""
    seeds = list(grower.network.seeds())
    if not seeds:
        return None
    batches = lab.in_order(data.gate)
    with_it = measure(grower.network, batches, lab.loss).mean_loss
    with grower.network.alphas({seeds[0].name: 0.0}):
        without = measure(grower.network, batches, lab.loss).mean_loss
    return without - with_it


def score_arms(data: lab.Data, host: nn.Module, rng_seed: int, plan: dict[str, Any]) -> dict[str, object]:
    """What cheap scores say of every arm, and what each cost in host-epochs."""
    scores: dict[str, dict[str, float | None]] = {}
    costs: dict[str, float] = {}
    grower = grower_of(data, host, rng_seed, plan)
    _, host_epoch = standing(data, grower, plan["batch_size"])
    arms = arms_of(grower)
    assert grower.batches is not None
    batches = grower.batches

    def spent(name: str, before: float) -> None:
        costs[name] = (grower.ledger.total - before) / host_epoch

    before = grower.ledger.total
    scores["merit"] = {
        name_of(arm): gradient_merit(grower, arm, lambda: batches.train(0), batches=plan["merit_batches"]) for arm in arms
    }
    spent("merit", before)
    for length, equal in itertools.product(LENGTHS, ("flops", "steps")):
        before, name = grower.ledger.total, f"contest {length:g} {equal}"
        found = contest(grower, arms, lambda: batches.train(0), batches.gate, epochs=length, equal=equal)
        scores[name] = {name_of(made.arm): made.trial.loss if made.trial else None for made in found}
        spent(name, before)
    behind = score_behind_host(data, host, rng_seed, plan)
    return {"scores": {**scores, **behind["scores"]}, "costs": {**costs, **behind["costs"]}}


def score_behind_host(data: lab.Data, host: nn.Module, rng_seed: int, plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """One epoch behind the host for every arm at once, as a nursery does it. ``prospect``: what switching an arm on would
    bring on the gate split; ``incubation loss``: what the network lost in the arm's own passes, its sign turned.
    """
    growth = Growth(incubation="joint", screening_epochs=1)
    grower = grower_of(data, host, rng_seed, plan, growth)
    _, host_epoch = standing(data, grower, plan["batch_size"])
    for arm in arms_of(grower):
        germinate(grower, arm, screening="all")
    fed = lab.batches(data.train, plan["batch_size"], 1_000 * rng_seed)
    torch.manual_seed(rng_seed)
    for inputs, targets in fed:
        grower.train_step(inputs, targets)
    grower.epoch += 1
    grower.measure(lab.in_order(data.gate))
    for seed in grower.incubating():
        grower.incubator.end_epoch(seed)
    own_steps = 3 * (grower.ledger.cost("gate", "host") or 0.0) * len(data.train[0])
    cost = (grower.ledger.total - own_steps) / host_epoch
    seeds = {f"{seed.blueprint} at {seed.record.slot}": seed for seed in grower.network.seeds()}
    scores = {
        "prospect": {name: None if seed.prospect is None else seed.prospect.loss for name, seed in seeds.items()},
        "incubation loss": {
            name: None if seed.incubation_loss is None else -seed.incubation_loss for name, seed in seeds.items()
        },
    }
    return {"scores": scores, "costs": dict.fromkeys(scores, cost)}


def pick(data: lab.Data, host: nn.Module, policy: PolicySettings, rng_seed: int, plan: dict[str, Any]) -> dict[str, object]:
    """What a strategy grows first, as it would be asked in a job that has the arms' budget, and what choosing cost."""
    grower = grower_of(data, host, rng_seed, plan, SHORT_LIVES)
    measured, host_epoch = standing(data, grower, plan["batch_size"])
    budget = plan["arm_epochs"] * host_epoch
    deciding = Deciding(policy, rng_seed, budget, len(data.train[0]), BLUEPRINTS)
    began = lab.clock()
    before = grower.ledger.spent["incubation"]
    deciding(grower, measured)
    grown = [name_of(Arm(slot=seed.record.slot, blueprint=seed.blueprint)) for seed in grower.network.seeds()]
    probing = grower.ledger.spent["incubation"] - before  # of growing it, which its own line holds
    return {
        "picked": grown[0] if grown else None,
        "cost": (grower.ledger.total - probing) / host_epoch,
        "seconds": round(lab.clock() - began, 2),
        "said": deciding.said,
    }
