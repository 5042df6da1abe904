"""The built-in surgery operations: what a decision may do to a network."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import SurgeryOperation
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_surgery_operations() -> Iterable[SurgeryOperation]:
    """Germinate, fossilize, cull, set alpha."""
    return [
        SurgeryOperation(
            name="germinate",
            apply="esperd.growth.surgery:germinate",
            description="grow a seed of a blueprint at a free slot",
        ),
        SurgeryOperation(name="fossilize", apply="esperd.growth.surgery:fossilize", description="make a proven seed permanent"),
        SurgeryOperation(name="cull", apply="esperd.growth.surgery:cull", description="remove a living seed"),
        SurgeryOperation(
            name="set_alpha",
            apply="esperd.growth.surgery:set_alpha",
            description="give a seed another share of its output, or fade it out",
        ),
    ]
