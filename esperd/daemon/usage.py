"""What jobs were measured to take: peak memory of their workers, kept by job and by what decides it."""

from __future__ import annotations

import hashlib
import sqlite3
from typing import NamedTuple

from esperd.daemon.placement import kind_of
from esperd.messages.jobs import MOST_PIECES, Job, Peak

SCHEMA = """
    CREATE TABLE usage (
        job TEXT PRIMARY KEY REFERENCES jobs (id),
        kind TEXT NOT NULL,                    -- SHA-256 of what decides the memory of a job
        peak_memory_bytes INTEGER,             -- NULL: not measured
        peak_gpu_bytes INTEGER,
        pieces INTEGER NOT NULL DEFAULT 1      -- parts that a batch is trained in
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX usage_by_kind ON usage (kind);
    CREATE VIEW jobs_with_usage AS
        SELECT jobs.*, usage.peak_memory_bytes, usage.peak_gpu_bytes, ifnull(usage.pieces, 1) AS pieces
        FROM jobs LEFT JOIN usage ON usage.job = jobs.id
    """
"""Table of the jobs' database, and each job with its row of it."""


class Usage(NamedTuple):
    """What is known of a job. None: not measured."""

    peak_memory_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    pieces: int = 1


def record(connection: sqlite3.Connection, job_id: str, job: Job, peak: Peak) -> None:
    """Keep the largest that was measured."""
    connection.execute(
        "INSERT INTO usage (job, kind, peak_memory_bytes, peak_gpu_bytes) VALUES (?, ?, ?, ?) ON CONFLICT (job) DO UPDATE SET"
        " peak_memory_bytes = nullif(max(ifnull(peak_memory_bytes, 0), ifnull(excluded.peak_memory_bytes, 0)), 0),"
        " peak_gpu_bytes = nullif(max(ifnull(peak_gpu_bytes, 0), ifnull(excluded.peak_gpu_bytes, 0)), 0)",
        (job_id, _digest(job), peak.memory_bytes, peak.gpu_bytes),
    )


def of(connection: sqlite3.Connection, job_id: str) -> Usage:
    """What is known of a job itself."""
    row = connection.execute("SELECT * FROM usage WHERE job = ?", (job_id,)).fetchone()
    return Usage() if row is None else Usage(row["peak_memory_bytes"], row["peak_gpu_bytes"], row["pieces"])


def expected(connection: sqlite3.Connection, job_id: str, job: Job) -> Usage:
    """What a job is expected to take: as measured of itself, else the most that a job like it took."""
    own = of(connection, job_id)
    if own.peak_memory_bytes is not None:
        return own
    row = connection.execute(
        "SELECT max(peak_memory_bytes) AS memory, max(peak_gpu_bytes) AS gpu FROM usage WHERE kind = ?", (_digest(job),)
    ).fetchone()
    return Usage(row["memory"], row["gpu"], own.pieces)


def halve(connection: sqlite3.Connection, job_id: str, job: Job) -> int | None:
    """The next attempt trains its batches in twice as many pieces; None: they cannot be smaller.

    Returns:
        How many.
    """
    pieces = 2 * of(connection, job_id).pieces
    if pieces > min(MOST_PIECES, job.batch_size):
        return None
    record(connection, job_id, job, Peak())
    connection.execute("UPDATE usage SET pieces = ? WHERE job = ?", (pieces, job_id))
    return pieces


def _digest(job: Job) -> str:
    return hashlib.sha256(kind_of(job)).hexdigest()
