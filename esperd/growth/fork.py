"""A fork of a grower: the same network in the same state, free to go another way. Nothing that happens to it reaches the
original.
"""

from __future__ import annotations

import copy
import dataclasses

from esperd.errors import InvalidModel
from esperd.growth.grower import Grower
from esperd.growth.ledger import Ledger
from esperd.messages.telemetry import Body


def fork(grower: Grower) -> Grower:
    """Copy a grower in mid-training, exactly: trained on, on the same batches from the same RNG streams, both end equal to the
    bit.

    Weights, buffers, seeds and their lives, optimiser state, the gradient scaler and what incubation gathered are copied; what
    makes modules, checks and operations is shared. The fork has a ledger of its own that starts at nothing and knows what work
    costs, and tells its events to nobody. The RNG streams are the process's: whoever runs a fork runs it under
    :func:`esperd.growth.streams.forked`.

    Raises:
        InvalidModel: something in the network cannot be copied.
    """
    parts = (grower.network, grower.optimizer, grower.precision, grower.incubator.gathered)
    try:
        network, optimizer, precision, gathered = copy.deepcopy(parts)
    except Exception as error:
        raise InvalidModel(
            f"the network cannot be copied, as a fork and a controlled trial need it: {type(error).__name__}: {error}; a module"
            " that keeps what it computed on itself must detach it"
        ) from error
    ledger = Ledger()
    ledger.costs = dict(grower.ledger.costs)
    twin = dataclasses.replace(
        grower,
        network=network,
        optimizer=optimizer,
        precision=precision,
        ledger=ledger,
        emit=_tell_nobody,
        watch=None,
        resting=dict(grower.resting),
        outcomes=list(grower.outcomes),
        screened_out=list(grower.screened_out),
        windows={name: list(window) for name, window in grower.windows.items()},
    )
    twin.incubator.gathered = gathered
    twin.incubator.sharing = dict(grower.incubator.sharing)
    twin.gate_pass.fused, twin.gate_pass.tried = grower.gate_pass.fused, set(grower.gate_pass.tried)
    return twin


def _tell_nobody(_body: Body) -> None:
    """What happens in a fork is no event of the job."""
