"""The strategy ``epsilon_greedy``: the best mean, or any arm with a probability that falls as evidence gathers (epsilon_n-greedy
of Auer, Cesa-Bianchi and Fischer 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Decide, Decided
from esperd.policy import lots, pipeline
from esperd.policy.arms import RankedArm, Selection, all_tries, by_score
from esperd.policy.state import BanditState


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Arms of which nothing is known first. Then, with the probability ``epsilon = min(1, exploration * arms / tries)``, an order
    by lot; otherwise the highest mean.
    """
    tries = all_tries(state.arms, available)
    epsilon = min(1.0, request.settings.exploration * len(available) / tries) if tries else 1.0
    explores = lots.uniform(request) < epsilon
    told = f"explored (epsilon {epsilon:.3f}): drawn among" if explores else f"best mean (epsilon {epsilon:.3f}) of"
    ranked = [_told(found, f"{told} {len(available)} available arms", explores=explores) for found in available]
    if explores:
        return Selection(ranked=sorted(ranked, key=lambda found: (found.tries > 0, lots.uniform(request, found.arm))))
    return Selection(ranked=by_score(ranked, request.rng_seed), promise="has brought")


def _told(found: RankedArm, said: str, *, explores: bool) -> RankedArm:
    """The score is the mean; who explores asks for none."""
    if found.expected is None:
        return found
    why = f"{said}: mean reward {found.expected:.4f} over {found.known}"
    return replace(found, score=found.expected, pays=explores or found.expected > 0.0, why=why)
