"""The trigger ``plateau``: the gate loss has stopped to improve (AutoGrow's convergent growth: Wen, Yan, Chen and Li 2020,
arXiv:1906.02909), with hysteresis.

Published results are against it: convergent growth reached 93.12 % where growing every 3 epochs reached 94.27 % (AutoGrow,
ResNet on CIFAR-10). It is one trigger among others, to be measured, and not the default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from esperd.messages.policy import Decide, PolicySettings, Signal


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """Where a history of losses stands.

    Args:
        on: whether the plateau lasts.
        looks: looks in a row, the latest included, that showed less than ``plateau_improvement``.
        improvement: at the latest look, as a share of the loss; None: too few losses for a look.
    """

    on: bool = False
    looks: int = 0
    improvement: float | None = None


def fires(request: Decide) -> Signal:
    """Fire while the plateau lasts."""
    losses, settings = request.observation.gate_losses, request.settings
    stands = replayed(losses, settings)
    if stands.improvement is None:
        return Signal(
            fires=False,
            reason=f"{len(losses)} gate losses are too few to tell a plateau over {settings.plateau_window} (plateau_window)",
        )
    seen = f"the gate loss improved by {stands.improvement:.2%} over the last {settings.plateau_window} epochs"
    if stands.on:
        return Signal(
            fires=True, reason=f"on a plateau: {seen}, and not yet by more than {settings.plateau_release:.2%} (plateau_release)"
        )
    if stands.looks:
        return Signal(
            fires=False, reason=f"{seen}, which {stands.looks} of {settings.plateau_looks} looks have shown (plateau_looks)"
        )
    return Signal(fires=False, reason=f"{seen}; a plateau begins below {settings.plateau_improvement:.2%} (plateau_improvement)")


def replayed(losses: Sequence[float], settings: PolicySettings) -> Plateau:
    """Where a history stands: it is gone through from its beginning, so that nothing but the losses decides.

    It begins after ``plateau_looks`` looks in a row with less than ``plateau_improvement``, and ends at one with more than
    ``plateau_release``.

    Args:
        losses: gate losses, oldest first.
        settings: window and thresholds.
    """
    stands, window = Plateau(), settings.plateau_window
    best_before = list(accumulate(losses, min))
    for looked in range(window + 1, len(losses) + 1):
        found = improvement(best_before[looked - window - 1], min(losses[looked - window : looked]))
        looks = stands.looks + 1 if found < settings.plateau_improvement else 0
        on = found <= settings.plateau_release if stands.on else looks >= settings.plateau_looks
        stands = Plateau(on=on, looks=looks, improvement=found)
    return stands


def improvement(before: float, lately: float) -> float:
    """How much lower the best of the latest losses is than the best before them, as a share of that one's size; negative when it
    is higher. The best, not the mean: one bad epoch is no plateau.

    Args:
        before: best loss before the window.
        lately: best loss in it.
    """
    if before == lately:
        return 0.0
    return (before - lately) / abs(before) if before else math.copysign(math.inf, before - lately)
