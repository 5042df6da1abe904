"""What ``/v1/status`` tells: the daemon at one moment, for people and scripts that want no metrics system."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import esperd
from esperd.daemon.cards import CardStatus
from esperd.messages.base import Value
from esperd.messages.control import ActorList, ActorStatus
from esperd.telemetry.metrics import Metrics


class DaemonStatus(Value, frozen=True, kw_only=True):
    """The daemon now. Fields are only ever added: the path names the version."""

    version: str
    pid: int
    up_s: float
    """Seconds since it was ready to serve."""
    ready: bool
    reasons: tuple[str, ...]
    """Why it is not ready; empty when it is."""
    disk: str
    """How the disk of the state directory stands: ``ok``, ``low``, ``full`` or ``failing``."""
    loop_lag_s: float | None
    """How late its event loop ran a timer, as measured last; None before the first second is over."""
    actors: tuple[ActorStatus, ...]
    dead_letters: dict[str, int]
    jobs: dict[str, int]
    """How many are in each state that any is in."""
    requests: dict[str, int]
    """Of clients, by what became of them."""
    cards: tuple[CardStatus, ...]
    """GPUs that jobs may use, with the jobs on each."""
    breakers: dict[str, str]
    """State by name; a worker's is called by the worker and the service: ``trainer/j1.1/policy``."""


def status_of(
    metrics: Metrics,
    actors: ActorList,
    *,
    reasons: Sequence[str],
    disk: str,
    up_s: float,
    requests: Mapping[str, int],
    cards: tuple[CardStatus, ...] = (),
) -> DaemonStatus:
    """Put together what others know.

    Args:
        metrics: knows jobs and lag.
        actors: dead letters and breakers, too.
        reasons: why the daemon is not ready.
        disk: how the disk of the state directory stands.
        up_s: seconds since it was ready to serve.
        requests: counts by result.
        cards: GPUs.
    """
    return DaemonStatus(
        version=esperd.__version__,
        pid=os.getpid(),
        up_s=up_s,
        ready=not reasons,
        reasons=tuple(reasons),
        disk=str(disk),
        loop_lag_s=metrics.loop_lag_s,
        actors=actors.actors,
        dead_letters=actors.dead_letters,
        jobs=metrics.jobs_by_state(),
        requests=dict(requests),
        cards=cards,
        breakers={breaker.service: str(breaker.state) for breaker in actors.breakers}
        | {f"{actor.name}/{found.service}": str(found.state) for actor in actors.actors for found in actor.breakers},
    )
