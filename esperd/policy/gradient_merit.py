"""The strategies that grow where the gradient of a newborn seed is largest: as a whole, or for the parameters that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, ArmMerit, ArmOption, Decide, Decided, Decision, Observation
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, affordable, by_score
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
    grown at all: nothing is spent on their gradients.
    """
    out = [_out(found, request.observation) for found in available]
    open_to = [found for found, judged in zip(available, out, strict=True) if judged is None]
    fresh = fresh_merits(request, state)
    unknown = [found for found in open_to if found.arm not in fresh]
    if unknown:
        return Selection(ranked=available, measure=gauge_all(request, unknown))
    ranked = [_gauged(found, fresh[found.arm], score, f"largest {called} of {len(open_to)} arms") for found in open_to]
    known = [found for found in ranked if found.pays]
    failed = [found for found in ranked if not found.pays]
    failed += [judged for judged in out if judged is not None]
    ranked = [*by_score(known, request.rng_seed), *sorted(failed, key=lambda found: listing(request.rng_seed, found.arm))]
    return Selection(ranked=ranked, promise=f"has a {called} of")


SHARE = 0.05
"""Share of what is left of a job that gauging all arms may take, as far as a single batch allows. Chosen, not measured."""


def gauge_all(request: Decide, arms: Sequence[RankedArm]) -> list[Decision]:
    """Gauge arms over as many batches as the settings ask for, or as the budget bears."""
    observation, batches = request.observation, request.settings.merit_batches
    if observation.steps_per_epoch is not None and observation.epochs_left is not None:
        host = max(observation.host_flops_per_sample, 1.0)
        passes = sum(1.0 + found.option.flops_per_sample / host for found in arms)  # of the host, for one batch each
        batches = min(batches, int(SHARE * observation.epochs_left * observation.steps_per_epoch / passes))
    return [gauge(found, max(1, batches)) for found in arms]


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


def _gauged(found: RankedArm, merit: ArmMerit, score: Score, first: str) -> RankedArm:
    if merit.norm is None:
        return replace(found, pays=False, why=f"could not be gauged: {merit.why_not}")
    over = f"{merit.batches} batch" if merit.batches == 1 else f"{merit.batches} batches"
    ranked_by = score(merit.norm, found.option)
    return replace(found, score=ranked_by, why=f"{first} that may be grown: {ranked_by:.4g} over {over}")
