"""A newborn seed: made for a slot, not yet placed in it."""

from __future__ import annotations

from esperd.growth.grower import Grower
from esperd.growth.network import Seed
from esperd.growth.operators import operator_flops, operator_parameters
from esperd.messages.policy import Arm


def newborn(grower: Grower, arm: Arm) -> Seed:
    """The seed that germinating an arm would place now, with the weights it would have.

    Raises:
        InvalidSlot: no such slot.
        EsperError: its source cannot make it.
    """
    record = grower.network.port(arm.slot).record
    name, operator = f"{record.slot}#{grower.network.germinated}", grower.growth.operator
    grown = grower.source.grow(arm.blueprint, record, name, operator, grower.epoch)
    return Seed(
        name=name,
        blueprint=arm.blueprint,
        module=grown.module,
        record=record,
        parameters_added=grown.parameters + operator_parameters(operator, record),
        flops_per_sample=grown.flops_per_sample + operator_flops(operator, record),
        epoch=grower.epoch,
        kernel=grown.kernel,
        graph=grown.graph,
        operator=grown.operator,
        operator_name=operator,
        alpha_target=grower.growth.alpha_target,
    )
