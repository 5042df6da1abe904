"""The strategy ``discounted_ucb``: UCB whose evidence fades, for rewards that drift (Garivier and Moulines 2011,
arXiv:0805.3415).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, Decide, Decided
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, by_score, spread
from esperd.policy.state import BanditState, Try


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Arms of which nothing is known first, then by ``m + exploration * spread * sqrt(2 ln N / n)``, where a try counts
    ``discount ** age``.

    The age of a try is the number of tries, of any arm, credited after it; ``n`` and ``N`` are the sums of those weights, of the
    arm and of all, and ``m`` is the weighted mean. What other jobs know counts as if it had come before this one's first try.
    """
    discount = request.settings.discount
    weights, totals = _faded(state.tries, discount)
    for found in sorted(available, key=lambda found: found.arm):  # sums of floats depend on the order
        if found.prior is not None:
            weight = found.prior.tries * discount ** len(state.tries)
            weights[found.arm] = weights.get(found.arm, 0.0) + weight
            totals[found.arm] = totals.get(found.arm, 0.0) + weight * found.prior.mean
    width = request.settings.exploration * spread(state.arms, available)
    pulls = max(sum(weights.values()), 1.0)  # rounding: the newest try alone weighs 1
    ranked = [_bounded(found, weights, totals, pulls, width, len(available)) for found in available]
    return Selection(ranked=by_score(ranked, request.rng_seed, "best"), promise="promises at most")


def _faded(tries: Sequence[Try], discount: float) -> tuple[dict[Arm, float], dict[Arm, float]]:
    """Weights of every arm's tries, summed; and its rewards times those weights, summed."""
    weights: dict[Arm, float] = {}
    totals: dict[Arm, float] = {}
    for age, known in enumerate(reversed(tries)):
        weight = discount**age
        weights[known.arm] = weights.get(known.arm, 0.0) + weight
        totals[known.arm] = totals.get(known.arm, 0.0) + weight * known.reward
    return weights, totals


def _bounded(
    found: RankedArm, weights: dict[Arm, float], totals: dict[Arm, float], pulls: float, width: float, available: int
) -> RankedArm:
    weight = weights.get(found.arm, 0.0)
    if weight == 0.0:  # never tried, or so long ago that nothing of it is left
        return found
    mean = totals[found.arm] / weight
    score = mean + width * math.sqrt(2.0 * math.log(pulls) / weight)
    why = (
        f"of {available} available arms: discounted mean reward {mean:.4f} over {found.known} that count as "
        f"{weight:.2f}, upper bound {score:.4f}"
    )
    return replace(found, score=score, pays=score > 0.0, why=why)
