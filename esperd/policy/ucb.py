"""The strategy ``ucb``: the highest upper bound wins (UCB1: Auer, Cesa-Bianchi and Fischer 2002), its bonus in units of the
reward's spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Decide, Decided
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, all_tries, by_score, spread
from esperd.policy.state import BanditState


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Arms of which nothing is known first, then by ``mean + exploration * spread * sqrt(2 ln N / n)``."""
    tries, deviation = max(all_tries(state.arms, available), 1), spread(state.arms, available)
    width = request.settings.exploration * deviation
    ranked = [_bounded(found, tries, width, len(available)) for found in available]
    return Selection(ranked=by_score(ranked, request.rng_seed, "best"), promise="promises at most")


def _bounded(found: RankedArm, tries: float, width: float, available: int) -> RankedArm:
    if found.expected is None:
        return found
    score = found.expected + width * math.sqrt(2.0 * math.log(tries) / found.tries)
    why = f"of {available} available arms: mean reward {found.expected:.4f} over {found.known}, upper bound {score:.4f}"
    return replace(found, score=score, pays=score > 0.0, why=why)
