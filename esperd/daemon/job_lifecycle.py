"""The life of a job as a pure function: a standing and an event in, the new standing and instructions out.

What a user wishes of a job that a worker holds (pause, cancel) is part of its standing, so it is kept when the worker or
the daemon dies before it is carried out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from esperd.config import Jobs
from esperd.errors import Conflict, IllegalTransition
from esperd.messages.jobs import (
    JOB_TRANSITIONS,
    JobState,
)
from esperd.messages.leases import StopJob

Wish = Literal["pause", "cancel"]

HELD_STATES = frozenset({JobState.LEASED, JobState.RUNNING})
"""States in which a worker holds the job."""

UNREAD_TRIES = 20
"""Times in a row that none of its checkpoints can be read, after which a job is dead: an hour with the default waits. Chosen, not
measured."""

_HIGHEST_DOUBLING = 60  # 2**60 base waits are beyond any maximum; more would only overflow a float


@dataclass(frozen=True, kw_only=True)
class JobStanding:
    """What decides a job's next move."""

    state: JobState = JobState.QUEUED
    generation: int = 0
    """Leases given so far; a worker's word counts only under the latest."""
    lost: int = 0
    """Workers lost so far."""
    wish: Wish | None = None
    """What the user asked of a held job that its worker has not done yet."""
    retry_at: float | None = None
    """Not leased again before this time, in seconds since the epoch."""


@dataclass(frozen=True)
class Leased:
    """A worker takes the job."""


@dataclass(frozen=True)
class Started:
    """The worker begins to train."""

    generation: int


@dataclass(frozen=True)
class Succeeded:
    """The worker finished the job."""

    generation: int


@dataclass(frozen=True)
class Stopped:
    """The worker stopped because it was told to."""

    generation: int
    why: Literal["pause", "cancel", "drain"]


@dataclass(frozen=True)
class Broken:
    """The worker found that the job cannot succeed."""

    generation: int


@dataclass(frozen=True)
class WorkerLost:
    """The worker died or fell silent."""

    generation: int
    now: float


@dataclass(frozen=True)
class WorkerLeft:
    """The worker gave up through no fault of the job."""

    generation: int
    now: float


@dataclass(frozen=True)
class CheckpointsUnread:
    """No worker was started: none of the job's checkpoints can be read."""

    generation: int
    now: float
    tries: int
    """Times in a row that this was so, this one included."""


@dataclass(frozen=True)
class PauseAsked:
    """The user wants the job to rest."""


@dataclass(frozen=True)
class ResumeAsked:
    """The user wants the job to go on."""


@dataclass(frozen=True)
class CancelAsked:
    """The user wants the job to end."""


@dataclass(frozen=True)
class RetryAsked:
    """The user wants a failed or dead job to be tried again."""


@dataclass(frozen=True)
class DaemonRestarted:
    """Whoever held the job is gone, through no fault of the job."""


WorkerEvent = Started | Succeeded | Stopped | Broken | WorkerLost | WorkerLeft | CheckpointsUnread
JobEvent = WorkerEvent | Leased | PauseAsked | ResumeAsked | CancelAsked | RetryAsked | DaemonRestarted


@dataclass(frozen=True)
class Moved:
    """A step of a job's life: where it stands now, and what its worker must be told."""

    standing: JobStanding
    tell_worker: tuple[StopJob, ...] = ()


def advance(standing: JobStanding, event: JobEvent, limits: Jobs, rng: random.Random) -> Moved:
    """The next step of a job's life.

    Args:
        standing: where the job stands.
        event: what happened.
        limits: ``max_attempts``, ``backoff_s`` and ``backoff_max_s`` are used.
        rng: draws the wait after a lost worker.

    Raises:
        IllegalTransition: when the table of job states does not allow the move.
        Conflict: when a worker speaks that does not hold the job, or held it under an earlier lease.
    """
    if isinstance(event, WorkerEvent):
        check_lease(standing, event.generation)
    match event:
        case Leased():
            moved = _move(standing, JobState.LEASED, "lease")
            return Moved(replace(moved, generation=standing.generation + 1, retry_at=None))
        case Started():
            if standing.state is JobState.RUNNING:  # said twice: its first answer was lost
                return Moved(standing)
            return Moved(_move(standing, JobState.RUNNING, "start"))
        case Succeeded():
            return Moved(replace(_move(standing, JobState.SUCCEEDED, "finish"), wish=None))
        case Broken():
            return Moved(replace(_move(standing, JobState.FAILED, "fail"), wish=None))
        case Stopped():
            wish: Wish | None = "cancel" if event.why == "cancel" else standing.wish
            return Moved(_let_go(replace(standing, wish=wish)))
        case WorkerLost():
            return Moved(_lose_worker(standing, event.now, limits, rng))
        case WorkerLeft():
            left = _let_go(standing)
            return Moved(replace(left, retry_at=event.now + limits.backoff_s) if left.state is JobState.QUEUED else left)
        case CheckpointsUnread():
            return Moved(_await_checkpoint(standing, event.tries, event.now, limits))
        case DaemonRestarted():
            return Moved(_let_go(standing) if standing.state in HELD_STATES else standing)
        case _:
            return _wished(standing, event)


