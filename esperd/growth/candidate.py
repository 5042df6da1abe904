"""An arm in a fork: what growing it would be like, without growing it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from esperd.errors import EsperError
from esperd.growth.compiled import Compiled
from esperd.growth.fork import fork
from esperd.growth.grower import Grower
from esperd.growth.network import Seed
from esperd.growth.newborn import newborn
from esperd.growth.runner import Plain
from esperd.growth.source import GrownModule, SeedSource
from esperd.messages.growth import SlotRecord
from esperd.messages.policy import Arm, Decision


class NotGrown(Exception):
    """The arm cannot be grown now: what the gate, or the error that was met, says.

    Args:
        why: in words.
    """


@dataclass(frozen=True)
class Sketches:
    """A source whose seeds are sketches: what is measured in a fork is thrown away, and compiling a kernel for it would take
    longer than measuring it.
    """

    source: SeedSource

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """As the source says."""
        return self.source.unfit(blueprint, slot)

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """As the source says."""
        return self.source.min_gradient_ratio(blueprint)

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        """As the source makes it."""
        return self.source.sketch(blueprint, slot, seed, operator)

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:  # noqa: ARG002 - as in SeedSource
        """A sketch."""
        return self.source.sketch(blueprint, slot, seed, operator)


def with_newborn(grower: Grower, arm: Arm) -> tuple[Grower, Seed]:
    """Fork a grower and place a newborn seed in the fork that no gate was asked about, silent, for passes that switch it on.

    Args:
        grower: between two steps. It does not move.
        arm: slot and blueprint.

    Raises:
        NotGrown: the blueprint does not fit the slot, or does not build.
        InvalidModel: the network cannot be copied.
    """
    unfit = grower.source.unfit(arm.blueprint, grower.network.port(arm.slot).record)
    if unfit:
        raise NotGrown(unfit)
    twin = _sketching(grower)
    try:
        seed = newborn(twin, arm)
    except EsperError as error:
        raise NotGrown(f"{error.code}: {error}") from error
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
        NotGrown: gate G0 or G1 refuses it, or it does not build, or its probe fails. Nobody gets this fork, so what it spent
            is charged to the grower.
        InvalidModel: the network cannot be copied.
    """
    twin = contender(grower)
    name = f"{arm.slot}#{twin.network.germinated}"
    try:
        refusal = twin.apply(Decision(action="germinate", arm=arm, reason="a candidate in a fork"))
    except EsperError as error:
        charge_fork(grower, twin)
        raise NotGrown(f"{error.code}: {error}") from error
    if refusal:
        charge_fork(grower, twin)
        raise NotGrown(refusal)
    return twin, twin.network.seed(name)


def charge_fork(grower: Grower, twin: Grower) -> None:
    """Charge what a fork spent to its original, once, when nothing more will run in it.

    What work costs stays the fork's own knowledge: another contender's seed, or the one that is grown in the end, may have the
    same name and another cost.
    """
    grower.ledger.spent["trial"] += twin.ledger.total


def contender(grower: Grower) -> Grower:
    """A fork in which seeds are sketches that are heard from their first step, and passes run eager where the job compiles them:
    what a contender compiles is thrown away with it, and would count against the job's own programs.
    """
    twin = _sketching(grower)
    twin.growth = msgspec.structs.replace(grower.growth, incubation="joint")
    if isinstance(twin.runner, Compiled):
        twin.runner = Plain()
    return twin


def _sketching(grower: Grower) -> Grower:
    twin = fork(grower)
    twin.source = Sketches(grower.source)
    return twin
