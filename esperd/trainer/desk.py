"""What a training session needs of the world outside: the daemon's actors, behind one blocking interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from esperd.messages.kernels import KernelKey, KernelProvided
from esperd.messages.policy import Conclude, Decide, Decided
from esperd.messages.telemetry import Body

StopReason = Literal["pause", "cancel", "drain"]


class Desk(Protocol):
    """The daemon as a training session sees it. Calls block; none is made inside a forward pass."""

    @property
    def job_id(self) -> str:
        """The job, as the daemon knows it."""
        ...

    def decide(self, request: Decide) -> Decided:
        """Ask the policy.

        Raises:
            EsperError: when it cannot be reached or refuses.
        """
        ...

    def conclude(self, ending: Conclude) -> None:
        """Tell the policy how the seeds ended.

        Raises:
            EsperError: when it cannot be reached or cannot record it.
        """
        ...

    def kernel(self, key: KernelKey) -> KernelProvided:
        """Ask the cache for a kernel, compiled if need be.

        Raises:
            EsperError: when it cannot be provided.
        """
        ...

    def record(self, bodies: Sequence[Body]) -> None:
        """Log these events, in this order."""
        ...

    def checkpoint_written(self, sha256: str, epoch: int) -> None:
        """Make a checkpoint the one to resume from; durable on return."""
        ...

    def stop_requested(self) -> StopReason | None:
        """Whether the session should stop after the current step, and why."""
        ...

    def progressed(self, step: int) -> None:
        """Note that a step was taken; travels with the heartbeat."""
        ...