def _wished(standing: JobStanding, event: PauseAsked | ResumeAsked | CancelAsked | RetryAsked) -> Moved:
    """What a user's wish leads to."""
    match event:
        case PauseAsked():
            return _pause(standing)
        case ResumeAsked():
            return Moved(_resume(standing))
        case CancelAsked():
            return _cancel(standing)
        case RetryAsked():
            return Moved(_retry(standing))
        case _:
            assert_never(event)


def check_lease(standing: JobStanding, generation: int) -> None:
    """Refuse the word of a worker that does not hold the job.

    Raises:
        Conflict: when no worker holds the job, or ``generation`` is not the latest lease.
    """
    if standing.state not in HELD_STATES or standing.generation != generation:
        raise Conflict(
            f"lease {generation} of the job has ended: the job is {standing.state} under lease {standing.generation}; "
            "this worker must stop",
            generation=generation,
            current=standing.generation,
            state=standing.state.value,
        )


def backoff_s(lost: int, limits: Jobs, rng: random.Random) -> float:
    """Wait after the ``lost``-th lost worker: anything up to min(base · 2^(lost-1), maximum), in seconds.

    Full jitter, so that jobs lost together do not come back together.
    """
    return rng.uniform(0.0, _longest_backoff_s(lost, limits))


def _longest_backoff_s(lost: int, limits: Jobs) -> float:
    return min(limits.backoff_s * 2.0 ** min(lost - 1, _HIGHEST_DOUBLING), limits.backoff_max_s)


def wait_is_over(retry_at: float | None, now: float, limits: Jobs) -> bool:
    """Whether a queued job may be leased.

    One that would wait longer than any is told to is due: the wall clock was set back meanwhile, by an hour or a year.

    Args:
        retry_at: until when it waits, in seconds since the epoch; None: it does not.
        now: seconds since the epoch.
        limits: as for :func:`advance`.
    """
    if retry_at is None or retry_at <= now:
        return True
    return retry_at - now > max(limits.backoff_s, limits.backoff_max_s)


def _move(standing: JobStanding, after: JobState, verb: str) -> JobStanding:
    if after not in JOB_TRANSITIONS[standing.state]:
        raise IllegalTransition(
            f"cannot {verb} a job that is {standing.state}", before=standing.state.value, after=after.value, action=verb
        )
    return replace(standing, state=after)


def _let_go(standing: JobStanding) -> JobStanding:
    """A held job whose worker is gone goes where the user wants it, else back to the queue."""
    if standing.wish == "cancel":
        return replace(_move(standing, JobState.CANCELLED, "cancel"), wish=None)
    if standing.wish == "pause":
        return replace(_move(standing, JobState.PAUSED, "pause"), wish=None)
    return _move(standing, JobState.QUEUED, "queue")


def _lose_worker(standing: JobStanding, now: float, limits: Jobs, rng: random.Random) -> JobStanding:
    standing = replace(standing, lost=standing.lost + 1)
    if standing.wish is not None:
        return _let_go(standing)
    if standing.lost >= limits.max_attempts:
        return _move(standing, JobState.DEAD, "give up")
    return replace(_move(standing, JobState.QUEUED, "queue"), retry_at=now + backoff_s(standing.lost, limits, rng))


def _await_checkpoint(standing: JobStanding, tries: int, now: float, limits: Jobs) -> JobStanding:
    """A job whose checkpoints cannot be read waits: a file server may come back, somebody may mend the disk. What never heals
    must not look like work that is still to come, so it is dead in the end; each ``retry`` then has as many tries again.
    """
    if standing.wish is not None:
        return _let_go(standing)
    if tries % UNREAD_TRIES == 0:
        return _move(standing, JobState.DEAD, "give up")
    wait = _longest_backoff_s(tries % UNREAD_TRIES, limits)
    return replace(_move(standing, JobState.QUEUED, "queue"), retry_at=now + wait)


def _pause(standing: JobStanding) -> Moved:
    if standing.state not in HELD_STATES:
        return Moved(replace(_move(standing, JobState.PAUSED, "pause"), retry_at=None))
    if standing.wish == "cancel":
        raise IllegalTransition("cannot pause a job that is being cancelled", before=standing.state.value, action="pause")
    return Moved(replace(standing, wish="pause"), (StopJob(why="pause"),))


def _resume(standing: JobStanding) -> JobStanding:
    if standing.state in HELD_STATES and standing.wish == "pause":
        return replace(standing, wish=None)  # its worker is stopping already; the job is queued when it has
    if standing.state is not JobState.PAUSED:
        raise IllegalTransition(
            f"cannot resume a job that is {standing.state}; only a paused one", before=standing.state.value, action="resume"
        )
    return _move(standing, JobState.QUEUED, "resume")


def _retry(standing: JobStanding) -> JobStanding:
    """Another try begins with all its attempts."""
    if standing.state not in (JobState.FAILED, JobState.DEAD):
        raise IllegalTransition(
            f"cannot retry a job that is {standing.state}; only a failed or dead one", before=standing.state.value, action="retry"
        )
    return replace(_move(standing, JobState.QUEUED, "retry"), lost=0, retry_at=None)


def _cancel(standing: JobStanding) -> Moved:
    if standing.state not in HELD_STATES:
        return Moved(replace(_move(standing, JobState.CANCELLED, "cancel"), retry_at=None))
    return Moved(replace(standing, wish="cancel"), (StopJob(why="cancel"),))
