"""When growth ends: once the best arm promises less loss saved per FLOP than training on does.

A pure function of the request, evaluated at each decision point anew: nothing is latched. The slope of the loss flattens while a
job trains, so a rule that ended growth for good at a steep moment would end it too early; where the slope has flattened, the rule
falls silent and the limits of the budget decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from esperd.messages.policy import Decide, Decision, Observation
from esperd.policy.arms import RankedArm, Selection
from esperd.policy.state import BanditState
from esperd.policy.wording import alternatives

FEWEST_TRIES = 2
"""Credited tries of any arm before the rule speaks: of one, luck and worth cannot be told apart. Chosen, not measured."""

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
        """Loss saved for one FLOP."""
        return self.reward / self.flops


def stop(request: Decide, state: BanditState, selection: Selection, affordable: Sequence[RankedArm]) -> Decision | None:
    """The decision to train on; None where growing promises more, or too little is known to compare.

    Args:
        request: gate losses, the FLOPs they took, what the budget still allows; whether the rule is on, and its window.
        state: rewards so far.
        selection: all available arms, as the strategy ranked them.
        affordable: those of them that may be grown.
    """
    settings = request.settings
    if not settings.stop_rule:
        return None
    training = last_gain(request.observation, settings.stop_window)
    promised = expectations(request.observation, state, affordable)
    best = max(promised, key=lambda each: (each.per_flop, each.found.arm), default=None)
    if training is None or training <= 0.0 or best is None or best.per_flop >= training:
        return None
    own = f"mean of {best.found.pulls} tries" if best.found.pulls else "never tried, the mean of all tries"
    return Decision(
        action="wait",
        arm=best.found.arm,
        score=best.found.score,
        reason=(
            f"stop rule: the best available arm promises {best.reward:.4g} of loss after rent ({own}) for the {best.flops:.3g} "
            f"FLOPs it takes to the end of the budget, {1e12 * best.per_flop:.3g} per TFLOP; the last FLOPs of "
            f"training on bring {1e12 * training:.3g} per TFLOP (from {settings.stop_window} gate losses)"
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

    The FLOPs of a seed are its share of what an epoch takes now, times the epochs that the budget allows. An arm without counted
    FLOPs is charged as if it had one.
    """
    tries = sum(entry.pulls for entry in state.arms)
    epoch = epoch_flops(observation)
    if tries < FEWEST_TRIES or epoch is None or not observation.epochs_left:
        return []
    network = observation.host_flops_per_sample + sum(record.flops_per_sample for record in observation.seeds)
    general = sum(entry.total for entry in state.arms) / tries
    return [
        Expectation(
            found=found,
            reward=general if found.mean is None else found.mean,
            flops=max(epoch * observation.epochs_left * found.option.flops_per_sample / max(network, 1.0), 1.0),
        )
        for found in arms
    ]


def epoch_flops(observation: Observation) -> float | None:
    """FLOPs of the network itself from the last gate measurement but one to the last; None before the second."""
    trained = trained_flops(observation)
    return trained[-1] - trained[-2] if len(trained) >= 2 else None


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
