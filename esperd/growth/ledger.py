"""What everything costs, in FLOPs. Nothing is free: seeds that are culled, incubation, gate passes and ablations are charged."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from esperd.growth.flops import count_flops
from esperd.growth.ranks import Ranks

ResultT = TypeVar("ResultT")

PURPOSES = ("train", "incubation", "ablation", "gate", "trial")


class Ledger:
    """FLOPs spent, by purpose.

    The cost of one sample is counted the first time a kind of work runs on a structure, then multiplied by samples. Of several
    processes each takes the others to do what it does itself; :meth:`settle` makes that exact.
    """

    def __init__(self) -> None:
        self.processes = 1
        """How many spend as this one does."""
        self.spent: dict[str, float] = dict.fromkeys(PURPOSES, 0.0)
        self.costs: dict[str, float] = {}
        """FLOPs per sample, by kind of work and structure."""

    @property
    def total(self) -> float:
        """FLOPs spent so far."""
        return sum(self.spent.values())

    def charge(
        self, purpose: str, structure: Hashable, samples: int, work: Callable[[], ResultT], *, shape: tuple[int, ...] = ()
    ) -> ResultT:
        """Do the work and charge it.

        Args:
            purpose: one of :data:`PURPOSES`.
            structure: what the work runs on; work of one purpose on one structure costs the same for each sample.
            samples: samples in this piece of work.
            work: does it.
            shape: of a sample, where it may differ from batch to batch, as the length of a sequence does.
        """
        key = _key(purpose, structure, shape)
        if key in self.costs:
            result = work()
        else:
            result, flops = count_flops(work)
            self.costs[key] = flops / samples
        self.add(purpose, self.costs[key] * samples)
        return result

    def add(self, purpose: str, flops: float) -> None:
        """Charge what this process has spent, for itself and for those that did the same."""
        self.spent[purpose] += flops * self.processes

    def settle(self, ranks: Ranks) -> None:
        """Charge what every rank has truly spent: the same on all of them from here on. What work costs is as rank 0 counted it.

        Until here each rank's sum was what all would have spent had they done as it did, so the truth is the mean.
        """
        told = ranks.gather("FLOPs spent", self.spent)
        self.spent = {purpose: sum(spent[purpose] for spent in told) / ranks.size for purpose in self.spent}
        self.costs = ranks.first("FLOPs of each kind of work", self.costs)

    def cost(self, purpose: str, structure: Hashable, shape: tuple[int, ...] | None = None) -> float | None:
        """FLOPs per sample of this work on this structure; None when it never ran.

        Args:
            purpose: as for :meth:`charge`.
            structure: as for :meth:`charge`.
            shape: of a sample; None: of the one that cost most.
        """
        if shape is not None:
            return self.costs.get(_key(purpose, structure, shape))
        start = _key(purpose, structure, ())
        return max((cost for key, cost in self.costs.items() if key == start or key.startswith(f"{start} of ")), default=None)


def _key(purpose: str, structure: Hashable, shape: tuple[int, ...]) -> str:
    return f"{purpose}:{structure}" + (f" of {'x'.join(map(str, shape))}" if shape else "")
