"""Orders arms by what they promise: UCB1 (Auer, Cesa-Bianchi and Fischer 2002) with the bonus in units of the reward's spread."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from esperd.messages.policy import Arm, ArmOption, Observation, PolicySettings
from esperd.policy.rent import rent
from esperd.policy.state import ArmStatistics


@dataclass(frozen=True)
class RankedArm:
    """An arm that could be germinated now.

    Args:
        option: arm and price in parameters and FLOPs.
        rent: price in units of loss.
        pulls: rewards known.
        mean: of its rewards; None when never tried.
        score: mean plus bonus; None when never tried.
    """

    option: ArmOption
    rent: float
    pulls: int
    mean: float | None
    score: float | None

    @property
    def arm(self) -> Arm:
        """Slot and blueprint."""
        return self.option.arm


def rank(
    observation: Observation, statistics: Sequence[ArmStatistics], settings: PolicySettings, rng_seed: int
) -> list[RankedArm]:
    """Available arms, the most promising first: those never tried, then by score, then by fewest pulls.

    What remains equal stands in an order drawn by ``rng_seed``: the order of ``observation.options`` has no influence.

    Args:
        observation: holds the options.
        statistics: of every arm with a known reward, available or not.
        settings: exploration and prices.
        rng_seed: the job's.
    """
    known = {entry.arm: entry for entry in statistics}
    pulls = sum(entry.pulls for entry in statistics)
    deviation = spread(statistics)
    ranked = [
        _ranked(option, known.get(option.arm), pulls, deviation, observation, settings)
        for option in observation.options
        if option.available
    ]
    return sorted(
        ranked,
        key=lambda found: (
            found.score is not None,
            -(found.score or 0.0),
            found.pulls,
            _lot(rng_seed, found.arm),
        ),
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


def upper_bound(entry: ArmStatistics, pulls: int, deviation: float, exploration: float) -> float:
    """``mean + exploration * spread * sqrt(2 ln N / n)``.

    Args:
        entry: the arm's rewards, at least one.
        pulls: N, of all arms.
        deviation: spread of all rewards.
        exploration: width of the bonus.
    """
    return entry.total / entry.pulls + exploration * deviation * math.sqrt(2.0 * math.log(pulls) / entry.pulls)


def _ranked(
    option: ArmOption,
    entry: ArmStatistics | None,
    pulls: int,
    deviation: float,
    observation: Observation,
    settings: PolicySettings,
) -> RankedArm:
    price = rent(option.parameters, option.flops_per_sample, observation, settings)
    if entry is None:
        return RankedArm(option=option, rent=price, pulls=0, mean=None, score=None)
    score = upper_bound(entry, pulls, deviation, settings.exploration)
    return RankedArm(option=option, rent=price, pulls=entry.pulls, mean=entry.total / entry.pulls, score=score)


def _lot(rng_seed: int, arm: Arm) -> bytes:
    """A lot for an arm, independent of where it stands in any list."""
    return hashlib.blake2b(f"{rng_seed}\0{arm.slot}\0{arm.blueprint}".encode(), digest_size=8).digest()
