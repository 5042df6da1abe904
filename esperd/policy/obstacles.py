"""Why nothing may be germinated now, whatever the arms promise."""

from __future__ import annotations

from collections.abc import Sequence

from esperd.messages.growth import LIVE_STAGES, Stage
from esperd.messages.policy import Observation, PolicySettings
from esperd.policy.arms import RankedArm

MIB = 2**20


def obstacle(observation: Observation, settings: PolicySettings, ended: set[str | None]) -> str:
    """Limits of time, number and memory; empty when something may be germinated.

    Args:
        observation: of this decision point.
        settings: the limits.
        ended: seeds that this point's verdicts end; their places count as free.
    """
    living = [record for record in observation.seeds if record.stage in LIVE_STAGES and record.seed not in ended]
    live = {record.screening or record.seed for record in living}  # of a screening one at most goes on
    kept = [record for record in observation.seeds if record.stage is Stage.FOSSILIZED]
    # A seed judged at this point may still be kept, so it counts for the limit on kept seeds until it is gone.
    may_be_kept = len(kept) + sum(record.stage in LIVE_STAGES for record in observation.seeds)
    if observation.epoch < settings.warmup_epochs:
        return f"warming up: {observation.epoch} of {settings.warmup_epochs} epochs"
    if observation.progress >= settings.latest_germination:
        return (
            f"too late: {observation.progress:.0%} of the budget is spent, and nothing is grown after "
            f"{settings.latest_germination:.0%} (latest_germination)"
        )
    if observation.epochs_left is not None and observation.epochs_left < observation.shortest_life_epochs:
        return (
            f"too late: the budget allows {observation.epochs_left:.1f} more epochs and a seed needs "
            f"{observation.shortest_life_epochs} to show what it brings"
        )
    if settings.min_free_memory > 0.0 and (reason := _short_of_memory(observation, settings.min_free_memory)):
        return reason
    if len(live) >= settings.max_live_seeds:
        return f"{len(live)} seeds live already (max_live_seeds {settings.max_live_seeds})"
    if may_be_kept >= settings.max_fossilized:
        return f"{len(kept)} seeds are kept and {may_be_kept - len(kept)} may be (max_fossilized {settings.max_fossilized})"
    return ""


def _short_of_memory(observation: Observation, wanted: float) -> str:
    headroom = observation.headroom
    if headroom is None:
        return f"free memory cannot be measured here, and {wanted:.0%} of it must be free (min_free_memory)"
    share = headroom.free_bytes / max(headroom.total_bytes, 1)
    if share >= wanted:
        return ""
    return (
        f"memory is short: {headroom.free_bytes / MIB:.0f} of {headroom.total_bytes / MIB:.0f} MiB are free ({headroom.where}), "
        f"{share:.1%}, and {wanted:.1%} must be (min_free_memory)"
    )


def in_time(found: RankedArm, observation: Observation) -> bool:
    """Whether a seed of this arm gets as far as a verdict, though epochs cost more once it is in the network. Limits that do not
    go by cost are asked before, for all arms.
    """
    return observation.epochs_left_by_cost is None or _left_with(found, observation) >= observation.shortest_life_epochs


def none_in_time(observation: Observation, available: Sequence[RankedArm]) -> str:
    """Why every available arm comes too late; empty when one does not."""
    if not available or any(in_time(found, observation) for found in available):
        return ""
    longest = max(_left_with(found, observation) for found in available)
    return (
        f"too late: with the cheapest of {len(available)} arms in the network the budget allows {longest:.1f} more epochs and a "
        f"seed needs {observation.shortest_life_epochs} to show what it brings"
    )


def _left_with(found: RankedArm, observation: Observation) -> float:
    """Epochs that the limits on cost allow with a seed of this arm: as many fewer as the network's FLOPs become more."""
    network = network_flops(observation)
    return (observation.epochs_left_by_cost or 0.0) * network / max(network + found.option.flops_per_sample, 1.0)


def network_flops(observation: Observation) -> float:
    """Forward FLOPs of the network for one sample: host, living seeds and kept ones. A culled seed that rests is not in it."""
    there = (record for record in observation.seeds if record.stage in LIVE_STAGES or record.stage is Stage.FOSSILIZED)
    return observation.host_flops_per_sample + sum(record.flops_per_sample for record in there)


def nothing_available(observation: Observation, available: Sequence[RankedArm]) -> str:
    """Why there is no arm to choose; empty when there is one."""
    if available:
        return ""
    if not observation.options:
        return "no blueprint fits any slot"
    reasons = sorted({option.why_not for option in observation.options if option.why_not})
    return f"none of {len(observation.options)} arms is available: {'; '.join(reasons) or 'no reason was given'}"
