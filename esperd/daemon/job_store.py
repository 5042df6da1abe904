"""Jobs on disk: every step of a job's life is one durable transaction around :mod:`esperd.daemon.job_lifecycle`."""

from __future__ import annotations

import functools
import hashlib
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec
import structlog

from esperd.config import Jobs
from esperd.daemon import attempts, checkpoint_rows, usage
from esperd.daemon.job_lifecycle import (
    Broken,
    CancelAsked,
    CheckpointsUnread,
    DaemonRestarted,
    JobEvent,
    Leased,
    PauseAsked,
    ResumeAsked,
    RetryAsked,
    Started,
    Stopped,
    Succeeded,
    WorkerLeft,
    WorkerLost,
    advance,
    check_lease,
    wait_is_over,
)
from esperd.daemon.job_rows import info_of, not_found, row_of, standing_of
from esperd.errors import Busy, Conflict, StoreFailed, WorkerFailed
from esperd.messages.failures import Attempt
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    Artifact,
    Job,
    JobError,
    JobInfo,
    JobState,
    Peak,
)
from esperd.messages.leases import StopJob
from esperd.store.clock import Clock
from esperd.store.database import Database

log = structlog.get_logger()


DONE_FOR_GOOD = frozenset({JobState.SUCCEEDED, JobState.CANCELLED})
"""States that nothing leads out of."""

BUSY_RETRY_AFTER_S = 5.0
"""When a refused submission may try again; chosen, not measured."""

UNMEASURED = Peak()
"""What is known of the memory of a worker that measured none."""

Lacking = Callable[[str, Job, usage.Usage], str]
"""Id, job and what it is expected to take → what it waits for; empty: it fits."""


class Submitted(NamedTuple):
    """What became of a submission."""

    info: JobInfo
    duplicate: bool


class LeasedJob(NamedTuple):
    """A job given to a worker."""

    info: JobInfo
    generation: int
    resumed: int
    """Leases given with a checkpoint to go on from, this one included."""


class Asked(NamedTuple):
    """What became of a user's wish."""

    info: JobInfo
    tell_worker: StopJob | None
    """What the worker that holds the job must be told; None when nobody holds it."""


