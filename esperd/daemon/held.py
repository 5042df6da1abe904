"""What the jobs actor knows of a worker while it holds a lease."""

from __future__ import annotations

from dataclasses import dataclass

from esperd.daemon.placement import NOT_KNOWN, Need
from esperd.messages.control import Terminated
from esperd.messages.jobs import JobError
from esperd.messages.leases import StopJob


@dataclass(frozen=True)
class Patience:
    """How long a process may take to leave once it was told to, or its job is over.

    Args:
        until: monotonic seconds.
        for_s: how long that was.
    """

    until: float
    for_s: float


@dataclass
class Held:
    """A lease that a worker holds."""

    job_id: str
    generation: int
    handed: bool = False
    """True once the worker has the lease; before, it understands nothing."""
    stop: StopJob | None = None
    """What it must be told as soon as it has the lease."""
    patience: Patience | None = None
    """How long its process is left alone from now on; None: it was not told to leave."""
    was_ended: Patience | None = None
    """What its process was ended for; None: it was left alone."""
    ended: bool = False
    """True once the worker reported the end: its exit is then no loss."""
    need: Need = NOT_KNOWN
    """What is set aside for it."""
    oom_kills: int | None = None
    """Processes of the daemon's control group that the kernel had killed for memory when it started."""
    unread: JobError | None = None
    """Why no worker was started: none of the job's checkpoints can be read."""
    gone: Terminated | None = None
    """How its process ended, until that is recorded."""

    def told_to_stop(self, now: float, within_s: float) -> None:
        """It was told to stop; whoever is told twice gets no more time."""
        if self.patience is None:
            self.patience = Patience(now + within_s, within_s)

    def reported(self, now: float, within_s: float) -> None:
        """It reported the end, and has only to leave."""
        self.ended = True
        self.patience = Patience(now + within_s, within_s)

    def is_overdue(self, now: float) -> bool:
        """Whether its process must be ended now: it should have left, and nobody has ended it yet."""
        return self.patience is not None and self.gone is None and self.was_ended is None and now >= self.patience.until

    @property
    def disobedience(self) -> str:
        """What is said of a worker that was ended because it did not stop when it was told to; empty: it was not."""
        if self.was_ended is None or self.ended or self.stop is None:
            return ""
        where = "" if self.stop.why == "cancel" else "; the job goes on from its last checkpoint"
        return (
            f"the worker did not stop within {self.was_ended.for_s:g} s after it was told to ({self.stop.why}): its process was "
            f"ended{where}; where a step takes longer, raise daemon.drain_timeout_s"
        )
