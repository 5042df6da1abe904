"""The least that is explored, whatever a strategy makes of the arms."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from esperd.messages.policy import Observation, PolicySettings
from esperd.policy.arms import Selection
from esperd.policy.state import BanditState

ROUNDING = 1e-9
"""So that 0.3 * 10 is not less than 3."""


def starving_first(selection: Selection, state: BanditState, observation: Observation, settings: PolicySettings) -> Selection:
    """Put the arms first that were tried too rarely, the rarest before the others; of equal ones as the strategy ranked them.

    Of ``N`` tries each arm is due ``floor(min_share * N / arms)``, where ``arms`` is the number of all that the observation
    offers, available or not. An arm is tried too rarely when it has less than that by now, or when the tries that are left until
    one more is due are needed for those that lack it: so what is due is there when it is due, and not after. A try counts from
    when its seed germinates. What other jobs tried does not count, and a strategy that would decline such an arm is overruled.

    Args:
        selection: of the strategy.
        state: knows the tries.
        observation: offers the arms.
        settings: ``min_share``.
    """
    if not settings.min_share:
        return selection
    begun = Counter({entry.arm: entry.pulls for entry in state.arms})
    begun.update(pending.arm for pending in state.pending)
    arms = max(len(observation.options), 1)
    least = math.floor(settings.min_share * begun.total() / arms + ROUNDING)
    lacking = sum(max(0, least + 1 - begun[option.arm]) for option in observation.options)
    together = settings.nursery - 1  # tries of one point are made at once
    if lacking + together >= _due_by(least + 1, arms, settings) - begun.total():
        least += 1
    starving = sorted((found for found in selection.ranked if begun[found.arm] < least), key=lambda found: begun[found.arm])
    if not starving:
        return selection
    why = f"of the {least} tries that it is guaranteed within {_due_by(least, arms, settings)} in all"
    fed = [
        replace(found, pays=True, due=True, why=f"due by min_share {settings.min_share:g}: {begun[found.arm]} {why}")
        for found in starving
    ]
    return replace(selection, ranked=[*fed, *(found for found in selection.ranked if begun[found.arm] >= least)])


def _due_by(tries: int, arms: int, settings: PolicySettings) -> int:
    """In how many tries of the job each arm is to have so many."""
    return math.ceil(tries * arms / settings.min_share - ROUNDING)
