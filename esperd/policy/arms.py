"""Arms that could be germinated now, what is known about each, and what a strategy makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from esperd.messages.policy import Arm, ArmOption, Decide, Observation, PolicySettings
from esperd.policy.lots import listing
from esperd.policy.rent import rent
from esperd.policy.state import ArmStatistics, BanditState


@dataclass(frozen=True, kw_only=True)
class RankedArm:
    """An arm that could be germinated now.

    Args:
        option: arm and price in parameters and FLOPs.
        rent: price in units of loss.
        pulls: rewards known.
        mean: of its rewards; None when never tried.
        score: what the strategy ranks by; None where it has nothing to go by.
        pays: whether it is worth a try as far as the strategy can say.
        why: what speaks for it, in numbers; empty: that it was never tried.
    """

    option: ArmOption
    rent: float
    pulls: int
    mean: float | None
    score: float | None = None
    pays: bool = True
    why: str = ""

    @property
    def arm(self) -> Arm:
        """Slot and blueprint."""
        return self.option.arm


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a strategy makes of the available arms.

    Args:
        ranked: all of them; the first that pays is germinated.
        promise: what the strategy says of a score, as in "the best available arm promises at most 0.1".
    """

    ranked: Sequence[RankedArm]
    promise: str = "promises"


Select = Callable[[Decide, BanditState, Sequence[RankedArm]], Selection]
"""A strategy's own part: pure, and blind to the order in which it is given the arms."""


def available_arms(observation: Observation, statistics: Iterable[ArmStatistics], settings: PolicySettings) -> list[RankedArm]:
    """Arms that may be germinated now, with price and record, not yet ranked.

    Args:
        observation: holds the options.
        statistics: of every arm with a known reward, available or not.
        settings: prices of the rent.
    """
    known = {entry.arm: entry for entry in statistics}
    return [_recorded(option, known.get(option.arm), observation, settings) for option in observation.options if option.available]


def by_score(ranked: Iterable[RankedArm], rng_seed: int) -> list[RankedArm]:
    """Those without a score first, then the highest score, then the fewest tries; what remains equal as the job lists it."""
    return sorted(
        ranked,
        key=lambda found: (found.score is not None, -(found.score or 0.0), found.pulls, listing(rng_seed, found.arm)),
    )


def spread(statistics: Sequence[ArmStatistics]) -> float:
    """Standard deviation of all rewards so far, around their common mean; of a single reward, its size; 0 when there is none."""
    pulls = sum(entry.pulls for entry in statistics)
    if pulls == 0:
        return 0.0
    total = sum(entry.total for entry in statistics)
    squares = sum(entry.squares for entry in statistics)
    if pulls == 1:
        return abs(total)
    return math.sqrt(max(squares - total * total / pulls, 0.0) / (pulls - 1))


def _recorded(option: ArmOption, entry: ArmStatistics | None, observation: Observation, settings: PolicySettings) -> RankedArm:
    price = rent(option.parameters, option.flops_per_sample, observation, settings, option.seconds_share)
    if entry is None:
        return RankedArm(option=option, rent=price, pulls=0, mean=None)
    return RankedArm(option=option, rent=price, pulls=entry.pulls, mean=entry.total / entry.pulls)
