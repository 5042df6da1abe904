"""The strategy ``softmax``: an arm is drawn the more often the better it did (Boltzmann exploration: Sutton 1990)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, Decide, Decided
from esperd.policy import lots, pipeline
from esperd.policy.arms import RankedArm, Selection, spread
from esperd.policy.state import BanditState


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Arms of which nothing is known first; then drawn with probabilities in proportion to
    ``exp(mean / (temperature * spread))``.

    As long as no reward differs from another there is no spread, and all are equally likely. When no mean is above 0, nothing is
    drawn.
    """
    scale = request.settings.temperature * spread(state.arms, available)
    known = [(found.arm, found.expected) for found in available if found.expected is not None]
    logits = {arm: expected / scale if scale else 0.0 for arm, expected in known}
    chances = _softmax(logits)
    pays = any(expected > 0.0 for _, expected in known)
    if logits and len(logits) == len(available) and not pays:
        best_first = sorted(available, key=lambda found: (-(found.expected or 0.0), lots.listing(request.rng_seed, found.arm)))
        return Selection(ranked=[replace(found, score=found.expected, pays=False) for found in best_first], promise="has brought")
    drawn = [_told(found, chances) for found in available]
    return Selection(ranked=sorted(drawn, key=lambda found: _place(request, found, logits)))


def _place(request: Decide, found: RankedArm, logits: dict[Arm, float]) -> tuple[bool, float, bytes]:
    """Those of which nothing is known by the job's listing, the others by draw."""
    place = lots.listing(request.rng_seed, found.arm)
    if found.arm not in logits:
        return False, 0.0, place
    return True, -(logits[found.arm] + lots.gumbel(request, found.arm)), place


def _told(found: RankedArm, chances: dict[Arm, float]) -> RankedArm:
    if found.expected is None:
        return found
    why = (
        f"drawn with a probability of {chances[found.arm]:.3f} among {len(chances)} available arms that were tried: mean reward "
        f"{found.expected:.4f} over {found.known}"
    )
    return replace(found, score=found.expected, why=why)


def _softmax(logits: dict[Arm, float]) -> dict[Arm, float]:
    """Shifted by the largest: no exponential overflows."""
    top = max(logits.values(), default=0.0)
    powers = {arm: math.exp(logit - top) for arm, logit in logits.items()}
    total = math.fsum(powers.values())
    return {arm: power / total for arm, power in powers.items()}
