"""How long a seed takes beside its host: the third price of growing, measured when a seed germinates."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import torch

from esperd.growth.grower import Grower
from esperd.growth.network import Seed
from esperd.growth.untouched import untouched
from esperd.messages.policy import Arm

ROUNDS = 5
"""Times that host and seed run in turns; the fastest of each counts, which other programs disturb least. Chosen, not
measured."""


class ArmSeconds(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of an arm."""

    arm: Arm
    share: float
    """Forward seconds of its seed over the host's."""


def seconds_share(grower: Grower, seed: Seed, clock: Callable[[], float] = time.perf_counter) -> float | None:
    """Forward seconds of a seed over those of the host alone, on as many samples. Leaves everything as it was, but for the
    ledger: what it takes is charged to ``trial``.

    Args:
        grower: host and precision; its sample says how many.
        seed: in the network.
        clock: seconds, monotonic.

    Returns:
        None before a batch was seen, and when the clock is too coarse to see the host.
    """
    if grower.sample is None:
        return None
    network, (inputs, _) = grower.network, grower.sample
    dtype = getattr(torch, seed.record.dtype)
    flowing = torch.zeros(len(inputs), *seed.record.shape, dtype=dtype, device=inputs.device)
    alone: dict[str, float | torch.Tensor] = {other.name: 0.0 for other in network.seeds()}

    def warm_up() -> None:
        network(inputs), seed(flowing)  # what is set up once is no part of the price

    def timed(work: Callable[[], object]) -> float:
        begun = clock()
        work()
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        return clock() - begun

    with untouched(network), torch.no_grad(), grower.precision.autocast(), network.alphas(alone):
        structure = f"seconds:{seed.name}:{seed.blueprint}"
        before = grower.ledger.total
        grower.ledger.charge("trial", structure, len(inputs), warm_up, shape=tuple(inputs.shape[1:]))
        grower.ledger.add("trial", ROUNDS * (grower.ledger.total - before) / grower.ledger.processes)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        turns = [(timed(lambda: network(inputs)), timed(lambda: seed(flowing))) for _ in range(ROUNDS)]
    host, own = (min(seconds) for seconds in zip(*turns, strict=True))
    return own / host if host > 0.0 else None
