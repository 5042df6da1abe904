"""Ways to tell when to grow. Declarations only: the code is in :mod:`esperd.policy.triggers`."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Trigger
from esperd.hookspecs import hookimpl

TRIGGERS = (
    Trigger(
        name="always",
        fires="esperd.policy.triggers.timed:always",
        description="every decision point is a time to grow",
    ),
    Trigger(
        name="plateau",
        fires="esperd.policy.triggers.plateau:fires",
        description="from when the gate loss stops to improve until it clearly improves again",
    ),
    Trigger(
        name="periodic",
        fires="esperd.policy.triggers.timed:periodic",
        description="every so many epochs",
    ),
    Trigger(
        name="generalisation_gap",
        fires="esperd.policy.triggers.generalisation_gap:fires",
        description="often while the network underfits, seldom once it overfits",
    ),
    Trigger(
        name="gradient_bottleneck",
        fires="esperd.policy.triggers.gradient_bottleneck:fires",
        description="when the loss's gradient gathers at one slot",
    ),
    Trigger(name="never", fires="esperd.policy.triggers.timed:never", description="never a time to grow; for comparisons"),
)


@hookimpl
def esperd_triggers() -> Iterable[Trigger]:
    """By the clock, by the losses, by the gradients."""
    return TRIGGERS
