"""Arms whose kernel could not be provided when it was wanted. That says nothing about the arm: it is offered again later."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from esperd.errors import (
    ActorUnavailable,
    AskTimeout,
    Busy,
    CircuitOpen,
    DaemonUnreachable,
    HandlerFailed,
    StoreFailed,
    WorkerFailed,
)
from esperd.messages.policy import Arm

UNAVAILABLE = (ActorUnavailable, AskTimeout, Busy, CircuitOpen, DaemonUnreachable, HandlerFailed, StoreFailed, WorkerFailed)
"""Errors that come from the daemon's condition and not from the kernel that was asked for."""

LONGEST_DOUBLING = 16


class UnavailableArm(msgspec.Struct, frozen=True, kw_only=True):
    """An arm whose latest germination failed because its kernel could not be provided."""

    arm: Arm
    times: int
    """Germinations in a row that failed so."""
    epoch: int
    """Of the latest."""


class UnavailableArms:
    """What could not be provided, and how long it is not asked for again.

    The wait doubles with every failure in a row: a kernel that kills whoever compiles it must not be asked for at every
    decision point of a job.

    Args:
        entries: as :meth:`entries` returned them.
    """

    def __init__(self, entries: Iterable[UnavailableArm] = ()) -> None:
        self._entries = {entry.arm: entry for entry in entries}

    def failed(self, arm: Arm, epoch: int) -> None:
        """Its kernel could not be provided."""
        known = self._entries.get(arm)
        self._entries[arm] = UnavailableArm(arm=arm, times=known.times + 1 if known else 1, epoch=epoch)

    def settled(self, arm: Arm) -> None:
        """It was grown, or refused for what it is."""
        self._entries.pop(arm, None)

    def why_not(self, arm: Arm, epoch: int) -> str:
        """Why it should not be asked for at this epoch; empty when it may."""
        known = self._entries.get(arm)
        if known is None:
            return ""
        until = known.epoch + 2 ** min(known.times, LONGEST_DOUBLING)
        return (
            f"its kernel could not be provided at epoch {known.epoch}; asked for again from epoch {until}"
            if epoch < until
            else ""
        )

    def arms(self) -> tuple[Arm, ...]:
        """Every arm whose latest germination failed so, sorted."""
        return tuple(sorted(self._entries))

    def entries(self) -> tuple[UnavailableArm, ...]:
        """Everything that is known, for a checkpoint."""
        return tuple(self._entries[arm] for arm in self.arms())
