"""The controlled trial: what a seed brought, measured against the network that it might have been.

From one state two twins train on: the network with the seed, and the network without it. Both see the same batches in the same
order and draw from the same RNG streams; the twin without the seed is cheaper, so it takes more steps, until both have cost
the same. Then they are compared sample by sample on the gate split.

A contribution compares the network with itself after an amputation, and overstates the seed, because the host has given up for it
what it could do alone (up to twelve times, measured on CIFAR-10 at 16×16). Here the twin has had the time to take it back.
What is measured is the seed's worth from now on, not the price that was paid for it so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from esperd.errors import IllegalTransition, TrainingDiverged
from esperd.growth.contribution import Measured, measure
from esperd.growth.fork import fork
from esperd.growth.grower import Grower
from esperd.growth.interval import mean_interval
from esperd.growth.optimizer import remove_group
from esperd.growth.shards import gathered, shard
from esperd.growth.streams import Streams, device_of, forked
from esperd.messages.growth import Trial

Batch = tuple[torch.Tensor, torch.Tensor]


def controlled_trial(
    grower: Grower, seed: str, train: Callable[[], Iterator[Batch]], gate: Callable[[], Iterable[Batch]], *, steps: int
) -> Trial:
    """Let the network and its twin without a seed train on for the same FLOPs, and compare them. The grower itself does not move.

    Of several ranks each trains both twins on batches of its own and measures a part of the gate split, as it does with the
    network itself.

    Args:
        grower: between two steps. Its ledger is charged for both twins and their gate passes.
        seed: name of a seed that is heard.
        train: batches of the train split, without end, the same ones at each call; of several ranks each has its own.
        gate: batches of the gate split, all of it.
        steps: optimiser steps of the network with the seed.

    Returns:
        The paired difference of losses, without minus with, with its interval.

    Raises:
        IllegalTransition: the seed is not heard: there is nothing to be without.
        InvalidSlot: no such seed.
        TrainingDiverged: a twin's gate loss is not finite.
        ValueError: ``steps`` is not positive.
    """
    if steps < 1:
        raise ValueError(f"a trial takes at least one step, not {steps}")
    tried = grower.network.seed(seed)
    if tried.presence in ("silent", "taught"):
        raise IllegalTransition(
            f"{seed} is {tried.stage} at alpha {tried.alpha:g}; a trial needs a seed that is heard", seed=seed
        )
    start = Streams.take(device_of(grower.network))
    twins = {"with": fork(grower), "without": fork(grower)}
    remove_group(twins["without"].optimizer, seed)
    twins["without"].network.remove(seed)
    try:
        taken = {"with": _train(twins["with"], train(), start, steps=steps)}
        taken["without"] = _train(twins["without"], train(), start, flops=twins["with"].ledger.total)
        outcome = {name: _measured(twin, gate, name, seed) for name, twin in twins.items()}
    finally:  # a trial that fails was not for free
        spent = sum(twin.ledger.total for twin in twins.values())
        grower.ledger.spent["trial"] += spent
        for twin in twins.values():
            grower.ledger.costs |= twin.ledger.costs  # what work costs is known now
    return grower.ranks.first(f"the trial of {seed}", _compared(grower, outcome, taken, spent))


def _train(twin: Grower, batches: Iterator[Batch], start: Streams, *, steps: float = math.inf, flops: float = math.inf) -> int:
    """Train a twin for so many steps, or as long as another step costs no more than ``flops`` in all, as rank 0 counts them."""
    taken, step_flops = 0, 0.0

    def affords_another() -> bool:
        if math.isinf(flops):
            return True
        return twin.ranks.first("whether the twin affords another step", twin.ledger.total + step_flops <= flops)

    with forked(start.device, start):
        while taken < steps and affords_another():
            before = twin.ledger.total
            with twin.ranks.stepping():
                twin.train_step(*next(batches))
            step_flops = twin.ledger.total - before
            taken += 1
    return taken


def _measured(twin: Grower, gate: Callable[[], Iterable[Batch]], name: str, seed: str) -> Measured:
    twin.ranks.follow(twin.network.buffers())
    batches = shard(list(gate()), twin.ranks.rank, twin.ranks.size)
    samples = sum(len(inputs) for inputs, _ in batches)
    measured = twin.ledger.charge(
        "gate", twin.structure(), samples, lambda: measure(twin.network, batches, twin.loss, twin.metric)
    )
    measured = gathered(twin.ranks, measured)
    if not torch.isfinite(measured.loss).all():
        raise TrainingDiverged(
            f"in the trial of {seed} the twin {name} it ended with a gate loss of {measured.mean_loss}", seed=seed
        )
    return measured


def _compared(grower: Grower, outcome: dict[str, Measured], taken: dict[str, int], spent: float) -> Trial:
    confidence, method = grower.settings.confidence, grower.settings.interval
    mean, lower, upper = mean_interval(outcome["without"].loss - outcome["with"].loss, confidence, method, grower.epoch)
    metrics = [outcome[name].metric for name in ("with", "without")]
    gained = None if metrics[0] is None or metrics[1] is None else float((metrics[0] - metrics[1]).mean())
    return Trial(
        loss=mean,
        lower=lower,
        upper=upper,
        confidence=confidence,
        samples=outcome["with"].loss.numel(),
        metric=gained,
        steps_with=taken["with"],
        steps_without=taken["without"],
        flops=spent,
        epoch=grower.epoch,
    )
