"""The strategy ``successive_halving``: arms compete before one is grown, and each round the better half goes on for twice as long
(Jamieson and Talwalkar 2016, arXiv:1502.07943).

One of the contenders is growing nothing: who does not beat it at equal FLOPs, after rent, is not grown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from esperd.messages.policy import Arm, ArmMerit, ArmTrial, Decide, Decided
from esperd.policy import pipeline
from esperd.policy.arms import RankedArm, Selection, by_score
from esperd.policy.gradient_merit import fresh_merits, gauge_all
from esperd.policy.lots import listing
from esperd.policy.state import BanditState
from esperd.policy.wording import compete

FINAL = 2
"""Arms in the last round: the better of them is the first to be grown."""


def decide(request: Decide) -> Decided:
    """Answer one decision point; see :func:`esperd.policy.pipeline.answer`."""
    return pipeline.answer(request, select)


def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    """Gauge, let compete, then grow in the order of the contest. There is one contest a job: it takes its share of the budget."""
    trials = {tried.arm: tried for tried in state.trials}
    if not trials:
        return _first_round(request, state, available)
    running = _next_round(trials, available)
    if running:
        length = 2 * max(tried.epochs for tried in trials.values())
        return Selection(ranked=available, measure=[compete(found, length, len(running)) for found in running])
    told = [_placed(found, trials) for found in available]
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


def first_length(contenders: int, share: float, epochs_left: float) -> float:
    """Epochs of the first round, so that all rounds together take their share of what is left.

    Args:
        contenders: that enter.
        share: of the epochs left.
        epochs_left: of the job; where nobody knows them (seconds alone bound it), as many as it has behind it.

    Every round has one contender more, which grows nothing.
    """
    units = sum((size + 1) * 2.0**number for number, size in enumerate(rounds(contenders)))
    return share * epochs_left / units


def _first_round(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
    settings, observation = request.settings, request.observation
    merits = fresh_merits(request, state)
    unknown = [found for found in available if found.arm not in merits]
    if len(available) > settings.contenders and unknown:
        return Selection(ranked=available, measure=gauge_all(request, unknown))
    entering = sorted(available, key=lambda found: (-_norm(merits.get(found.arm)), listing(request.rng_seed, found.arm)))
    entering = [found for found in entering if _enters(merits.get(found.arm))][: settings.contenders]
    if not entering:
        return Selection(ranked=[replace(found, pays=False, score=None) for found in available])
    left = float(observation.epoch) if observation.epochs_left is None else observation.epochs_left
    length = first_length(len(entering), settings.contest_share, left)
    return Selection(ranked=available, measure=[compete(found, length, len(entering)) for found in entering])


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
        f"first of {len(trials)} contenders: after {tried.epochs:.2g} epochs it beat training on by {tried.trial.loss:.4f} "
        f"[{tried.trial.lower:.4f}, {tried.trial.upper:.4f}] at equal FLOPs"
    )
    return replace(found, score=score, pays=score > 0.0, why=why)
