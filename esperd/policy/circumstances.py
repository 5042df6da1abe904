"""What the observation says about the place and the time of a germination."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

from esperd.messages.growth import SlotRecord
from esperd.messages.policy import Observation
from esperd.policy.state import Circumstances


def circumstances_of(slot: str, parameters: int, flops_per_sample: float, observation: Observation) -> Circumstances | None:
    """Where and when a seed would be, or was, germinated.

    Args:
        slot: of the seed.
        parameters: of the seed.
        flops_per_sample: forward FLOPs of the seed for one sample.
        observation: names the slots in the order of the host, the host's size, how much of the budget is spent, and what was
            measured at the slots.

    Returns:
        None when the observation does not describe the slot.
    """
    places = [record.slot for record in observation.slots]
    if slot not in places:
        return None
    place = places.index(slot)
    return Circumstances(
        depth=(place + 1) / len(places),
        width=width(observation.slots[place]) / max(width(record) for record in observation.slots),
        parameters=_share(parameters, max(observation.host_parameters, 1)),
        flops=_share(flops_per_sample, max(observation.host_flops_per_sample, 1.0)),
        progress=observation.progress,
        gradient=_gradient(slot, observation),
    )


def width(record: SlotRecord) -> int:
    """Channels of a slot's tensor: C of (C, H, W), D of (T, D), F of (F,)."""
    return record.shape[-1] if record.topology == "transformer" else record.shape[0]


FURTHEST = 2.0
"""Standard deviations from the mean beyond which a gradient says nothing more. Chosen, not measured."""


def _gradient(slot: str, observation: Observation) -> float | None:
    """Where the slot's gradient stands among those measured at this point: norms fall while a job trains."""
    measured = {each.slot: each.gradient for each in observation.slot_statistics if each.gradient is not None}
    logs = {name: math.log(norm) for name, norm in measured.items() if 0.0 < norm < math.inf}
    if slot not in logs or len(logs) < 2:
        return None
    spread = pstdev(logs.values())
    distance = 0.0 if spread == 0.0 else (logs[slot] - fmean(logs.values())) / spread
    return max(-FURTHEST, min(distance, FURTHEST)) / FURTHEST


def _share(seed: float, host: float) -> float:
    """Of the seed in both: below 1 also where the seed is larger than its host."""
    return seed / (seed + host)
