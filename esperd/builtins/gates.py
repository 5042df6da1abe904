"""The built-in gates G0 to G5."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Gate
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_gates() -> Iterable[Gate]:
    """One gate per stage of a seed's life."""
    return [
        Gate(
            name="G0",
            guards="germinated",
            check="esperd.growth.gates:existence",
            description="blueprint and slot exist, go together, and the slot is free",
        ),
        Gate(
            name="G1",
            guards="training",
            check="esperd.growth.gates:fitness",
            description="shape, dtype and device kept; identity at alpha 0; every parameter learns by step 3",
        ),
        Gate(
            name="G2",
            guards="blending",
            check="esperd.growth.gates:readiness",
            description="gradient ratio and health; the lookahead loss does not rise",
        ),
        Gate(name="G3", guards="shadowing", check="esperd.growth.gates:completion", description="alpha rests on its target"),
        Gate(
            name="G4",
            guards="probationary",
            check="esperd.growth.gates:stability",
            description="the gate loss neither drifts nor spikes over the window",
        ),
        Gate(
            name="G5",
            guards="fossilized",
            check="esperd.growth.gates:proof",
            description="a fresh contribution whose interval lies above the threshold",
        ),
    ]
