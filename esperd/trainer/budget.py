"""What a job may spend, how much of it is gone, and the learning rate that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from esperd.declarations import resolve
from esperd.errors import InvalidJob
from esperd.messages.jobs import Budget, Scheduler


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where a run stands."""

    steps: int
    """Optimiser steps taken."""
    steps_per_epoch: int
    flops: float
    seconds: float


def progress(budget: Budget, spent: Spent) -> float:
    """Share of the budget that is gone: the largest over its limits, 1 or more when the run is over. A limit of 0 is reached from
    the beginning: the control of a network that was not trained at all has it.
    """
    shares = []
    if budget.epochs is not None:
        shares.append(spent.steps / (budget.epochs * spent.steps_per_epoch))
    if budget.flops is not None:
        shares.append(spent.flops / budget.flops if budget.flops > 0.0 else 1.0)
    if budget.seconds is not None:
        shares.append(spent.seconds / budget.seconds)
    return max(shares)


def epochs_left(budget: Budget, spent: Spent, *, epoch_flops: float | None, epoch_seconds: float | None) -> float | None:
    """Epochs the budget still allows at the current cost of one; None while no limit can be turned into epochs."""
    by_cost = epochs_left_by_cost(budget, spent, epoch_flops=epoch_flops, epoch_seconds=epoch_seconds)
    left = [] if by_cost is None else [by_cost]
    if budget.epochs is not None:
        left.append(budget.epochs - spent.steps / spent.steps_per_epoch)
    return max(0.0, min(left)) if left else None


def epochs_left_by_cost(budget: Budget, spent: Spent, *, epoch_flops: float | None, epoch_seconds: float | None) -> float | None:
    """Epochs that the limits on FLOPs and seconds still allow; None where neither is set, or not known yet."""
    left = []
    if budget.flops is not None and epoch_flops:
        left.append((budget.flops - spent.flops) / epoch_flops)
    if budget.seconds is not None and epoch_seconds:
        left.append((budget.seconds - spent.seconds) / epoch_seconds)
    return max(0.0, min(left)) if left else None


Schedule = Callable[[float], float]
"""Share of the budget that is spent, 0 to 1 → learning rate as a share of the first."""


def resolve_schedule(scheduler: Scheduler) -> Schedule:
    """The learning rate over a budget.

    ``cosine``: f + (1 - f) · (1 + cos(π · share)) / 2 with f the final share (Loshchilov & Hutter 2017, no restarts);
    ``linear``: from 1 down to f. With a warm-up the rate rises linearly first, and the shape follows over what is left.

    Raises:
        ImportFailed: when the user's function cannot be imported.
        InvalidJob: when it does not return a number of at least 0 for shares from 0 to 1.
    """
    shape = _SHAPES[scheduler.name](scheduler.final_share) if scheduler.name in _SHAPES else _users_own(scheduler.name)
    warmup = scheduler.warmup_share
    if warmup == 0.0:
        return lambda share: shape(min(share, 1.0))
    return lambda share: share / warmup if share < warmup else shape(min((share - warmup) / (1.0 - warmup), 1.0))


def _cosine(final: float) -> Schedule:
    return lambda share: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))


def _linear(final: float) -> Schedule:
    return lambda share: 1.0 - (1.0 - final) * share


_SHAPES: dict[str, Callable[[float], Schedule]] = {
    "constant": lambda _: lambda _share: 1.0,
    "cosine": _cosine,
    "linear": _linear,
}


def _users_own(name: str) -> Schedule:
    function: Callable[[float], object] = resolve(name)
    for share in (0.0, 0.5, 1.0):
        try:
            factor = function(share)
        except (Exception, SystemExit) as error:
            raise InvalidJob(
                f"scheduler {name!r} raised {type(error).__name__} for {share}: {error}", key="scheduler.name"
            ) from error
        if not isinstance(factor, int | float) or not 0.0 <= factor < math.inf:
            raise InvalidJob(
                f"scheduler {name!r} returned {factor!r} for {share}; it must return the learning rate as a share of the "
                "first, a number of at least 0",
                key="scheduler.name",
            )
    return resolve(name)  # type: ignore[no-any-return]  # what was just tried
