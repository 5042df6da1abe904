"""The strategy ``contextual``: what one arm earned tells about others like it (LinUCB: Li, Chu, Langford and Schapire 2010,
arXiv:1003.0146, with one model for all arms as in Chu, Li, Reyzin and Schapire 2011).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from esperd.errors import UnknownName
from esperd.messages.policy import Arm, Decide, Decided
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, by_score, spread
from esperd.policy.circumstances import circumstances_of
from esperd.policy.state import BanditState, Circumstances

RIDGE = 1.0
"""Weight of the prior that no feature matters, in tries; the paper's identity matrix."""

Vector = NDArray[np.float64]


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`.

    Raises:
        UnknownName: when the observation does not describe the slot of an available arm.
    """
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """By ``m + w·x + exploration * spread * sqrt(x·A⁻¹x)``: the reward that ridge regression over all tries expects, and a bonus
    for what it has seen little of.

    ``m`` is the mean of all rewards: what nothing is known about is expected to earn that, not nothing. ``x`` holds the arm's
    :class:`~esperd.policy.state.Circumstances` and an indicator of its blueprint; ``A = RIDGE * I + sum x xᵀ`` over the tries
    and ``w = A⁻¹ sum (reward - m) x``. Before the first reward there is no model, and
    arms come as the job lists them. An arm that was never tried is not declined: a prediction is no measurement.

    What other jobs lead this one to expect of an available arm counts as tries of it, here and now. They know of blueprints, and
    the arms of one share its tries: the model would count them once an arm.
    """
    known = [(entry.arm, entry.circumstances, entry.reward) for entry in state.tries if entry.circumstances is not None]
    listed = sorted(available, key=lambda found: found.arm)  # sums of floats depend on the order
    priors = [(found, found.prior) for found in listed if found.prior is not None]
    if not known and not priors:
        return Selection(ranked=by_score(available, request.rng_seed))
    blueprints = sorted({found.arm.blueprint for found in available} | {arm.blueprint for arm, _, _ in known})
    sharing = Counter(found.arm.blueprint for found, _ in priors)
    told = [prior.tries / sharing[found.arm.blueprint] for found, prior in priors]
    counts = np.array([1.0 for _ in known] + told)  # (tries,)
    rewards = np.array([reward for _, _, reward in known] + [prior.mean for _, prior in priors])  # (tries,)
    features = [_features(arm, circumstances, blueprints) for arm, circumstances, _ in known]
    features += [_features(found.arm, _circumstances(found, request), blueprints) for found, _ in priors]
    scale, mean = np.sqrt(counts), np.average(rewards, weights=counts)
    seen = scale[:, None] * np.stack(features)  # (tries, features)
    precision = RIDGE * np.eye(seen.shape[1]) + seen.T @ seen  # (features, features)
    weights = np.linalg.solve(precision, seen.T @ (scale * (rewards - mean)))  # (features,)
    width = request.settings.exploration * spread(state.arms, available)
    ranked = []
    for found in available:
        x = _features(found.arm, _circumstances(found, request), blueprints)
        expected, doubt = float(mean + weights @ x), float(np.sqrt(x @ np.linalg.solve(precision, x)))
        ranked.append(_bounded(found, expected, expected + width * doubt, f"{len(available)} available arms"))
    return Selection(ranked=by_score(ranked, request.rng_seed, "best"), promise="promises at most")


def _bounded(found: RankedArm, expected: float, score: float, among: str) -> RankedArm:
    own = "never tried" if found.expected is None else f"own mean {found.expected:.4f} over {found.known}"
    why = f"of {among}: expected reward {expected:.4f} by its like, upper bound {score:.4f}, {own}"
    return replace(found, score=score, pays=found.pulls == 0 or score > 0.0, why=why)


def _circumstances(found: RankedArm, request: Decide) -> Circumstances:
    option, observation = found.option, request.observation
    circumstances = circumstances_of(found.arm.slot, option.parameters, option.flops_per_sample, observation)
    if circumstances is None:
        described = ", ".join(record.slot for record in observation.slots) or "none"
        raise UnknownName(
            f"the observation offers an arm at slot {found.arm.slot!r} but does not describe that slot; described: {described}",
            kind="slots",
            name=found.arm.slot,
        )
    return circumstances


def _features(arm: Arm, where: Circumstances, blueprints: Sequence[str]) -> Vector:
    """One number a feature, each between 0 and 1, or around 0 and within 1 of it: the ridge weighs them alike. A gradient that is
    not known moves nothing, and is told apart from one that is as large as everywhere.
    """
    own = [float(arm.blueprint == blueprint) for blueprint in blueprints]
    gradient = [0.0, 0.0] if where.gradient is None else [where.gradient, 1.0]
    return np.array([where.depth, where.width, where.parameters, where.flops, where.progress, *gradient, *own])
