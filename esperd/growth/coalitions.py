"""Coalitions: seeds that are on together while the others of a list are off. Each is measured at most once, and charged."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from esperd.growth.contribution import LARGEST_PASS, Alphas, CostOf, Measured, PerSample, evaluate, flops_of
from esperd.growth.network import GrowingNetwork
from esperd.growth.shapley import Coalition
from esperd.messages.growth import Contribution, IntervalMethod


def coalition(seeds: Alphas, on: Iterable[str]) -> dict[str, float]:
    """The variant of a network in which exactly these of ``seeds`` are on, each at the alpha that ``seeds`` gives it."""
    chosen = frozenset(on)
    return {name: alpha if name in chosen else 0.0 for name, alpha in seeds.items()}


@dataclass(kw_only=True)
class Coalitions:
    """Losses of coalitions of some seeds on one split, measured as they are asked for, until a cap.

    Args:
        network: left as it was, to the bit.
        batches: (inputs, targets), each (B, ...); the split.
        loss: per-sample loss.
        seeds: the seeds, with the alpha each has where it is on. Others stay as they are.
        cost_of: FLOPs of a pass, per sample.
        flops_cap: passes that would exceed it do not run.
        fused: whether passes may be stacked.
        largest_pass: samples in a stacked pass.
    """

    network: GrowingNetwork
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    loss: PerSample
    seeds: Alphas
    cost_of: CostOf
    flops_cap: float
    fused: bool = False
    largest_pass: int = LARGEST_PASS
    spent: float = 0.0
    """FLOPs of all passes so far."""
    means: dict[Coalition, float] = field(default_factory=dict)
    """Mean loss of every coalition measured, finite or not."""
    paired: dict[Coalition, torch.Tensor] = field(default_factory=dict)
    """Per-sample losses (N,) of those that intervals are made of: at most one seed on, or at most one off."""

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return sum(len(inputs) for inputs, _ in self.batches)

    @property
    def finite(self) -> bool:
        """False once a measured loss is no finite number."""
        return all(map(math.isfinite, self.means.values()))

    def measure(self, wanted: Iterable[Coalition], *, whole: bool = False) -> bool:
        """Measure those of the wanted that are not known yet, in order, as far as the FLOPs reach.

        Args:
            wanted: coalitions.
            whole: all of them or none.

        Returns:
            True when all wanted are known now.
        """
        missing = [on for on in dict.fromkeys(wanted) if on not in self.means]
        room = self.flops_cap - self.spent
        # More passes never cost less, so the longest beginning that fits can be found by halving.
        fitting = bisect.bisect_right(range(1, len(missing) + 1), room, key=lambda count: self._flops(missing[:count]))
        if fitting < len(missing) and whole:
            return False
        self._run(missing[:fitting])
        return fitting == len(missing)

    def mean(self, on: Coalition) -> float | None:
        """Mean loss with these seeds on, all others off; None when it is not known, or no finite number."""
        mean = self.means.get(on, math.nan)
        return mean if math.isfinite(mean) else None

    def gain(self, on: Coalition) -> float | None:
        """By how much these seeds lower the mean loss, all others off; None when that is not known."""
        without, with_them = self.mean(frozenset()), self.mean(on)
        return None if without is None or with_them is None else without - with_them

    def contribution(
        self, seed: str, others: Coalition, *, epoch: int, confidence: float, interval: IntervalMethod, rng_seed: int
    ) -> Contribution | None:
        """What a seed brings when these others are on, paired by sample: none of the others, or all. None when not known."""
        with_it = others | {seed}
        if self.why_not(others, with_it):
            return None
        measured = Measured(loss=self.paired[with_it], metric=None, variants={seed: (self.paired[others], None)})
        return measured.contribution(seed, confidence=confidence, epoch=epoch, interval=interval, rng_seed=rng_seed)

    def why_not(self, *parts: Coalition) -> str:
        """Why nothing can be said that is made of these coalitions; empty when it can."""
        if any(on not in self.means for on in parts):
            return "the FLOPs cap"
        return "" if all(math.isfinite(self.means[on]) for on in parts) else "a loss is not finite"

    def _flops(self, coalitions: Sequence[Coalition]) -> float:
        configurations = [coalition(self.seeds, on) for on in coalitions]
        sizes = [len(inputs) for inputs, _ in self.batches]
        return flops_of(self.network, configurations, sizes, self.cost_of, fused=self.fused, largest_pass=self.largest_pass)

    def _run(self, coalitions: Sequence[Coalition]) -> None:
        if not coalitions:
            return
        values = evaluate(
            self.network,
            self.batches,
            self.loss,
            configurations=[coalition(self.seeds, on) for on in coalitions],
            fused=self.fused,
            largest_pass=self.largest_pass,
        )
        self.spent += self._flops(coalitions)
        for on, (losses, _) in zip(coalitions, values, strict=True):
            self.means[on] = float(losses.double().mean())
            if min(len(on), len(self.seeds) - len(on)) <= 1:
                self.paired[on] = losses
