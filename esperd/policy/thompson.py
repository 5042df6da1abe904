"""The strategy ``thompson``: each arm's mean reward is drawn from what is believed about it, and the highest draw wins
(Thompson 1933; Gaussian: Agrawal and Goyal 2013, arXiv:1209.3353).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Decide, Decided
from esperd.policy import lots, pipeline
from esperd.policy.arms import RankedArm, Selection, by_score, spread
from esperd.policy.state import BanditState


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Drawn here and now from ``Normal(mean, (exploration * spread)^2 / n)``: the posterior under a flat prior.

    Under that prior an arm of which nothing is known could be worth anything, and comes first.
    """
    width = request.settings.exploration * spread(state.arms, available)
    ranked = [_drawn(request, found, width, len(available)) for found in available]
    return Selection(ranked=by_score(ranked, request.rng_seed), promise="was drawn at")


def _drawn(request: Decide, found: RankedArm, width: float, available: int) -> RankedArm:
    if found.expected is None:
        return found
    deviation = width / math.sqrt(found.tries)
    score = found.expected + deviation * lots.normal(request, found.arm)
    why = (
        f"highest draw of {available} available arms: {score:.4f} from a mean reward of {found.expected:.4f} ± {deviation:.4f} "
        f"over {found.known}"
    )
    return replace(found, score=score, pays=score > 0.0, why=why)
