"""What the jobs actor knows of a worker while it holds a lease."""

from __future__ import annotations

from dataclasses import dataclass

from esperd.daemon.placement import NOT_KNOWN, Need
from esperd.messages.control import Terminated
from esperd.messages.leases import StopJob


@dataclass
class Held:
    """A lease that a worker holds."""

    job_id: str
    generation: int
    handed: bool = False
    """True once the worker has the lease; before, it understands nothing."""
    stop: StopJob | None = None
    """What it must be told as soon as it has the lease."""
    ended: bool = False
    """True once the worker reported the end: its exit is then no loss."""
    need: Need = NOT_KNOWN
    """What is set aside for it."""
    oom_kills: int | None = None
    """Processes of the daemon's control group that the kernel had killed for memory when it started."""
    gone: Terminated | None = None
    """How its process ended, until that is recorded."""
