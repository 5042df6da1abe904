"""What training and measuring the network cost, for one sample: as counted where it has run as it is, else estimated.

Seeds change stages between an epoch's gate pass and the decision point after it: what the policy is told about is then a
network that has never run.
"""

from __future__ import annotations

from esperd.growth.grower import Grower

TRAINING_PASSES = 3.0
"""FLOPs of training over those of the forward pass: the backward pass takes two more, one for the gradients of inputs and one for
those of weights, as is usual to count (Kaplan and others 2020, arXiv:2001.08361, section 2.1)."""


def training_cost(grower: Grower) -> float | None:
    """FLOPs of the host's own training pass with every seed that takes part in it, for one sample.

    Args:
        grower: the network as it stands.

    Returns:
        As counted; where the network was never trained as it is, what the host alone was counted to take and
        :data:`TRAINING_PASSES` times the forward FLOPs of those seeds; None before the host was measured.
    """
    counted = grower.ledger.cost("train", grower.structure())
    if counted is not None:
        return counted
    host, forward = grower.ledger.cost("train", "host"), grower.ledger.cost("gate", "host")
    if host is None and forward is not None:
        host = TRAINING_PASSES * forward
    seeds = (seed.flops_per_sample for seed in grower.network.seeds() if seed.presence != "silent")
    return None if host is None else host + TRAINING_PASSES * sum(seeds)


def gate_cost(grower: Grower) -> float | None:
    """Forward FLOPs of the network as it is, for one sample.

    Args:
        grower: the network as it stands.

    Returns:
        As counted; where it was never measured as it is, what the host was counted to take and the FLOPs of the seeds that run
        with it; None before the host was measured.
    """
    counted, host = grower.ledger.cost("gate", grower.structure()), grower.ledger.cost("gate", "host")
    if counted is not None or host is None:
        return counted
    return host + sum(seed.flops_per_sample for seed in grower.network.seeds() if seed.presence in ("blended", "whole"))
