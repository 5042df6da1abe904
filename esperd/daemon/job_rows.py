"""Rows of the job table, read."""

from __future__ import annotations

import sqlite3

import msgspec

from esperd.daemon.job_lifecycle import JobStanding
from esperd.errors import JobNotFound, StoreFailed
from esperd.messages.jobs import Job, JobError, JobInfo, JobState, Peak


def row_of(connection: sqlite3.Connection, job_id: str) -> sqlite3.Row:
    """The row of a job.

    Raises:
        JobNotFound: there is none.
    """
    row: sqlite3.Row | None = connection.execute("SELECT * FROM jobs_with_usage WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise not_found(job_id)
    return row


def not_found(job_id: str) -> JobNotFound:
    """The error that says so."""
    return JobNotFound(f"no job is called {job_id!r}; `esper jobs` lists them", id=job_id)


def standing_of(row: sqlite3.Row) -> JobStanding:
    """Where a row stands in the lifecycle."""
    return JobStanding(
        state=JobState(row["state"]),
        generation=row["generation"],
        lost=row["lost"],
        wish=row["wish"],
        retry_at=row["retry_at"],
    )


def info_of(row: sqlite3.Row) -> JobInfo:
    """A row as everybody is told of it.

    Raises:
        StoreFailed: its job, its error or its state cannot be read; names the job.
    """
    try:
        job = msgspec.msgpack.decode(row["payload"], type=Job)
        error = msgspec.msgpack.decode(row["error"], type=JobError) if row["error"] is not None else None
        state = JobState(row["state"])
    except (msgspec.MsgspecError, ValueError, RecursionError) as unreadable:
        raise StoreFailed(f"the stored job {row['id']} cannot be read: {unreadable}", id=row["id"]) from unreadable
    return JobInfo(
        id=row["id"],
        name=row["name"],
        state=state,
        attempt=row["generation"],
        submitted_at=row["submitted_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        retry_at=row["retry_at"],
        epoch=row["epoch"],
        checkpoint=row["checkpoint"],
        previous_checkpoint=row["previous_checkpoint"],
        previous_epoch=row["previous_epoch"],
        error=error,
        peak=Peak(memory_bytes=row["peak_memory_bytes"], gpu_bytes=row["peak_gpu_bytes"]),
        pieces=row["pieces"],
        job=job,
    )
