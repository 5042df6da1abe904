"""The strategies that grow where the gradient of a newborn seed is largest: as a whole, or for the parameters that it takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, ArmMerit, ArmOption, Decide, Decided, Decision, Observation
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, affordable, by_score
from esperd.policy.credit import passes_of
from esperd.policy.lots import listing
from esperd.policy.state import BanditState
from esperd.policy.wording import gauge

LASTS = 0.1
"""Share of a job's epochs after which a merit is measured anew: it is of the network as it was. Chosen, not measured."""


Score = Callable[[float, ArmOption], float]
"""What an arm is ranked by, of its merit and its price."""


def decide(request: Decide) -> Decided:
    """Answer one decision point by ``gradient_merit``; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def decide_per_parameter(request: Decide) -> Decided:
    """Answer one decision point by ``merit_per_parameter``."""
    return pipeline.answer(request, select_per_parameter)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """The largest norm first."""
    return _select(request, state, available, lambda norm, _option: norm, "gradient merit")


def select_per_parameter(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """The largest root mean square first. Gradient flow on a seed's parameters lowers the loss at the rate of the squared norm;
    divided by their number, that is what each of them promises. A norm alone grows with the number of weights.
    """

    def of_each(norm: float, option: ArmOption) -> float:
        return norm / math.sqrt(max(option.parameters, 1))

    return _select(request, state, available, of_each, "gradient merit per parameter")


def _select(request: Decide, state: BanditState, available: Sequence[RankedArm], score: Score, called: str) -> Selection:
    """Every available arm that may be grown is gauged when one is to be; what was gauged counts for :data:`LASTS` of the job.

    An arm whose seeds did not pay is not grown again, however large its gradient, and one whose rent no gain could cover is not
    grown at all: nothing is spent on their gradients. Where the job cannot bear to gauge all (see :func:`gauge_all`), an older
    merit goes on to count, and arms that were never gauged come after the others, as the job lists them.
    """
    out = [_out(found, request.observation) for found in available]
    open_to = [found for found, judged in zip(available, out, strict=True) if judged is None]
    fresh, latest = fresh_merits(request, state), {merit.arm: merit for merit in state.merits}
    if measure := gauge_all(request, state, [found for found in open_to if found.arm not in fresh]):
        return Selection(ranked=available, measure=measure)
    unknown = [found for found in open_to if found.arm not in latest]
    of = f"{len(open_to)}" if not unknown else f"{len(open_to) - len(unknown)} of {len(open_to)}"
    among = f"{called} of {of} arms that may be grown"
    ranked = [_gauged(found, latest[found.arm], score, among) for found in open_to if found.arm in latest]
    known = [found for found in ranked if found.pays]
    failed = [found for found in ranked if not found.pays]
    failed += [judged for judged in out if judged is not None]
    too_dear = f"not gauged, because that would take more than {SHARE:.0%} of the job; next in its list"
    left_out = [replace(found, why=too_dear) for found in unknown]
    listed = (sorted(part, key=lambda found: listing(request.rng_seed, found.arm)) for part in (left_out, failed))
    return Selection(
        ranked=[*by_score(known, request.rng_seed, "largest"), *itertools.chain(*listed)], promise=f"has a {called} of"
    )


SHARE = 0.05
"""Share of a job that gauging may take, all arms and points together. Chosen, not measured."""


def gauge_all(request: Decide, state: BanditState, arms: Sequence[RankedArm]) -> list[Decision]:
    """Gauge arms over as many batches as the settings ask for, or as :data:`SHARE` of the job bears. Where that is not one batch
    for each of them, those that were never gauged are, or not for the longest, as many as it bears; none where it bears none.

    Args:
        request: the decision point. Where nobody knows how much is left, gauging is not limited.
        state: what was gauged so far.
        arms: those without a merit that counts.
    """
    observation, batches = request.observation, request.settings.merit_batches
    if observation.steps_per_epoch is None or observation.epochs_left is None:
        return [gauge(found, batches) for found in arms]
    allowed = SHARE * (observation.epoch + observation.epochs_left) * observation.steps_per_epoch - state.gauged_passes
    passes = {found.arm: passes_of(found.option.flops_per_sample, observation) for found in arms}
    if (borne := int(allowed / max(math.fsum(passes.values()), 1.0))) >= 1:
        return [gauge(found, min(batches, borne)) for found in arms]
    when = {merit.arm: merit.epoch for merit in state.merits}
    waiting = sorted(arms, key=lambda found: (when.get(found.arm, -1), listing(request.rng_seed, found.arm)))
    taken = itertools.accumulate(passes[found.arm] for found in waiting)
    return [gauge(found, 1) for found, all_so_far in zip(waiting, taken, strict=True) if all_so_far <= allowed]


def fresh_merits(request: Decide, state: BanditState) -> dict[Arm, ArmMerit]:
    """Merits that still count, by arm."""
    observation = request.observation
    lasts = LASTS * (observation.epoch + (observation.epochs_left or 0.0))
    return {merit.arm: merit for merit in state.merits if observation.epoch - merit.epoch <= lasts}


def _out(found: RankedArm, observation: Observation) -> RankedArm | None:
    """The arm, with the reason why it is not grown whatever its gradient; None where there is none."""
    if found.expected is not None and found.expected <= 0.0:
        why = f"does not pay: mean reward {found.expected:.4f} over {found.known}"
        return replace(found, pays=False, why=why)
    if not affordable(found, observation):
        return replace(found, pays=False, why=f"costs more than the whole gate loss of {observation.gate_loss:.4f}")
    return None


def _gauged(found: RankedArm, merit: ArmMerit, score: Score, among: str) -> RankedArm:
    """The arm with its score, or with the reason why it has none."""
    if merit.norm is None:
        return replace(found, pays=False, why=f"could not be gauged: {merit.why_not}")
    over = f"{merit.batches} batch" if merit.batches == 1 else f"{merit.batches} batches"
    ranked_by = score(merit.norm, found.option)
    return replace(found, score=ranked_by, why=f"{among}: {ranked_by:.4g} over {over}")
