"""What everything costs, in FLOPs. Nothing is free: seeds that are culled, incubation, gate passes and ablations are charged."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from esperd.growth.flops import count_flops

ResultT = TypeVar("ResultT")

PURPOSES = ("train", "incubation", "ablation", "gate", "trial")


class Ledger:
    """FLOPs spent, by purpose.

    The cost of one sample is counted the first time a kind of work runs on a structure, then multiplied by samples.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(PURPOSES, 0.0)
        self.costs: dict[str, float] = {}
        """FLOPs per sample, by kind of work and structure."""

    @property
    def total(self) -> float:
        """FLOPs spent so far."""
        return sum(self.spent.values())

    def charge(self, purpose: str, structure: Hashable, samples: int, work: Callable[[], ResultT]) -> ResultT:
        """Do the work and charge it.

        Args:
            purpose: one of :data:`PURPOSES`.
            structure: what the work runs on; work of one purpose on one structure costs the same for each sample.
            samples: samples in this piece of work.
            work: does it.
        """
        key = f"{purpose}:{structure}"
        if key in self.costs:
            result = work()
        else:
            result, flops = count_flops(work)
            self.costs[key] = flops / samples
        self.spent[purpose] += self.costs[key] * samples
        return result

    def cost(self, purpose: str, structure: Hashable) -> float | None:
        """FLOPs per sample of this work on this structure; None when it never ran."""
        return self.costs.get(f"{purpose}:{structure}")
