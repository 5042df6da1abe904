"""The least that is explored, whatever a strategy makes of the arms."""

from __future__ import annotations

import math
from dataclasses import replace

from esperd.messages.policy import Observation, PolicySettings
from esperd.policy.arms import RankedArm, Selection
from esperd.policy.state import BanditState


def starving_first(selection: Selection, state: BanditState, observation: Observation, settings: PolicySettings) -> Selection:
    """Put the arms first that were tried too rarely, the rarest before the others; of equal ones as the strategy ranked them.

    Too rarely: fewer times than ``floor(min_share * N / arms)``, where ``N`` are the tries of all arms of this job, and ``arms``
    is the number of all that the observation offers, available or not. What other jobs tried does not count, and a strategy that
    would decline such an arm is overruled.

    Args:
        selection: of the strategy.
        state: knows the tries.
        observation: offers the arms.
        settings: ``min_share``.
    """
    tries = sum(entry.pulls for entry in state.arms)
    least = math.floor(settings.min_share * tries / max(len(observation.options), 1))
    starving = sorted((found for found in selection.ranked if found.pulls < least), key=lambda found: found.pulls)
    if not starving:
        return selection
    fed = [_told(found, least, tries, settings) for found in starving]
    return replace(selection, ranked=[*fed, *(found for found in selection.ranked if found.pulls >= least)])


def _told(found: RankedArm, least: int, tries: int, settings: PolicySettings) -> RankedArm:
    why = (
        f"due by min_share {settings.min_share:g}: {found.pulls} of the {least} tries that it is guaranteed after {tries} in all"
    )
    return replace(found, pays=True, why=why)
