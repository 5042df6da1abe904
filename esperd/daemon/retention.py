"""What finished jobs left goes after a while, or when there is too much of it: events first, whole jobs when asked for.

Unfinished jobs are never touched. What the policy learned from a job (:mod:`esperd.policy`) stays: other jobs rest on it. The
files of a forgotten job's artifacts are garbage from then on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import anyio
import anyio.to_thread
import structlog

from esperd import config
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.finished_jobs import FinishedJob, FinishedJobs
from esperd.daemon.steady_time import SteadyTime
from esperd.errors import StoreFailed
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics

DAY_S = 24 * 3600.0

log = structlog.get_logger()


class Removed(NamedTuple):
    """What one look deleted."""

    jobs: int
    events: int


def outlived(finished: Sequence[FinishedJob], now: float, days: float, size_bytes: int) -> tuple[FinishedJob, ...]:
    """Which jobs are to go, as a pure function.

    Args:
        finished: the one that ended first first.
        now: seconds since the epoch.
        days: that a job is kept after its end; 0: for good.
        size_bytes: that all which stay may have together; 0: as many as they have.
    """
    going = [job for job in finished if days and now - job.ended_at > days * DAY_S]
    staying = finished[len(going) :]
    excess = sum(job.size_bytes for job in staying) - size_bytes if size_bytes else 0
    for job in staying:
        if excess <= 0:
            break
        excess -= job.size_bytes
        going.append(job)
    return tuple(going)


class Retention:
    """Looks again and again.

    Args:
        jobs: the finished ones.
        events: of all jobs.
        checkpoints: of those that kept one.
        metrics: count what is deleted.
        settings: in force now.
        wall: seconds since the epoch.
        steady: whether it can be believed; None: it can.
    """

    def __init__(
        self,
        jobs: FinishedJobs,
        events: EventLog,
        checkpoints: Checkpoints,
        metrics: Metrics,
        settings: Callable[[], config.Retention],
        wall: Callable[[], float],
        steady: SteadyTime | None = None,
    ) -> None:
        self._jobs = jobs
        self._events = events
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._settings = settings
        self._wall = wall
        self._steady = steady

    async def run(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Look for ever. A store that fails is said; the next look tries again."""
        while True:
            try:
                if self._steady is None or self._steady.holds():
                    await self.look()
            except StoreFailed as error:
                log.warning("what finished jobs left could not be deleted", error=str(error))
            await sleep(self._settings().every_s)

    async def look(self) -> Removed:
        """Delete what has outlived its time.

        Raises:
            StoreFailed: when a database or the disk refuses; what was deleted until then is counted.
        """
        settings = self._settings()
        finished = await self._jobs.list()
        jobs = events = 0
        for job in outlived(finished, self._wall(), settings.jobs_days, settings.jobs_bytes):
            if await self._jobs.forget(job):
                jobs += 1
                self._metrics.forget_job(job.id)
                events += await self._forget_events(job.id)
                await anyio.to_thread.run_sync(self._checkpoints.forget, job.id)
                self._metrics.observe_retention("jobs", 1)
                log.info("a job was forgotten", job=job.id, ended_at=job.ended_at, size_bytes=job.size_bytes)
        events += await self._trim_events(settings)
        return Removed(jobs, events)

    async def _trim_events(self, settings: config.Retention) -> int:
        """Delete the events of jobs that ended long ago; then, while the log is too large, of those that ended first."""
        deleted = 0
        candidates = await self._with_events()
        for job in outlived(candidates, self._wall(), settings.events_days, 0):
            deleted += await self._forget_events(job.id)
            candidates.remove(job)
        while settings.events_bytes and await self._events.size_bytes() > settings.events_bytes:
            if not candidates:
                log.warning("the event log is larger than retention.events_bytes: unfinished jobs need it")
                break
            deleted += await self._forget_events(candidates.pop(0).id)
        return deleted

    async def _with_events(self) -> list[FinishedJob]:
        """Finished jobs that have events, and forgotten ones of which events are left, the one that ended first first."""
        last_events = await self._events.last_events()  # before the jobs: each of these has, or had, a row there
        known = await self._jobs.all_ids()
        ended = {job.id: job.ended_at for job in await self._jobs.list()}
        ended |= {job: at for job, at in last_events.items() if job not in known}
        found = [FinishedJob(job, ended[job], 0) for job in last_events if job in ended]
        return sorted(found, key=lambda job: job.ended_at)

    async def _forget_events(self, job: str) -> int:
        deleted = await self._events.forget(job)
        if deleted:
            self._metrics.observe_retention("events", deleted)
            log.info("events of a job were deleted", job=job, events=deleted)
        return deleted
