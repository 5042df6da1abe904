"""What finished jobs left goes when it is old or too much; what is not finished stays, whatever its age."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from daemon_jobs import job

from esperd.config import Retention as Settings
from esperd.daemon import job_tables
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.finished_jobs import FinishedJob, FinishedJobs
from esperd.daemon.job_store import JobStore
from esperd.daemon.retention import DAY_S, Removed, Retention, outlived
from esperd.daemon.steady_time import SteadyTime
from esperd.messages.jobs import Artifact, Job
from esperd.messages.telemetry import JobStateChanged, NewEvent
from esperd.store.database import Database
from esperd.telemetry import log as event_log
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics

JOB = msgspec.convert(job(1), Job)
FOR_GOOD = Settings(events_days=0.0, events_bytes=0, jobs_days=0.0, jobs_bytes=0)


class Kept:
    """Databases of one daemon, and time that a test sets."""

    def __init__(self, jobs, events, directory):
        self.now = 0.0
        self.settings = FOR_GOOD
        self.store = JobStore(jobs, lambda: self.now)
        self.events = EventLog(events)
        self.metrics = Metrics()
        self.checkpoints = Checkpoints(directory)
        self.finished = FinishedJobs(jobs)
        self.retention = Retention(
            self.finished, self.events, self.checkpoints, self.metrics, lambda: self.settings, lambda: self.now
        )

    async def submitted(self, key, events=2):
        """A queued job with events."""
        info = (await self.store.submit(JOB, key)).info
        body = JobStateChanged(state=info.state, attempt=0, error=None)
        await self.events.append(info.id, "batch", [NewEvent(at=self.now, body=body)] * events)
        self.metrics.observe_job(info)
        return info.id

    async def succeeded(self, key, *, day, events=2, size_bytes=10):
        """A job that ended on that day."""
        self.now = day * DAY_S
        job_id = await self.submitted(key, events)
        leased = await self.store.lease(self.now)
        await self.store.started(job_id, leased.generation)
        artifact = Artifact(name="report.json", sha256="0" * 64, size_bytes=size_bytes)
        self.metrics.observe_job(await self.store.succeeded(job_id, leased.generation, 1, [artifact]))
        return job_id

    async def left(self):
        """Jobs that are known, and jobs that have events."""
        return {info.id for info in await self.store.list()}, set(await self.events.last_events())

    def counted(self):
        lines = self.metrics.render().decode().splitlines()
        return {
            line.partition("{")[2].split('"')[1]: float(line.split()[-1]) for line in lines if "retention_deleted_total{" in line
        }


@contextlib.asynccontextmanager
async def kept(tmp_path):
    async with (
        Database.open(tmp_path / "jobs.db", job_tables.MIGRATIONS) as jobs,
        Database.open(tmp_path / "events.db", event_log.MIGRATIONS, synchronous="NORMAL") as events,
    ):
        yield Kept(jobs, events, tmp_path / "checkpoints")


def test_jobs_go_by_age_first_and_then_by_size_the_oldest_first():
    finished = [FinishedJob(f"j{day}", day * DAY_S, 10) for day in range(5)]

    def going(days, size_bytes):
        return [job.id for job in outlived(finished, 5 * DAY_S, days, size_bytes)]

    assert going(0, 0) == []
    assert going(2.5, 0) == ["j0", "j1", "j2"]
    assert going(0, 25) == ["j0", "j1", "j2"]
    assert going(3.5, 25) == ["j0", "j1", "j2"]
    assert going(1, 50) == ["j0", "j1", "j2", "j3"]


def test_nothing_goes_for_its_age_while_the_wall_clock_jumps():
    wall, monotonic = iter([100.0, 200.0, 1e9, 1e9 + 100, 400.0]), iter([0.0, 100.0, 200.0, 300.0, 400.0])
    steady = SteadyTime(lambda: next(wall), lambda: next(monotonic))
    assert [steady.holds() for _ in range(5)] == [False, True, False, True, False]


@pytest.mark.asyncio
async def test_the_events_of_jobs_that_ended_long_ago_go_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "FORGOTTEN_AT_ONCE", 2)
    async with kept(tmp_path) as daemon:
        waiting = await daemon.submitted("waiting")
        await daemon.store.pause(waiting)
        old = await daemon.succeeded("old", day=1, events=5)
        young = await daemon.succeeded("young", day=9)
        daemon.now = 10 * DAY_S
        assert await daemon.retention.look() == Removed(0, 0)
        daemon.settings = Settings(events_days=5.0)
        assert await daemon.retention.look() == Removed(0, 5)
        assert await daemon.left() == ({waiting, old, young}, {waiting, young})
        assert await daemon.retention.look() == Removed(0, 0)
        assert daemon.counted() == {"events": 5.0}


@pytest.mark.asyncio
async def test_a_log_that_is_too_large_loses_the_events_of_the_jobs_that_ended_first_but_none_of_unfinished_ones(tmp_path):
    async with kept(tmp_path) as daemon:
        waiting = await daemon.submitted("waiting", events=400)
        await daemon.store.pause(waiting)
        for day in (1, 2):
            await daemon.succeeded(f"of day {day}", day=day, events=400)
        last = await daemon.succeeded("last", day=3, events=400)
        size_bytes = await daemon.events.size_bytes()
        daemon.settings = msgspec.structs.replace(FOR_GOOD, events_bytes=size_bytes * 2 // 3)
        assert (await daemon.retention.look()).events in (400, 800)
        assert {waiting, last} <= (await daemon.left())[1]
        assert await daemon.events.size_bytes() <= daemon.settings.events_bytes
        daemon.settings = msgspec.structs.replace(FOR_GOOD, events_bytes=1)
        await daemon.retention.look()
        assert (await daemon.left())[1] == {waiting}


@pytest.mark.asyncio
async def test_a_forgotten_job_leaves_nothing_behind_and_its_key_may_be_used_again(tmp_path):
    async with kept(tmp_path) as daemon:
        old = await daemon.succeeded("old", day=1)
        young = await daemon.succeeded("young", day=9)
        daemon.checkpoints.of(old).put(b"left by a job that failed")
        daemon.now = 10 * DAY_S
        daemon.settings = msgspec.structs.replace(FOR_GOOD, jobs_days=5.0)
        assert await daemon.retention.look() == Removed(1, 2)
        assert await daemon.left() == ({young}, {young})
        assert not (tmp_path / "checkpoints" / old).exists()
        assert daemon.counted() == {"jobs": 1.0, "events": 2.0}
        assert 'esperd_jobs{state="succeeded"} 1.0' in daemon.metrics.render().decode()
        assert not (await daemon.store.submit(JOB, "old")).duplicate


@pytest.mark.asyncio
async def test_a_job_that_is_taken_up_again_meanwhile_is_not_forgotten(tmp_path):
    async with kept(tmp_path) as daemon:
        old = await daemon.succeeded("old", day=1)
        (seen,) = await daemon.finished.list()
        assert not await daemon.finished.forget(seen._replace(ended_at=0.0))
        assert (await daemon.store.get(old)).id == old
        assert len(await daemon.store.artifacts(old)) == 1
        assert await daemon.finished.forget(seen)
