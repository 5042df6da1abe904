"""When growth ends: once no arm promises as much loss saved per FLOP as training on does. Until then those that do not are left
out.

A pure function of the request, evaluated at each decision point anew: nothing is latched. The slope of the loss flattens while a
job trains, so a rule that ended growth for good at a steep moment would end it too early; where the slope has flattened, the rule
falls silent and the limits of the budget decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median

from esperd.messages.policy import Decide, Decision, Observation
from esperd.policy.arms import RankedArm, Selection
from esperd.policy.obstacles import network_flops
from esperd.policy.state import BanditState
from esperd.policy.wording import alternatives

FEWEST_TRIES = 2
"""Credited tries of any arm before the rule speaks: of one, luck and worth cannot be told apart. What was refused never lived,
and says nothing of what seeds bring. Chosen, not measured."""

EPOCHS = 3
"""Of which the median says what one costs. Chosen, not measured."""

FEWEST_LOSSES = 3
"""Gate losses a slope is read from, at least: any two make a line."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What an arm promises.

    Args:
        found: the arm.
        reward: loss saved after rent: its mean; of an arm that was never tried, the mean of all tries.
        flops: that a seed of it takes from now to the end of the budget.
    """

    found: RankedArm
    reward: float
    flops: float

    @property
    def per_flop(self) -> float:
        """Loss saved for one FLOP; of an arm without counted FLOPs infinitely much, or nothing where it saves none."""
        if self.flops > 0.0:
            return self.reward / self.flops
        return math.inf if self.reward > 0.0 else -math.inf


def worthwhile(
    request: Decide, state: BanditState, selection: Selection, affordable: Sequence[RankedArm]
) -> Sequence[RankedArm] | Decision:
    """Arms that promise as much per FLOP as training on, and with them those that ``min_share`` makes due, in their order; all of
    them where the rule is off, or too little is known to compare. Where none promises as much, the decision to train on.

    Args:
        request: gate losses, the FLOPs they took, what the budget still allows; whether the rule is on, and its window.
        state: rewards so far.
        selection: all available arms, as the strategy ranked them.
        affordable: those of them that may be grown, and are worth a try by the strategy.
    """
    settings = request.settings
    if not settings.stop_rule:
        return affordable
    training = last_gain(request.observation, settings.stop_window)
    promised = expectations(request.observation, state, affordable)
    if training is None or training <= 0.0 or not promised:
        return affordable
    if any(each.per_flop >= training for each in promised):  # growth goes on: for arms that are due, too
        return [each.found for each in promised if each.per_flop >= training or each.found.due]
    best = max(promised, key=lambda each: (each.per_flop, each.found.arm))
    own = f"mean of {best.found.pulls} tries" if best.found.pulls else "never tried, the mean of all tries"
    price = "no counted FLOPs"
    if best.flops > 0.0:
        price = f"the {best.flops:.3g} FLOPs it takes to the end of the budget, {1e12 * best.per_flop:.3g} per TFLOP"
    return Decision(
        action="wait",
        arm=best.found.arm,
        score=best.found.score,
        reason=(
            f"stop rule: the best available arm promises {best.reward:.4g} of loss after rent ({own}) for {price}; the last "
            f"FLOPs of training on bring {1e12 * training:.3g} per TFLOP (from {settings.stop_window} gate losses)"
        ),
        alternatives=alternatives(selection.ranked, best.found),
    )


def training_gain(observation: Observation, window: int) -> float | None:
    """Loss that training saves per FLOP: the Theil-Sen slope (Sen 1968) of the latest gate losses over :func:`trained_flops`,
    which one bad gate pass in a window of five does not move far. Negative while the loss rises; None below three losses.

    Args:
        observation: gate losses and FLOPs; both are compared from their latest.
        window: losses to look at.
    """
    trained = trained_flops(observation)
    known = min(len(observation.gate_losses), len(trained), window)
    if known < FEWEST_LOSSES:
        return None
    points = list(zip(trained[-known:], observation.gate_losses[-known:], strict=True))
    slopes = [
        (after[1] - before[1]) / (after[0] - before[0]) for before, after in combinations(points, 2) if after[0] > before[0]
    ]
    return -median(slopes) if slopes else None


def last_gain(observation: Observation, window: int) -> float | None:
    """Loss that the last FLOPs of the budget will save, each: those are what a seed takes away, not the next ones.

    Gains are expected to shrink as they do when a loss falls with the logarithm of the FLOPs: the slope of now, times the share
    of the budget's FLOPs that is spent. In simulated worlds whose loss falls exponentially, this came out better than the
    slope of now and than its square.

    Args:
        observation: as for :func:`training_gain`, with the epochs left.
        window: losses to look at.
    """
    now, epoch = training_gain(observation, window), epoch_flops(observation)
    if now is None or epoch is None or observation.epochs_left is None:
        return None
    spent = trained_flops(observation)[-1]
    return now * spent / (spent + observation.epochs_left * epoch)


def expectations(observation: Observation, state: BanditState, arms: Sequence[RankedArm]) -> list[Expectation]:
    """What each arm promises, and for what; empty while too little is known.

    The FLOPs of a seed are its share of what an epoch takes now, times the epochs that the budget allows.
    """
    tries = sum(entry.pulls - entry.refused for entry in state.arms)
    epoch = epoch_flops(observation)
    if tries < FEWEST_TRIES or epoch is None or not observation.epochs_left:
        return []
    network = network_flops(observation)
    general = sum(entry.total - entry.refused_total for entry in state.arms) / tries
    return [
        Expectation(
            found=found,
            reward=general if found.mean is None else found.mean,
            flops=epoch * observation.epochs_left * found.option.flops_per_sample / max(network, 1.0),
        )
        for found in arms
    ]


def epoch_flops(observation: Observation) -> float | None:
    """FLOPs of the network itself between two gate measurements, the median of the last :data:`EPOCHS`: where a rollback took an
    epoch back, what it had cost falls between two of them. None before the second.
    """
    trained = trained_flops(observation)[-EPOCHS - 1 :]
    return median(after - before for before, after in pairwise(trained)) if len(trained) >= 2 else None


def trained_flops(observation: Observation) -> tuple[float, ...]:
    """FLOPs spent on the network itself when each of the latest gate losses was measured. What arms took that were measured in
    copies of it after one epoch is spent when the next one ends, and is no part of what an epoch costs, nor of what lowered
    the loss. Of a trainer that does not tell it (an older one), nothing was taken.
    """
    known = min(len(observation.trial_flops), len(observation.gate_flops))
    if not known:
        return observation.gate_flops
    both = zip(observation.gate_flops[-known:], observation.trial_flops[-known:], strict=True)
    return tuple(spent - tried for spent, tried in both)
