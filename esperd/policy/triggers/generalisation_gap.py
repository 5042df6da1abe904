"""The trigger ``generalisation_gap``: grow often while the network underfits, seldom once it overfits (FRAGrow: Wu, Wang,
Malepathirana, Senanayake, Oetomo and Halgamuge 2024, arXiv:2401.03104).

Its finding: growing late regularises, which helps a network that overfits and costs one that underfits. Its interval between
growths, ``longest / (1 + exp(a - risk))``, rises with the risk of overfitting. There the risk is a difference of accuracies;
here, where not every job has a metric, it is the gate loss over the train loss, minus 1.
"""

from __future__ import annotations

import math

from esperd.messages.policy import Decide, PolicySettings, Signal

STEEPNESS = 10.0
"""How sharply the interval turns from short to long, per unit of the gap; chosen, not measured."""

SHORTEST = 1.0
"""Epochs between two times to grow, at least: there is one decision point an epoch."""


def fires(request: Decide) -> Signal:
    """Fire at the end of the warm-up, and from then on each time the intervals of the epochs since add up to another one.

    Each epoch counts ``1 / interval`` of an interval, by its own gap; so the answer is a function of the losses alone. The train
    loss of an epoch is its mean in training mode: it lags behind the gate loss, and dropout and augmentation raise it, so
    that the gap starts below 0.
    """
    observation, settings = request.observation, request.settings
    losses = list(zip(observation.train_losses, observation.gate_losses, strict=False))
    since = losses[max(settings.warmup_epochs - 1, 0) :]
    known = [gap(train, gate) for train, gate in since if train > 0.0]
    if not known:
        return Signal(fires=False, reason="no epoch after the warm-up has a train loss above 0, so there is no gap to go by")
    interval = interval_of(known[-1], settings)
    seen = (
        f"the gate loss lies {known[-1]:+.1%} from the train loss, which makes it a time to grow every {interval:.1f} epochs "
        f"(gap_centre {settings.gap_centre:.0%}, gap_longest {settings.gap_longest})"
    )
    shares = [1.0 / interval_of(each, settings) for each in known[1:]]
    before, now = math.floor(sum(shares[:-1])), math.floor(sum(shares))
    if not shares or now > before:
        return Signal(fires=True, reason=seen)
    return Signal(fires=False, reason=f"{seen}; {sum(shares) - now:.0%} of that has passed")


def gap(train: float, gate: float) -> float:
    """Gate loss over train loss, minus 1.

    Args:
        train: above 0.
        gate: of the same epoch.
    """
    return gate / train - 1.0


def interval_of(found: float, settings: PolicySettings) -> float:
    """Epochs from one time to grow to the next at this gap."""
    turned = min(STEEPNESS * (settings.gap_centre - found), 700.0)  # exp overflows above 709
    return max(SHORTEST, settings.gap_longest / (1.0 + math.exp(turned)))
