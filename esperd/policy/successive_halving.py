"""The strategy ``successive_halving``: arms compete before one is grown, and each round the better half goes on for twice as long
(Jamieson and Talwalkar 2016, arXiv:1502.07943).

One of the contenders is growing nothing: who does not beat it at equal FLOPs, after rent, is not grown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, ArmMerit, ArmTrial, Decide, Decided
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, by_score
from esperd.policy.gradient_merit import fresh_merits, gauge_all
from esperd.policy.lots import listing
from esperd.policy.rent import rent
from esperd.policy.state import BanditState
from esperd.policy.wording import compete

FINAL = 2
"""Arms in the last round: the better of them is the first to be grown."""


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Gauge, let compete, then grow in the order of the contest. There is one contest a job: it takes its share of the budget.

    Where none of the arms of its last round paid, those that lost to them in shorter ones are not grown either.
    """
    trials = {tried.arm: tried for tried in state.trials}
    if not trials:
        return _first_round(request, state, available)
    running = _next_round(trials, available)
    if running:
        length = 2 * max(tried.epochs for tried in trials.values())
        return Selection(ranked=available, measure=[compete(found, length, len(running)) for found in running])
    told = [_placed(found, trials) for found in available]
    if not _final_paid(trials, request, state):
        told = [_refuted(found, trials) for found in told]
    known = sorted(
        (found for found in told if found.arm in trials),
        key=lambda found: (-trials[found.arm].epochs, -(found.score or 0.0), listing(request.rng_seed, found.arm)),
    )
    others = by_score((found for found in told if found.arm not in trials), request.rng_seed)
    return Selection(ranked=[*known, *others], promise="beat training on by")


