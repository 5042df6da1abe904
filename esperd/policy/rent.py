"""Growth pays rent: what a seed must save, in units of the job's loss, to be worth its parameters, FLOPs and seconds."""

from __future__ import annotations

from esperd.messages.policy import Arm, Observation, PolicySettings


def rent(
    parameters: int,
    flops_per_sample: float,
    observation: Observation,
    settings: PolicySettings,
    seconds_share: float | None = None,
) -> float:
    """Price of a seed.

    ``rent_parameters * parameters / host_parameters + rent_flops * flops / host_flops + rent_seconds * seconds / host_seconds``;
    a share whose host side is zero (a host without a counted operation) is charged as if the host had one.

    Args:
        parameters: of the seed.
        flops_per_sample: forward FLOPs of the seed for one sample.
        observation: names the host's parameters and FLOPs.
        settings: the three prices.
        seconds_share: forward seconds of the seed over the host's; None: never measured, and not charged.

    Returns:
        Loss the seed must save; 0 or more.
    """
    share_of_parameters = parameters / max(observation.host_parameters, 1)
    share_of_flops = flops_per_sample / max(observation.host_flops_per_sample, 1.0)
    price = settings.rent_parameters * share_of_parameters + settings.rent_flops * share_of_flops
    return price if seconds_share is None else price + settings.rent_seconds * seconds_share


def seconds_share_of(arm: Arm, observation: Observation) -> float | None:
    """Forward seconds of the arm's seeds over the host's, where the observation knows them."""
    return next((option.seconds_share for option in observation.options if option.arm == arm), None)
