"""An arm in a fork: what growing it would be like, without growing it."""

from __future__ import annotations

import msgspec

from esperd.errors import EsperError
from esperd.growth.fork import fork
from esperd.growth.grower import Grower
from esperd.growth.network import Seed
from esperd.growth.newborn import newborn
from esperd.messages.policy import Arm, Decision


class NotGrown(Exception):
    """The arm cannot be grown now: what the gate, or the error that was met, says.

    Args:
        why: in words.
        error: what was met; None where a gate refused.
    """

    def __init__(self, why: str, error: EsperError | None = None) -> None:
        super().__init__(why)
        self.error = error


def with_newborn(grower: Grower, arm: Arm) -> tuple[Grower, Seed]:
    """Fork a grower and place a newborn seed in the fork that no gate was asked about, silent, for passes that switch it on.

    Args:
        grower: between two steps. It does not move.
        arm: slot and blueprint.

    Raises:
        NotGrown: the blueprint does not fit the slot, or its kernel cannot be had.
        InvalidModel: the network cannot be copied.
    """
    unfit = grower.source.unfit(arm.blueprint, grower.network.port(arm.slot).record)
    if unfit:
        raise NotGrown(unfit)
    twin = fork(grower)
    try:
        seed = newborn(twin, arm)
    except EsperError as error:
        raise NotGrown(f"{error.code}: {error}", error) from error
    twin.network.insert(seed)
    return twin, seed


def with_candidate(grower: Grower, arm: Arm) -> tuple[Grower, Seed]:
    """Fork a grower and grow an arm in the fork, heard at its target alpha from the first step (``joint``), whatever mode of
    incubation the job has: the first steps of a seed behind the host say little about what it will bring. Seeds that learn
    behind the host stand still in the fork.

    Args:
        grower: between two steps, in training mode. It does not move.
        arm: slot and blueprint.

    Returns:
        The fork, whose ledger holds what growing cost, and the seed in it.

    Raises:
        NotGrown: gate G0 or G1 refuses it, or its kernel or its probe fails.
        InvalidModel: the network cannot be copied.
    """
    twin = fork(grower)
    twin.growth = msgspec.structs.replace(grower.growth, incubation="joint")
    name = f"{arm.slot}#{twin.network.germinated}"
    try:
        refusal = twin.apply(Decision(action="germinate", arm=arm, reason="a candidate in a fork"))
    except EsperError as error:
        raise NotGrown(f"{error.code}: {error}", error) from error
    if refusal:
        raise NotGrown(refusal)
    return twin, twin.network.seed(name)
