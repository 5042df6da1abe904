"""Ramps by which alpha moves from 0 to its target."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import AlphaSchedule
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_alpha_schedules() -> Iterable[AlphaSchedule]:
    """The built-in ramps."""
    return (
        AlphaSchedule(name="linear", curve="esperd.growth.alpha:linear", description="even steps"),
        AlphaSchedule(name="cosine", curve="esperd.growth.alpha:cosine", description="slow at both ends"),
        AlphaSchedule(
            name="sigmoid", curve="esperd.growth.alpha:sigmoid", description="slow at both ends, steepest in the middle"
        ),
        AlphaSchedule(name="tanh", curve="esperd.growth.alpha:tanh", description="slow at both ends, gentler than sigmoid"),
    )
