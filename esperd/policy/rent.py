"""Growth pays rent: what a seed must save, in units of the job's loss, to be worth its parameters and FLOPs."""

from __future__ import annotations

from esperd.messages.policy import Observation, PolicySettings


def rent(parameters: int, flops_per_sample: float, observation: Observation, settings: PolicySettings) -> float:
    """Price of a seed.

    ``rent_parameters * parameters / host_parameters + rent_flops * flops / host_flops``; a share whose host side is zero
    (a host without a counted operation) is charged as if the host had one.

    Args:
        parameters: of the seed.
        flops_per_sample: forward FLOPs of the seed for one sample.
        observation: names the host's parameters and FLOPs.
        settings: the two prices.

    Returns:
        Loss the seed must save; 0 or more.
    """
    share_of_parameters = parameters / max(observation.host_parameters, 1)
    share_of_flops = flops_per_sample / max(observation.host_flops_per_sample, 1.0)
    return settings.rent_parameters * share_of_parameters + settings.rent_flops * share_of_flops
