"""What a job may spend, how much of it is gone, and the learning rate that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from esperd.messages.jobs import Budget, Optimizer, Scheduler


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Where a run stands."""

    steps: int
    """Optimiser steps taken."""
    steps_per_epoch: int
    flops: float
    seconds: float


def progress(budget: Budget, spent: Spent) -> float:
    """Share of the budget that is gone: the largest over its limits, 1 or more when the run is over."""
    shares = []
    if budget.epochs is not None:
        shares.append(spent.steps / (budget.epochs * spent.steps_per_epoch))
    if budget.flops is not None:
        shares.append(spent.flops / budget.flops)
    if budget.seconds is not None:
        shares.append(spent.seconds / budget.seconds)
    return max(shares)


def epochs_left(budget: Budget, spent: Spent, *, epoch_flops: float | None, epoch_seconds: float | None) -> float | None:
    """Epochs the budget still allows at the current cost of one; None while no limit can be turned into epochs."""
    left = []
    if budget.epochs is not None:
        left.append(budget.epochs - spent.steps / spent.steps_per_epoch)
    if budget.flops is not None and epoch_flops:
        left.append((budget.flops - spent.flops) / epoch_flops)
    if budget.seconds is not None and epoch_seconds:
        left.append((budget.seconds - spent.seconds) / epoch_seconds)
    return max(0.0, min(left)) if left else None


def learning_rate(optimizer: Optimizer, scheduler: Scheduler, share: float) -> float:
    """Learning rate of the host when ``share`` of the budget is gone.

    ``cosine``: lr · (f + (1 - f) · (1 + cos(π · share)) / 2) with f the final share (Loshchilov & Hutter 2017, no restarts).
    """
    if scheduler.name == "constant":
        return optimizer.learning_rate
    fall = 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return optimizer.learning_rate * (scheduler.final_share + (1.0 - scheduler.final_share) * fall)
