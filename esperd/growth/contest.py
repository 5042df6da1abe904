"""The contest: what could be grown now, each arm against the others and against growing nothing, before anything is grown.

From one state every contender goes its own way for the same FLOPs, on the same batches from the same RNG streams: the network
with an arm's seed trained jointly, once for each arm, and the network as it is. The learning rate falls to 0 on the way, so that
what is compared are networks that have come to rest. A costly seed takes fewer steps: what an arm shows is what it brings for
its price, and the network as it is shows what training on would give. One whose first step is more than all may spend is out.

Nothing remains of the contenders but what was measured of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from esperd.growth.candidate import NotGrown, charge_fork, contender, with_candidate
from esperd.growth.contribution import Measured, measure
from esperd.growth.grower import Grower
from esperd.growth.interval import mean_interval
from esperd.growth.optimizer import set_learning_rate
from esperd.growth.shards import gathered, shard
from esperd.growth.streams import Streams, device_of, forked
from esperd.messages.growth import Trial
from esperd.messages.policy import Arm

Batch = tuple[torch.Tensor, torch.Tensor]

NEARLY = 1e-6
"""Of a step: a number of steps that went through floats may come out less than whole."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """How an arm did.

    Args:
        arm: slot and blueprint.
        trial: the network with it against the network as it is; None when it did not come to that.
        why_not: why it did not; empty when it did.
    """

    arm: Arm
    trial: Trial | None
    why_not: str = ""


def contest(
    grower: Grower,
    arms: Sequence[Arm],
    train: Callable[[], Iterator[Batch]],
    gate: Callable[[], Iterable[Batch]],
    *,
    epochs: float,
    equal: Literal["flops", "steps"] = "flops",
) -> Iterator[Contender]:
    """Try arms, one after the other; each is told as soon as it is known.

    Args:
        grower: between two steps, in training mode. It does not move; its ledger is charged for everybody.
        arms: what is tried.
        train: batches of the train split, without end, the same ones at each call; of several ranks each has its own.
        gate: batches of the gate split, all of it.
        epochs: what each contender may spend on training, in epochs of the network as it is: the whole steps in it. Where there
            is none, nobody competes.
        equal: ``flops``: a costly seed takes fewer steps; ``steps``: all take the same, which asks what an arm would bring if
            training it cost nothing.

    Yields:
        One contender an arm, in the order of ``arms``.

    Raises:
        InvalidModel: the network cannot be copied.
        ValueError: ``epochs`` is not above 0.
    """
    if not epochs > 0.0:
        raise ValueError(f"a contest needs a length above 0 epochs, not {epochs}")
    start = Streams.take(device_of(grower.network))
    steps = math.floor(epochs * grower.steps_per_epoch + NEARLY)
    if steps < 1:
        why_not = f"{epochs:.2g} epochs of {grower.steps_per_epoch} steps are less than one step"
        yield from (Contender(arm=arm, trial=None, why_not=why_not) for arm in arms)
        return
    as_it_is = contender(grower)
    with _charged(grower, as_it_is):
        taken = _train(as_it_is, train(), start, steps=steps, flops=math.inf)
        allowance = as_it_is.ledger.total
        alone = _measured(as_it_is, gate)
    del as_it_is  # of three networks at once the memory need not hold the third
    for arm in arms:
        try:
            twin, _ = with_candidate(grower, arm)
        except NotGrown as refusal:
            yield Contender(arm=arm, trial=None, why_not=str(refusal))
            continue
        with _charged(grower, twin):
            # its probe, which every newborn seed pays once, is charged but not held against it here
            limit = twin.ledger.total + allowance if equal == "flops" else math.inf
            taken_with = _train(twin, train(), start, steps=steps, flops=limit)
            found = _measured(twin, gate) if taken_with else None
        spent = twin.ledger.total
        del twin
        if found is None:
            why_not = f"one step with it takes more than the {allowance:.3g} FLOPs that each contender may spend"
            yield Contender(arm=arm, trial=None, why_not=why_not)
            continue
        told = _compared(grower, alone, found, taken_with, taken, spent)
        why_not = "" if math.isfinite(told.loss) else f"it ended with a gate loss of {found.mean_loss}"
        yield Contender(arm=arm, trial=None if why_not else told, why_not=why_not)


@contextmanager
def _charged(grower: Grower, twin: Grower) -> Iterator[None]:
    """What a fork spends is charged to its original, also when it fails."""
    try:
        yield
    finally:
        charge_fork(grower, twin)


def _train(twin: Grower, batches: Iterator[Batch], start: Streams, *, steps: int, flops: float) -> int:
    """Train while another step is affordable, for ``steps`` at most, at a rate that falls linearly from the twin's own to 0.

    How many steps are affordable is known after the first one, so the rate falls over all of them.

    Returns:
        Steps that were taken; 0 when not even the first was affordable: that one was taken to know it.
    """
    rate, planned, step_flops = twin.host_learning_rate(), steps, 0.0
    with forked(start.device, start):
        for taken in itertools.count():
            if taken >= planned:
                return taken
            set_learning_rate(twin.optimizer, rate * (1.0 - taken / planned), twin.step)
            before = twin.ledger.total
            with twin.ranks.stepping():
                twin.train_step(*next(batches))
            if taken == 0:
                step_flops = twin.ledger.total - before
                affordable = steps if math.isinf(flops) else math.floor((flops - before) / step_flops + NEARLY)
                planned = twin.ranks.first("steps that a contender affords", min(steps, affordable))
                if planned < 1:
                    return 0
    raise AssertionError("unreachable: counting does not end")


def _measured(twin: Grower, gate: Callable[[], Iterable[Batch]]) -> Measured:
    twin.ranks.follow(twin.network.buffers())
    batches = shard(list(gate()), twin.ranks.rank, twin.ranks.size)
    samples = sum(len(inputs) for inputs, _ in batches)
    measured = twin.ledger.charge(
        "gate", twin.structure(), samples, lambda: measure(twin.network, batches, twin.loss, twin.metric)
    )
    return gathered(twin.ranks, measured)


def _compared(grower: Grower, alone: Measured, found: Measured, taken: int, taken_alone: int, spent: float) -> Trial:
    confidence, method = grower.settings.confidence, grower.settings.interval
    mean, lower, upper = mean_interval(alone.loss - found.loss, confidence, method, grower.epoch)
    gained = None if alone.metric is None or found.metric is None else float((found.metric - alone.metric).mean())
    return Trial(
        loss=mean,
        lower=lower,
        upper=upper,
        confidence=confidence,
        samples=found.loss.numel(),
        metric=gained,
        steps_with=taken,
        steps_without=taken_alone,
        flops=spent,
        epoch=grower.epoch,
    )
