"""The trigger ``gradient_bottleneck``: the loss's gradient gathers at one slot.

Where it is large, what flows by is asked to change and does not; new weights there would receive that gradient (GradMax: Evci,
van Merrienboer, Unterthiner, Vladymyrov and Pedregosa 2022, arXiv:2201.05125, and SensLI grow where the new weights' gradient
is largest). It says when, not where: the strategy still chooses the arm.
"""

from __future__ import annotations

from statistics import median

from esperd.messages.policy import Decide, Signal

FEWEST = 2
"""Slots that must have been measured: one has nothing to be compared with."""


def fires(request: Decide) -> Signal:
    """Fire when the largest gradient is at least ``bottleneck_ratio`` times the median of the other slots'.

    Norms are of all of a slot's numbers together: slots of different widths are compared by what a seed there could bring, not
    by what one of its channels could.
    """
    measured = {each.slot: each.gradient for each in request.observation.slot_statistics if each.gradient is not None}
    if len(measured) < FEWEST:
        return Signal(
            fires=False,
            reason=f"the gradient was measured at {len(measured)} slots since the last decision point, and {FEWEST} are needed",
        )
    largest = max(measured, key=lambda slot: (measured[slot], slot))
    middle = median(gradient for slot, gradient in measured.items() if slot != largest)
    others = f"the median of the other {len(measured) - 1}"
    if middle <= 0.0:
        return Signal(fires=False, reason=f"the gradient at slot {largest!r} cannot be compared: {others} is 0")
    ratio, wanted = measured[largest] / middle, request.settings.bottleneck_ratio
    seen = f"the gradient at slot {largest!r} is {ratio:.2f} times {others}"
    if ratio >= wanted:
        return Signal(fires=True, reason=f"{seen}, {wanted:g} or more (bottleneck_ratio)")
    return Signal(fires=False, reason=f"{seen}, less than {wanted:g} (bottleneck_ratio)")
