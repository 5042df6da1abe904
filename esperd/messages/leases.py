"""Leases of jobs: what the daemon and a trainer worker say to each other, and how a worker ends."""

from __future__ import annotations

from typing import Literal

from esperd.messages.base import Message
from esperd.messages.jobs import Artifact, Job, JobError, Peak

EXIT_NO_FAULT = 75
"""Exit status (EX_TEMPFAIL) of a worker that had to leave through no fault of its job: it lost the daemon or its lease, or the
disk would not take the artifacts. The job goes on from its last checkpoint, and no attempt is spent."""


EXIT_OUT_OF_MEMORY = 76
"""Exit status of a worker that held more memory than its job may."""


class Lease(Message, frozen=True, kw_only=True):
    """Work for a trainer worker. Everything the worker writes carries ``generation``; a stale one is refused."""

    job_id: str
    generation: int
    job: Job
    checkpoint: str | None
    """SHA-256 of the checkpoint to go on from."""
    blob_directory: str
    """Where the job's artifacts go."""
    checkpoint_directory: str
    """Where its checkpoints go; nobody else's are there."""
    resumed: int
    """Times this job already went on from a checkpoint."""
    trace: str = ""
    """W3C ``traceparent`` to go on from: of the span in which this lease was given. Empty: nobody traces."""
    pieces: int = 1
    """Parts in which each batch is trained."""


class JobStarted(Message, frozen=True, kw_only=True):
    """Worker → daemon: model and data are loaded, training begins."""

    job_id: str
    generation: int
    circumstances: dict[str, str] = {}
    """Versions, and hashes of the user's code and data: what may differ between two attempts."""


class CheckpointWritten(Message, frozen=True, kw_only=True):
    """Worker → daemon: the blob is on disk; answered once the row is durable."""

    job_id: str
    generation: int
    sha256: str
    epoch: int


class JobSucceeded(Message, frozen=True, kw_only=True):
    """Worker → daemon: the job is done and its artifacts are in the blob store."""

    job_id: str
    generation: int
    epoch: int
    artifacts: tuple[Artifact, ...]
    peak: Peak = Peak()


class JobStopped(Message, frozen=True, kw_only=True):
    """Worker → daemon: the job stopped as asked, its checkpoint (if any) is written."""

    job_id: str
    generation: int
    why: Literal["pause", "cancel", "drain"]
    peak: Peak = Peak()


class JobBroken(Message, frozen=True, kw_only=True):
    """Worker → daemon: the job cannot succeed (bad model, bad data, diverged); it is not retried."""

    job_id: str
    generation: int
    error: JobError
    peak: Peak = Peak()


class StopJob(Message, frozen=True, kw_only=True):
    """Daemon → worker: stop after the current step; checkpoint unless cancelled."""

    why: Literal["pause", "cancel", "drain"]


class LeaseJobs(Message, frozen=True, kw_only=True):
    """To the jobs actor, from itself: look whether a queued job can be given to a worker."""


class ProveAlive(Message, frozen=True, kw_only=True):
    """The daemon asks the jobs actor for a durable write, before it tells a watchdog that all is well."""


class LetGoOfFailed(Message, frozen=True, kw_only=True):
    """Delete the checkpoints of jobs that failed or died before a time."""

    before: float
    """Seconds since the epoch."""


class DrainJobs(Message, frozen=True, kw_only=True):
    """To the jobs actor: admit and lease nothing more, have every worker checkpoint and stop."""