class JobStore:
    """The jobs of one daemon.

    Args:
        database: opened with :data:`esperd.daemon.job_tables.MIGRATIONS`.
        clock: stamps submission, start and end, and the wait after a lost worker.
        limits: ``max_queued``, ``max_attempts``, ``backoff_s``, ``backoff_max_s`` are used.
        rng: draws job ids and waits; by default the operating system's.
    """

    def __init__(self, database: Database, clock: Clock, limits: Jobs | None = None, rng: random.Random | None = None) -> None:
        self._database = database
        self._clock = clock
        self.limits = limits or Jobs()
        """In force; may be replaced at any time."""
        self._rng = rng or random.SystemRandom()
        self._unreadable: set[str] = set()

    async def submitted(self, job: Job, key: str) -> JobInfo | None:
        """The job that was admitted under this key, if it is this one."""
        rows = await self._database.read("SELECT * FROM jobs_with_usage WHERE idempotency_key = ?", (key,))
        return info_of(rows[0]) if rows and rows[0]["payload_sha256"] == _digest(job)[1] else None

    async def submit(self, job: Job, key: str) -> Submitted:
        """Admit a job; when this returns it is on disk. The same key with the same job returns the first one.

        Raises:
            Conflict: when ``key`` was used for another job.
            Busy: when ``max_queued`` jobs wait already.
        """
        payload, digest = _digest(job)
        now = self._clock()

        def transaction(connection: sqlite3.Connection) -> Submitted:
            known = connection.execute("SELECT * FROM jobs_with_usage WHERE idempotency_key = ?", (key,)).fetchone()
            if known is not None:
                if known["payload_sha256"] != digest:
                    raise Conflict(
                        f"idempotency key {key!r} was used for job {known['id']} with another content; use a new key",
                        key=key,
                        id=known["id"],
                    )
                return Submitted(info_of(known), duplicate=True)
            self._refuse_when_full(connection)
            job_id = self._free_id(connection)
            connection.execute(
                "INSERT INTO jobs (id, idempotency_key, payload_sha256, payload, name, state, generation, lost, resumed,"
                " submitted_at) VALUES (?, ?, ?, ?, ?, ?, 0, 0, 0, ?)",
                (job_id, key, digest, payload, job.name, JobState.QUEUED.value, now),
            )
            return Submitted(info_of(row_of(connection, job_id)), duplicate=False)

        return await self._database.write(transaction)

    async def get(self, job_id: str) -> JobInfo:
        """One job.

        Raises:
            JobNotFound: when there is none of this id.
        """
        rows = await self._database.read("SELECT * FROM jobs_with_usage WHERE id = ?", (job_id,))
        if not rows:
            raise not_found(job_id)
        return info_of(rows[0])

    async def list(self, limit: int = 100) -> tuple[JobInfo, ...]:
        """The latest ``limit`` jobs that can be read, newest first; -1: all of them."""
        rows = await self._database.read("SELECT * FROM jobs_with_usage ORDER BY number DESC LIMIT ?", (limit,))
        return tuple(info for _, info in self._readable(rows))

    def _readable(self, rows: Iterable[sqlite3.Row]) -> Iterator[tuple[sqlite3.Row, JobInfo]]:
        """Rows with their jobs. One that cannot be read is left alone and told of once: it may not hold up the others."""
        for row in rows:
            try:
                yield row, info_of(row)
            except StoreFailed as error:
                if row["id"] not in self._unreadable:
                    self._unreadable.add(row["id"])
                    log.error("a stored job is left alone", error=str(error))  # noqa: TRY400 - typed, no traceback needed

    async def count(self, state: JobState) -> int:
        """How many jobs are in a state."""
        rows = await self._database.read("SELECT count(*) FROM jobs WHERE state = ?", (state.value,))
        return int(rows[0][0])

    async def prove(self) -> None:
        """A durable write that changes nothing.

        Raises:
            StoreFailed: when the disk refuses it.
        """
        await self._database.prove()

    async def lease(
        self,
        now: float,
        circumstances: Mapping[str, str] = MappingProxyType({}),
        lacking: Lacking = lambda _id, _job, _usage: "",
    ) -> LeasedJob | None:
        """Give the oldest queued job whose wait is over to a worker; None when there is none, or it does not fit: no other
        overtakes it.

        Args:
            now: seconds since the epoch.
            circumstances: recorded with the attempt.
            lacking: what a job, expected to take so much, waits for; empty: it fits. Called in the database's thread.
        """

        def transaction(connection: sqlite3.Connection) -> LeasedJob | None:
            queued = connection.execute("SELECT * FROM jobs_with_usage WHERE state = ? ORDER BY number", (JobState.QUEUED.value,))
            due = (row for row in queued if wait_is_over(row["retry_at"], now, self.limits))
            found = next(self._readable(due), None)
            if found is None:
                return None
            row, info = found
            job = info.job
            if lacking(row["id"], job, usage.expected(connection, row["id"], job)):
                return None
            self._advance(connection, row, Leased())
            connection.execute("UPDATE jobs SET resumed = resumed + (checkpoint IS NOT NULL) WHERE number = ?", (row["number"],))
            leased = row_of(connection, row["id"])
            attempts.add_circumstances(connection, leased, circumstances)
            return LeasedJob(info_of(leased), leased["generation"], leased["resumed"])

        return await self._database.write(transaction)

    async def started(self, job_id: str, generation: int, circumstances: Mapping[str, str] = MappingProxyType({})) -> JobInfo:
        """The worker begins to train.

        Args:
            job_id: of the job.
            generation: of the lease.
            circumstances: recorded with the attempt.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        now = self._clock()

        def record(connection: sqlite3.Connection, row: sqlite3.Row) -> None:
            connection.execute(
                "UPDATE jobs SET started_at = coalesce(started_at, ?), error = NULL WHERE number = ?", (now, row["number"])
            )
            attempts.add_circumstances(connection, row, circumstances)

        return await self._step(job_id, Started(generation), record)

    async def checkpoint(self, job_id: str, generation: int, sha256: str, epoch: int) -> JobInfo:
        """Remember the checkpoint the job goes on from; its blob must be on disk already.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        return await self._in_lease(
            job_id, generation, lambda connection, row: checkpoint_rows.record(connection, row, sha256, epoch)
        )

    async def drop_checkpoint(self, job_id: str, generation: int, damaged: str) -> JobInfo:
        """One of a job's checkpoints does not verify: see :func:`esperd.daemon.checkpoint_rows.drop`.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        return await self._in_lease(job_id, generation, functools.partial(checkpoint_rows.drop, damaged=damaged))

    async def prefer_checkpoint(self, job_id: str, generation: int, sha256: str, because: str) -> JobInfo:
        """A job goes on from the other of its checkpoints: see :func:`esperd.daemon.checkpoint_rows.prefer`.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        return await self._in_lease(
            job_id, generation, lambda connection, row: checkpoint_rows.prefer(connection, row, sha256, because)
        )

    async def kept_checkpoints(self) -> dict[str, tuple[str | None, str | None]]:
        """The checkpoints of every job that may go on, by id; also of one that cannot be read: it is left alone."""
        rows = await self._database.read(checkpoint_rows.KEPT, [state.value for state in DONE_FOR_GOOD])
        return {row["id"]: (row["checkpoint"], row["previous_checkpoint"]) for row in rows}

    async def _in_lease(self, job_id: str, generation: int, change: Callable[[sqlite3.Connection, sqlite3.Row], None]) -> JobInfo:
        def transaction(connection: sqlite3.Connection) -> JobInfo:
            row = row_of(connection, job_id)
            check_lease(standing_of(row), generation)
            change(connection, row)
            return info_of(row_of(connection, job_id))

        return await self._database.write(transaction)

    async def attempts(self, job_id: str) -> tuple[Attempt, ...]:
        """Every attempt at a job, oldest first.

        Raises:
            JobNotFound: when there is no such job.
        """
        await self.get(job_id)
        rows = await self._database.read("SELECT * FROM attempts WHERE job = ? ORDER BY number", (job_id,))
        return tuple(map(attempts.of_row, rows))

    async def let_go_of_failed(self, before: float) -> tuple[str, ...]:
        """Forget the checkpoints of jobs that failed or died before this time; returns the ids of these jobs."""

        def transaction(connection: sqlite3.Connection) -> tuple[str, ...]:
            rows = connection.execute(
                "UPDATE jobs SET checkpoint = NULL, previous_checkpoint = NULL WHERE state IN (?, ?) AND finished_at < ?"
                " AND checkpoint IS NOT NULL RETURNING id",
                (JobState.FAILED.value, JobState.DEAD.value, before),
            ).fetchall()
            return tuple(row["id"] for row in rows)

        return await self._database.write(transaction)

    async def succeeded(
        self, job_id: str, generation: int, epoch: int, artifacts: Sequence[Artifact], peak: Peak = UNMEASURED
    ) -> JobInfo:
        """The job is done; its artifacts become visible with its end.

        Args:
            job_id: of the job.
            generation: of the lease.
            epoch: the last one.
            artifacts: their blobs must be on disk already.
            peak: the most memory that its worker held.

        Raises:
            Conflict: when the lease has ended.
            IllegalTransition: when the worker never said that it started.
            JobNotFound: when there is no such job.
        """

        def record(connection: sqlite3.Connection, row: sqlite3.Row) -> None:
            connection.execute("UPDATE jobs SET epoch = ? WHERE number = ?", (epoch, row["number"]))
            connection.executemany(
                "INSERT INTO artifacts (job, position, name, sha256, size_bytes) VALUES (?, ?, ?, ?, ?)",
                [
                    (job_id, position, artifact.name, artifact.sha256, artifact.size_bytes)
                    for position, artifact in enumerate(artifacts)
                ],
            )

        return await self._step(job_id, Succeeded(generation), record, peak)

    async def stopped(
        self,
        job_id: str,
        generation: int,
        why: Literal["pause", "cancel", "drain"],
        peak: Peak = UNMEASURED,
        *,
        disobedience: str = "",
    ) -> JobInfo:
        """The worker stopped as it was told to: the job goes where the user wants it, else back to the queue.

        Args:
            job_id: of the job.
            generation: of the lease.
            why: what it was told.
            peak: the most memory that it held.
            disobedience: why its process had to be ended instead; recorded as the attempt's error. No attempt is spent.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        error = _record_error(JobError(code=WorkerFailed.code, message=disobedience)) if disobedience else None
        return await self._step(job_id, Stopped(generation, why), error, peak)

    async def broken(self, job_id: str, generation: int, error: JobError, peak: Peak = UNMEASURED) -> JobInfo:
        """The job cannot succeed. ``peak`` is the most memory that its worker held.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        return await self._step(job_id, Broken(generation), _record_error(error), peak)

    async def worker_lost(self, job_id: str, generation: int, reason: str) -> JobInfo:
        """The worker died or fell silent: the job waits for another attempt, or is dead after the last one.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        error = JobError(code=WorkerFailed.code, message=reason)
        return await self._step(job_id, WorkerLost(generation, self._clock()), _record_error(error))

    async def out_of_memory(self, job_id: str, generation: int, error: JobError, peak: Peak = UNMEASURED) -> JobInfo:
        """Its worker's memory ran out: the job is tried again with batches in smaller pieces where it allows that, and has failed
        where it does not, or they cannot be smaller. ``peak`` is the most memory that the worker held.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        now = self._clock()

        def record(connection: sqlite3.Connection, row: sqlite3.Row) -> None:
            job = info_of(row).job
            _record_peak(connection, row, peak)
            smaller = usage.halve(connection, job_id, job) if job.resources.smaller_retry else None
            self._advance(connection, row, Broken(generation) if smaller is None else WorkerLost(generation, now))
            _record_error(error)(connection, row)

        return await self._in_lease(job_id, generation, record)

    async def worker_left(self, job_id: str, generation: int) -> JobInfo:
        """The worker gave up through no fault of the job: it waits ``backoff_s`` for another one, and no attempt is spent.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        return await self._step(job_id, WorkerLeft(generation, self._clock()))

    async def checkpoints_unread(self, job_id: str, generation: int, error: JobError) -> JobInfo:
        """None of its checkpoints can be read: the job waits, longer each time, and no attempt is spent; it is dead when they
        could not be read for too long.

        Raises:
            Conflict: when the lease has ended.
            JobNotFound: when there is no such job.
        """
        now = self._clock()

        def record(connection: sqlite3.Connection, row: sqlite3.Row) -> None:
            tries = attempts.unread_in_a_row(connection, row)
            self._advance(connection, row, CheckpointsUnread(generation, now, tries))
            # Counted when it was leased, and it did not go on from any.
            connection.execute("UPDATE jobs SET resumed = resumed - 1 WHERE number = ?", (row["number"],))
            _record_error(error)(connection, row)

        return await self._in_lease(job_id, generation, record)

    async def pause(self, job_id: str) -> Asked:
        """Let a job rest: at once when it is queued, when its worker has stopped when it is held.

        Raises:
            IllegalTransition: when it is paused, finished, or being cancelled.
            JobNotFound: when there is no such job.
        """
        return await self._ask(job_id, PauseAsked())

    async def resume(self, job_id: str) -> Asked:
        """Queue a paused job, or take back a pause that its worker has not carried out yet.

        Raises:
            IllegalTransition: when it is not paused.
            JobNotFound: when there is no such job.
        """
        return await self._ask(job_id, ResumeAsked())

    async def cancel(self, job_id: str) -> Asked:
        """End a job: at once when nobody holds it, when its worker has stopped otherwise.

        Raises:
            IllegalTransition: when it is finished.
            JobNotFound: when there is no such job.
        """
        return await self._ask(job_id, CancelAsked())

    async def retry(self, job_id: str) -> JobInfo:
        """Queue a failed or dead job again, with all its attempts before it.

        Raises:
            IllegalTransition: when it has not failed.
            JobNotFound: when there is no such job.
        """
        return (await self._ask(job_id, RetryAsked())).info

    async def artifacts(self, job_id: str) -> tuple[Artifact, ...]:
        """What a job left in the blob store; empty until it has succeeded.

        Raises:
            JobNotFound: when there is no such job.
        """
        await self.get(job_id)
        rows = await self._database.read("SELECT * FROM artifacts WHERE job = ? ORDER BY position", (job_id,))
        return tuple(Artifact(name=row["name"], sha256=row["sha256"], size_bytes=row["size_bytes"]) for row in rows)

    async def recover(self) -> tuple[JobInfo, ...]:
        """At the start of a daemon: whatever was held goes back to the queue, or where its user wanted it, without
        spending an attempt. Returns the jobs it moved.
        """

        def transaction(connection: sqlite3.Connection) -> tuple[JobInfo, ...]:
            held = connection.execute(
                "SELECT * FROM jobs_with_usage WHERE state IN (?, ?) ORDER BY number",
                (JobState.LEASED.value, JobState.RUNNING.value),
            ).fetchall()
            readable = [row for row, _ in self._readable(held)]
            for row in readable:
                self._advance(connection, row, DaemonRestarted())
            return tuple(info_of(row_of(connection, row["id"])) for row in readable)

        return await self._database.write(transaction)

    async def _step(
        self,
        job_id: str,
        event: JobEvent,
        record: Callable[[sqlite3.Connection, sqlite3.Row], None] | None = None,
        peak: Peak = UNMEASURED,
    ) -> JobInfo:
        """One event, and what is recorded with it, in one transaction: an event of a lease that has ended records nothing."""

        def transaction(connection: sqlite3.Connection) -> JobInfo:
            row = row_of(connection, job_id)
            self._advance(connection, row, event)
            if record is not None:
                record(connection, row)
            _record_peak(connection, row, peak)
            return info_of(row_of(connection, job_id))

        return await self._database.write(transaction)

    async def _ask(self, job_id: str, event: JobEvent) -> Asked:
        def transaction(connection: sqlite3.Connection) -> Asked:
            told = self._advance(connection, row_of(connection, job_id), event)
            return Asked(info_of(row_of(connection, job_id)), told[0] if told else None)

        return await self._database.write(transaction)

    def _advance(self, connection: sqlite3.Connection, row: sqlite3.Row, event: JobEvent) -> tuple[StopJob, ...]:
        """Move a row as the lifecycle says; returns what its worker must be told."""
        before = standing_of(row)
        moved = advance(before, event, self.limits, self._rng)
        standing = moved.standing
        finished_at = self._clock() if standing.state in FINAL_JOB_STATES else None
        changed = connection.execute(
            "UPDATE jobs SET state = ?, generation = ?, lost = ?, wish = ?, retry_at = ?, finished_at = ?,"
            # A job that is done is not resumed: its row lets go of the checkpoints, whose files may then be deleted.
            " checkpoint = iif(?7, NULL, checkpoint), previous_checkpoint = iif(?7, NULL, previous_checkpoint)"
            " WHERE number = ? AND generation = ? AND state = ?",
            (
                standing.state.value,
                standing.generation,
                standing.lost,
                standing.wish,
                standing.retry_at,
                finished_at,
                standing.state in DONE_FOR_GOOD,
                row["number"],
                before.generation,
                before.state.value,
            ),
        ).rowcount
        if changed != 1:
            raise Conflict(f"job {row['id']} moved on meanwhile; nothing was written", id=row["id"])
        attempts.record(connection, row, event, self._clock())
        return moved.tell_worker

    def _refuse_when_full(self, connection: sqlite3.Connection) -> None:
        queued = connection.execute("SELECT count(*) FROM jobs WHERE state = ?", (JobState.QUEUED.value,)).fetchone()[0]
        if queued >= self.limits.max_queued:
            raise Busy(
                f"{queued} jobs wait already, the limit is jobs.max_queued = {self.limits.max_queued}; try again in"
                f" {BUSY_RETRY_AFTER_S:g} s",
                retry_after_s=BUSY_RETRY_AFTER_S,
                queued=queued,
            )

    def _free_id(self, connection: sqlite3.Connection) -> str:
        while True:
            job_id = f"j{self._rng.getrandbits(32):08x}"
            if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (job_id,)).fetchone() is None:
                return job_id


def _digest(job: Job) -> tuple[bytes, str]:
    """A job's bytes in the store, and their hash."""
    payload = msgspec.msgpack.encode(job, order="deterministic")
    return payload, hashlib.sha256(payload).hexdigest()


def _record_peak(connection: sqlite3.Connection, row: sqlite3.Row, peak: Peak) -> None:
    if peak != UNMEASURED:
        usage.record(connection, row["id"], info_of(row).job, peak)


def _record_error(error: JobError) -> Callable[[sqlite3.Connection, sqlite3.Row], None]:
    def record(connection: sqlite3.Connection, row: sqlite3.Row) -> None:
        connection.execute("UPDATE jobs SET error = ? WHERE number = ?", (msgspec.msgpack.encode(error), row["number"]))
        attempts.record_error(connection, row, error)

    return record
