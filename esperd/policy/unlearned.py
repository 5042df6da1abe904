"""Strategies that no reward teaches: what a learning one must beat. They judge, keep and cull as all do, and decline an arm only
for its price.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from esperd.messages.policy import Decide, Decided
from esperd.policy import lots, pipeline
from esperd.policy.arms import RankedArm, Selection
from esperd.policy.state import BanditState
from esperd.policy.wording import record


def first_arm(request: Decide) -> Decided:
    """Always the first available arm of the job's listing. The listing is drawn by the RNG seed: over several seeds no arm is
    the first by anyone's choice.
    """

    def select(request: Decide, _state: BanditState, available: Sequence[RankedArm]) -> Selection:
        return _in_order(
            available, lambda found: lots.listing(request.rng_seed, found.arm), "first of {n} available arms as listed"
        )

    return pipeline.answer(request, select)


def uniform(request: Decide) -> Decided:
    """Any available arm, drawn anew at every point."""

    def select(request: Decide, _state: BanditState, available: Sequence[RankedArm]) -> Selection:
        return _in_order(available, lambda found: lots.uniform(request, found.arm), "drawn by lot among {n} available arms")

    return pipeline.answer(request, select)


def round_robin(request: Decide) -> Decided:
    """Every arm in turn: the one with the fewest tries, those whose seed still lives included; of equal ones the first as listed.

    An arm that was not available at its turn is the next as soon as it is.
    """

    def select(request: Decide, state: BanditState, available: Sequence[RankedArm]) -> Selection:
        living = Counter(entry.arm for entry in state.pending)

        def turn(found: RankedArm) -> tuple[int, bytes]:
            return found.pulls + living[found.arm], lots.listing(request.rng_seed, found.arm)

        return _in_order(available, turn, "next in turn of {n} available arms")

    return pipeline.answer(request, select)


def _in_order(available: Sequence[RankedArm], key: Callable[[RankedArm], Any], told: str) -> Selection:
    """Ranked by a key. The score is the mean reward, for reading: nothing goes by it."""
    said = told.format(n=len(available))
    ranked = (replace(found, score=found.mean, why=f"{said}: {record(found)}") for found in available)
    return Selection(ranked=sorted(ranked, key=key))