def rounds(contenders: int) -> list[int]:
    """Arms in each round: halved, rounded up, until two are left."""
    sizes = [contenders]
    while sizes[-1] > FINAL:
        sizes.append(max(FINAL, -(-sizes[-1] // 2)))
    return sizes


PROBE_STEPS = 3
"""Steps at most that the probe of a newborn seed costs, see ``esperd.growth.probe``: each contender is newborn in each round."""


def plan(entering: Sequence[RankedArm], request: Decide) -> tuple[Sequence[RankedArm], float] | None:
    """Which arms enter, and for how many epochs the first round lasts, so that all rounds together take at most their share of
    what is left: training in whole steps, gate passes, of which every round has one more than arms, and the probe of each newborn
    seed. Where all but training would take more than half of it, or a round would be shorter than a step of its dearest arm,
    fewer arms enter, and without the dearest where that does not help.

    Args:
        entering: those that may, the best first.
        request: the decision point. Where nobody knows how much is left (only seconds bound the job, and no epoch was timed
            yet), it is taken to be as much as is behind it. Where nobody says how many steps an epoch has, a round may last any
            part of one.

    Returns:
        None where not even two arms, or the only one, and a step each fit.
    """
    pool, fewest = list(entering), min(len(entering), FINAL)
    while pool and len(pool) >= fewest:
        for count in range(min(len(pool), request.settings.contenders), fewest - 1, -1):
            if (length := _first_length(pool[:count], request)) is not None:
                return pool[:count], length
        pool.remove(max(pool, key=lambda found: (found.option.flops_per_sample, found.arm)))
    return None


def _first_length(arms: Sequence[RankedArm], request: Decide) -> float | None:
    """Epochs of the first round of a contest of these arms; None where it does not fit."""
    observation, allowed, steps = request.observation, _allowed(request), request.observation.steps_per_epoch
    dearest = max(found.option.flops_per_sample for found in arms) / max(observation.host_flops_per_sample, 1.0)
    # a seed in training takes three times its forward FLOPs, a host whose input needs no gradient hardly more than twice
    step = 1.0 + 1.5 * dearest
    sizes = rounds(len(arms))
    beside = (observation.gate_pass_epochs or 0.0) * (1.0 + dearest) * sum(size + 1 for size in sizes)
    beside += 0.0 if steps is None else PROBE_STEPS * step / steps * sum(sizes)
    if beside > allowed / 2 and len(arms) > FINAL:
        return None
    length = (allowed - beside) / sum((size + 1) * 2.0**number for number, size in enumerate(sizes))
    if steps is None:
        return length if length > 0.0 else None
    whole = math.floor(length * steps)
    return whole / steps if whole >= step else None


def _allowed(request: Decide) -> float:
    """Epochs that a contest may take."""
    left = request.observation.epochs_left
    return request.settings.contest_share * (float(request.observation.epoch) if left is None else left)


def _without_contest(request: Decide, available: Sequence[RankedArm]) -> Selection:
    """Nothing that has to win a contest is grown where none can be held; what was grown before is judged by what became of it."""
    why = (
        f"cannot compete: a contest may take {_allowed(request):.2g} epochs, which is less than {min(len(available), FINAL)} "
        "contenders take that train for a step each, beside one that grows nothing"
    )
    told = [_placed(found, {}) if found.mean is not None else replace(found, pays=False, why=why) for found in available]
    told.sort(key=lambda found: (not found.pays, -(found.score or 0.0), listing(request.rng_seed, found.arm)))
    return Selection(ranked=told)


def _first_round(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    settings = request.settings
    if plan(available, request) is None:  # whatever their merits are: the two cheapest do not fit
        return _without_contest(request, available)
    merits = fresh_merits(request, state)
    unknown = [found for found in available if found.arm not in merits]
    if len(available) > settings.contenders and (measure := gauge_all(request, state, unknown)):
        return Selection(ranked=available, measure=measure)
    entering = sorted(available, key=lambda found: (-_norm(merits.get(found.arm)), listing(request.rng_seed, found.arm)))
    entering = [found for found in entering if _enters(merits.get(found.arm))]
    if not entering:
        told = {arm: f"could not be gauged: {merit.why_not}" for arm, merit in merits.items()}
        return Selection(ranked=[replace(found, pays=False, why=told[found.arm]) for found in available])
    planned = plan(entering, request)
    if planned is None:
        return _without_contest(request, available)
    arms, length = planned
    return Selection(ranked=available, measure=[compete(found, length, len(arms)) for found in arms])


def _enters(merit: ArmMerit | None) -> bool:
    """One that could not even be gauged does not enter; where nobody was gauged, all do."""
    return merit is None or merit.norm is not None


def _norm(merit: ArmMerit | None) -> float:
    return 0.0 if merit is None or merit.norm is None else merit.norm


def _next_round(trials: dict[Arm, ArmTrial], available: Sequence[RankedArm]) -> list[RankedArm]:
    """Who competes next; nobody when the contest is over."""
    length = max(tried.epochs for tried in trials.values())
    last = [tried for tried in trials.values() if tried.epochs == length]
    if len(last) <= FINAL:
        return []
    survivors = [found for found in available if found.arm in trials and _gain(found, trials[found.arm]) is not None]
    survivors = [found for found in survivors if trials[found.arm].epochs == length]
    ranked = sorted(survivors, key=lambda found: (-(_gain(found, trials[found.arm]) or 0.0), found.arm))
    return ranked[: max(FINAL, -(-len(last) // 2))]


def _gain(found: RankedArm, tried: ArmTrial) -> float | None:
    """Loss that it saved beyond training on, after rent."""
    return None if tried.trial is None else tried.trial.loss - found.rent


def _final_paid(trials: dict[Arm, ArmTrial], request: Decide, state: BanditState) -> bool:
    """Whether an arm of the last round paid: by what became of its seeds where it was grown since, else by what it saved in that
    round, after rent as far as it is offered still.
    """
    longest = max(tried.epochs for tried in trials.values())
    means = {entry.arm: entry.total / entry.pulls for entry in state.arms}
    prices = {
        option.arm: rent(option.parameters, option.flops_per_sample, request.observation, request.settings, option.seconds_share)
        for option in request.observation.options
    }

    def worth(tried: ArmTrial) -> float:
        if tried.arm in means or tried.trial is None:
            return means.get(tried.arm, 0.0)
        return tried.trial.loss - prices.get(tried.arm, 0.0)

    return any(worth(tried) > 0.0 for tried in trials.values() if tried.epochs == longest)


def _refuted(found: RankedArm, trials: dict[Arm, ArmTrial]) -> RankedArm:
    """An arm that lost to arms of which none paid in the end; one that was grown since is judged by what became of its seeds."""
    longest = max(tried.epochs for tried in trials.values())
    if found.mean is not None or found.arm not in trials or trials[found.arm].epochs == longest:
        return found
    why = f"lost to arms of which none paid after {longest:.2g} epochs"
    return replace(found, score=None, pays=False, why=why)


def _placed(found: RankedArm, trials: dict[Arm, ArmTrial]) -> RankedArm:
    """An arm with its place in the contest; one that was grown since is judged by what became of its seeds."""
    if found.mean is not None:
        why = f"mean reward {found.mean:.4f} over {found.pulls} tries"
        return replace(found, score=found.mean, pays=found.mean > 0.0, why=why)
    tried = trials.get(found.arm)
    if tried is None or tried.trial is None:
        return replace(found, pays=False, why="did not enter the contest" if tried is None else tried.why_not)
    score = tried.trial.loss - found.rent
    why = (
        f"best of what {len(trials)} contenders left: after {tried.epochs:.2g} epochs it beat training on by "
        f"{tried.trial.loss:.4f} [{tried.trial.lower:.4f}, {tried.trial.upper:.4f}] at equal FLOPs"
    )
    return replace(found, score=score, pays=score > 0.0, why=why)
