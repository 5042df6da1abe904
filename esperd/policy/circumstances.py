"""What the observation says about the place and the time of a germination."""

from __future__ import annotations

from esperd.messages.growth import SlotRecord
from esperd.messages.policy import Observation
from esperd.policy.state import Circumstances


def circumstances_of(slot: str, parameters: int, flops_per_sample: float, observation: Observation) -> Circumstances | None:
    """Where and when a seed would be, or was, germinated.

    Args:
        slot: of the seed.
        parameters: of the seed.
        flops_per_sample: forward FLOPs of the seed for one sample.
        observation: names the slots in the order of the host, the host's size, and how much of the budget is spent.

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
    )


def width(record: SlotRecord) -> int:
    """Channels of a slot's tensor: C of (C, H, W), D of (T, D), F of (F,)."""
    return record.shape[-1] if record.topology == "transformer" else record.shape[0]


def _share(seed: float, host: float) -> float:
    """Of the seed in both: below 1 also where the seed is larger than its host."""
    return seed / (seed + host)
