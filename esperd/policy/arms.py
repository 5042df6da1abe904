"""Arms that could be germinated now, what is known about each, and what a strategy makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from esperd.messages.evidence import Precedent
from esperd.messages.policy import Arm, ArmOption, Decide, Decision, Observation, PolicySettings
from esperd.policy.lots import listing
from esperd.policy.precedents import Prior, prior_of
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
        prior: what other jobs lead this one to expect of it; None: nothing is known of any.
        due: whether ``min_share`` guarantees it the next try.
    """

    option: ArmOption
    rent: float
    pulls: int
    mean: float | None
    score: float | None = None
    pays: bool = True
    why: str = ""
    prior: Prior | None = None
    due: bool = False

    @property
    def arm(self) -> Arm:
        """Slot and blueprint."""
        return self.option.arm

    @property
    def tries(self) -> float:
        """Tries that speak of it: its own, and what other jobs' count as."""
        return self.pulls if self.prior is None else self.pulls + self.prior.tries

    @property
    def expected(self) -> float | None:
        """Mean over those tries; None when there are none."""
        if self.prior is None:
            return self.mean
        return (self.pulls * (self.mean or 0.0) + self.prior.tries * self.prior.mean) / self.tries

    @property
    def known(self) -> str:
        """How its expected reward came about, in words."""
        return f"{self.pulls} tries" if self.prior is None else f"{self.pulls} tries here ({self.prior.why})"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a strategy makes of the available arms.

    Args:
        ranked: all of them; the first that pays is germinated.
        promise: what the strategy says of a score, as in "the best available arm promises at most 0.1".
        measure: what it has to know first (``gauge``, ``try``); nothing else is decided until it is asked again.
    """

    ranked: Sequence[RankedArm]
    promise: str = "promises"
    measure: Sequence[Decision] = ()


Select = Callable[[Decide, BanditState, Sequence[RankedArm]], Selection]
"""A strategy's own part: pure, and blind to the order in which it is given the arms."""


def available_arms(
    observation: Observation,
    statistics: Iterable[ArmStatistics],
    settings: PolicySettings,
    evidence: Sequence[Precedent] = (),
) -> list[RankedArm]:
    """Arms that may be germinated now, with price and record, not yet ranked.

    Args:
        observation: holds the options.
        statistics: of every arm with a known reward, available or not.
        settings: prices of the rent.
        evidence: what other jobs learned.
    """
    known = {entry.arm: entry for entry in statistics}
    options = [option for option in observation.options if option.available]
    return [_recorded(option, known.get(option.arm), observation, settings, evidence) for option in options]


def affordable(found: RankedArm, observation: Observation) -> bool:
    """Whether a gain could cover its rent: no seed saves more than the whole loss."""
    return not 0.0 < observation.gate_loss < found.rent


def by_score(ranked: Iterable[RankedArm], rng_seed: int, called: str = "") -> list[RankedArm]:
    """Those without a score first, then the highest score, then the fewest tries; what remains equal as the job lists it.

    Args:
        ranked: in any order.
        rng_seed: of the job.
        called: what the first of those with a score is, as in "best"; each is told its place before what speaks for it.
    """
    placed = sorted(
        ranked,
        key=lambda found: (found.score is not None, -(found.score or 0.0), found.pulls, listing(rng_seed, found.arm)),
    )
    if not called:
        return placed
    unseen = sum(found.score is None for found in placed)
    told = (replace(found, why=f"{_ordinal(place)}{called} {found.why}") for place, found in enumerate(placed[unseen:], start=1))
    return [*placed[:unseen], *told]


def _ordinal(place: int) -> str:
    """Of a place; nothing for the first."""
    if place == 1:
        return ""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th") if place % 100 not in (11, 12, 13) else "th"
    return f"{place}{ending} "


def all_tries(statistics: Iterable[ArmStatistics], available: Iterable[RankedArm]) -> float:
    """Tries of every arm so far, and what other jobs' tries of the available ones count as."""
    pulls = sum(entry.pulls for entry in statistics)
    return pulls + sum(prior.tries for prior in _priors(available))


def spread(statistics: Sequence[ArmStatistics], available: Iterable[RankedArm] = ()) -> float:
    """Standard deviation of all rewards so far, around their common mean; of a single reward, its size; 0 when there is none.

    Args:
        statistics: of every arm with a known reward.
        available: what other jobs' tries of these led to expect counts as rewards, too.
    """
    priors = _priors(available)
    pulls = sum(entry.pulls for entry in statistics) + sum(prior.tries for prior in priors)
    if pulls == 0:
        return 0.0
    total = sum(entry.total for entry in statistics) + sum(prior.tries * prior.mean for prior in priors)
    squares = sum(entry.squares for entry in statistics)
    squares += sum(prior.tries * (prior.mean * prior.mean + prior.spread * prior.spread) for prior in priors)
    if pulls <= 1:
        return abs(total) / pulls
    # Parts of tries may come to barely more than one; the half keeps the divisor from being almost nothing.
    return math.sqrt(max(squares - total * total / pulls, 0.0) / max(pulls - 1, pulls / 2))


def _priors(available: Iterable[RankedArm]) -> list[Prior]:
    """In the order of the arms, whatever order they are given in: sums of floats depend on it."""
    return [found.prior for found in sorted(available, key=lambda found: found.arm) if found.prior is not None]


def _recorded(
    option: ArmOption,
    entry: ArmStatistics | None,
    observation: Observation,
    settings: PolicySettings,
    evidence: Sequence[Precedent],
) -> RankedArm:
    price = rent(option.parameters, option.flops_per_sample, observation, settings, option.seconds_share)
    prior = prior_of(option, price, observation, evidence)
    if entry is None:
        return RankedArm(option=option, rent=price, pulls=0, mean=None, prior=prior)
    return RankedArm(option=option, rent=price, pulls=entry.pulls, mean=entry.total / entry.pulls, prior=prior)
