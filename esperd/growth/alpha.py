"""Alpha: the curves by which a seed is faded in, and the ramp that follows one of them step by step.

Every curve rises from exactly 0 at t = 0 to exactly 1 at t = 1, so a ramp starts and ends on its mark: a curve that is only
asymptotically right (an unnormalised tanh) makes the network jump at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

Curve = Callable[[float], float]

SIGMOID_STEEPNESS = 12.0
"""Steepness of the sigmoid curve; chosen, not measured."""


TANH_STEEPNESS = 3.0
"""Steepness of the tanh curve; chosen, not measured."""


def linear(t: float) -> float:
    """Return ``t``."""
    return t


def cosine(t: float) -> float:
    """Half a cosine: slow at both ends."""
    return 0.5 * (1.0 - math.cos(math.pi * t))


def sigmoid(t: float) -> float:
    """A logistic curve, shifted and scaled so that it meets 0 and 1 exactly."""

    def logistic(x: float) -> float:
        return 1.0 / (1.0 + math.exp(-x))

    low, high = logistic(-SIGMOID_STEEPNESS / 2), logistic(SIGMOID_STEEPNESS / 2)
    return (logistic(SIGMOID_STEEPNESS * (t - 0.5)) - low) / (high - low)


def tanh(t: float) -> float:
    """A hyperbolic tangent around t = 1/2, scaled so that it meets 0 and 1 exactly."""
    edge = math.tanh(TANH_STEEPNESS / 2)
    return 0.5 + 0.5 * math.tanh(TANH_STEEPNESS * (t - 0.5)) / edge


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Alpha on its way from ``start`` to ``target`` in ``steps`` optimiser steps.

    Args:
        start: alpha before the first step.
        target: alpha after the last step, met exactly.
        steps: optimiser steps of the ramp; 0 arrives at once.
        done: steps taken.
        curve: name of the schedule, for records.
    """

    start: float = 0.0
    target: float = 0.0
    steps: int = 0
    done: int = 0
    curve: str = "linear"

    @property
    def at_rest(self) -> bool:
        """True when alpha stands on its target."""
        return self.done >= self.steps

    def value(self, curve: Curve) -> float:
        """Alpha now, by the curve's function."""
        if self.at_rest:
            return self.target
        return self.start + (self.target - self.start) * curve(self.done / self.steps)

    def step(self) -> Ramp:
        """The ramp one optimiser step later; at rest it stays."""
        return self if self.at_rest else replace(self, done=self.done + 1)

    def toward(self, target: float, steps: int, curve: str) -> Ramp:
        """A new ramp from where this one rests.

        Raises:
            ValueError: when this ramp is still moving: retargeting in mid-ramp would make alpha jump.
        """
        if not self.at_rest:
            raise ValueError(f"alpha is still moving ({self.done} of {self.steps} steps); retarget it when it rests")
        return Ramp(start=self.target, target=target, steps=steps, curve=curve)
