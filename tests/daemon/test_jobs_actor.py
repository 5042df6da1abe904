"""The actor that leases jobs, with a real store and workers that do as the test says: nothing around it that fails ends it."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time

import anyio
import msgspec
import pytest
from daemon_jobs import QUICK, job

from esperd.actors.actor import Actor, handles
from esperd.actors.clock import SystemClock
from esperd.actors.spec import ChildSpec, ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.daemon import artifacts, job_tables
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.job_store import JobStore
from esperd.daemon.jobs_actor import JobsActor
from esperd.daemon.process import Status, _stop_at_once
from esperd.daemon.worker_processes import worker_name
from esperd.errors import Busy, StoreFailed
from esperd.messages.base import Done
from esperd.messages.control import ActorState, Terminated
from esperd.messages.jobs import (
    Artifact,
    CancelJob,
    FetchArtifact,
    GetJob,
    Job,
    JobState,
    PauseJob,
    ResumeJob,
    SubmitJob,
)
from esperd.messages.leases import (
    DrainJobs,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
    StopJob,
)
from esperd.messages.telemetry import Record
from esperd.plugins import load_plugins
from esperd.store import database
from esperd.store.blobs import Blobs
from esperd.store.database import Database
from esperd.store.filesystem import RealFilesystem
from esperd.telemetry.metrics import Metrics
from esperd.testing import process_id, until

PLUGINS = load_plugins()
JOB = msgspec.convert(job(1), Job)


class Telemetry(Actor):
    """Keeps what it is asked to record; refuses the first ``refusals``."""

    def __init__(self, refusals=0):
        self.refusals = refusals
        self.states = []

    @handles(Record)
    async def record(self, message):
        if self.refusals:
            self.refusals -= 1
            raise StoreFailed("events.db: database is locked", sqlite="SQLITE_BUSY")
        self.states += [event.body.state.value for event in message.events]
        return Done()


class Worker(Actor):
    """Takes a lease, remembers what it is told."""

    def __init__(self):
        self.told = []

    @handles(Lease)
    async def lease(self, message):
        self.told.append(message)
        return Done()

    @handles(StopJob)
    async def stop(self, message):
        self.told.append(message)


class Office:
    """A jobs actor and what surrounds it."""

    def __init__(self, system, store):
        self.system, self.store = system, store
        self.workers = {}
        self.telemetry = Telemetry()
        self.actor = None
        self.config = QUICK

    async def start_worker(self, spec):
        self.workers[spec.name] = Worker()
        await self.system.start(ChildSpec(spec.name, lambda: self.workers[spec.name]))

    def make(self):
        self.actor = JobsActor(
            store=self.store,
            blobs=Blobs(self.store._database.path.parent / "blobs"),
            checkpoints=Checkpoints(self.store._database.path.parent / "checkpoints"),
            config=self.config,
            plugins=PLUGINS,
            metrics=Metrics(),
            start_worker=self.start_worker,
            stop_workers=lambda: _stop_at_once(self.system, lambda actor: actor.name.startswith("trainer/")),
            end_worker=lambda name: _stop_at_once(self.system, lambda actor: actor.name == name),
            clock=SystemClock(),
        )
        return self.actor

    async def open(self):
        await self.system.start(ChildSpec("telemetry", lambda: self.telemetry))
        await self.system.start(ChildSpec("jobs", self.make))

    async def ask(self, message):
        return await self.system.ask("jobs", message)

    async def submit(self):
        return (await self.ask(SubmitJob(job=JOB, idempotency_key=str(time.time_ns())))).id

    async def leased(self, job_id, generation):
        """The worker, once it has the lease."""
        name = worker_name(job_id, generation)

        async def has_lease():
            return name in self.workers and bool(self.workers[name].told)

        await until(has_lease)
        return self.workers[name]

    async def becomes(self, job_id, state):
        async def is_so():
            return (await self.store.get(job_id)).state is state

        await until(is_so)
        return await self.store.get(job_id)

    def restarts(self):
        return next(actor.restarts for actor in self.system.status() if actor.name == "jobs")


@contextlib.asynccontextmanager
async def office(directory):
    async with (
        Database.open(directory / "jobs.db", job_tables.MIGRATIONS) as jobs,
        ActorSystem(workers_endpoint=f"ipc://{directory}/w.sock") as system,
    ):
        yield Office(system, JobStore(jobs, time.time, QUICK.jobs))


@contextlib.contextmanager
def locked(directory):
    """A shell that holds the database, as a backup does."""
    with contextlib.closing(sqlite3.connect(directory / "jobs.db", isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        yield
        shell.execute("ROLLBACK")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)


@pytest.mark.asyncio
async def test_a_store_that_fails_for_a_while_is_shown_and_forgets_no_worker_that_ended_meanwhile(tmp_path):
    async with office(tmp_path) as here:
        await here.open()
        job_id = await here.submit()
        await here.leased(job_id, 1)
        status = Status(starting=False, system=here.system, jobs=here.actor)
        assert status.not_ready() == []
        with locked(tmp_path):
            gone = Terminated(actor=worker_name(job_id, 1), generation=1, reason="was killed", will_restart=False, status=-9)
            await here.system.tell("jobs", gone)

            async def says_so():
                return any(reason.startswith("store: ") and "locked" in reason for reason in status.not_ready())

            await until(says_so)
            assert (await here.ask(GetJob(id=job_id))).state is JobState.LEASED
        await here.leased(job_id, 2)
        info = await here.store.get(job_id)
        assert (info.attempt, info.error.message) == (2, "was killed")
        assert (status.not_ready(), here.restarts()) == ([], 0)


@pytest.mark.asyncio
async def test_a_store_that_fails_at_the_start_is_asked_again(tmp_path):
    async with office(tmp_path) as here:
        held = (await here.store.submit(JOB, "key")).info.id
        await here.store.lease(time.time())
        with locked(tmp_path):
            await here.open()
            assert "locked" in here.actor.trouble
        await here.leased(held, 2)
        assert (here.actor.trouble, here.restarts()) == ("", 0)


@pytest.mark.asyncio
async def test_a_job_is_cancelled_through_the_worker_that_has_it_now_not_one_that_is_still_leaving(tmp_path):
    async with office(tmp_path) as here:
        await here.open()
        job_id = await here.submit()
        before = await here.leased(job_id, 1)
        await here.ask(JobStarted(job_id=job_id, generation=1))
        await here.ask(PauseJob(id=job_id))
        await here.ask(JobStopped(job_id=job_id, generation=1, why="pause"))  # and its process takes its time to end
        await here.ask(ResumeJob(id=job_id))
        now = await here.leased(job_id, 2)
        await here.ask(CancelJob(id=job_id))

        async def told():
            return now.told[1:] == [StopJob(why="cancel")]

        await until(told)
        assert before.told[1:] == [StopJob(why="pause")]
        await here.ask(JobStopped(job_id=job_id, generation=2, why="cancel"))
        assert (await here.store.get(job_id)).state is JobState.CANCELLED


@pytest.mark.asyncio
async def test_a_worker_that_left_through_no_fault_of_its_job_spends_no_attempt(tmp_path):
    async with office(tmp_path) as here:
        await here.open()
        job_id = await here.submit()
        for attempt in range(1, QUICK.jobs.max_attempts + 2):
            await here.leased(job_id, attempt)
            name = worker_name(job_id, attempt)
            await here.system.tell("jobs", Terminated(actor=name, generation=1, reason="75", will_restart=False, status=75))
        await here.leased(job_id, QUICK.jobs.max_attempts + 2)
        assert (await here.store.get(job_id)).error is None


@pytest.mark.asyncio
async def test_workers_of_an_incarnation_that_crashed_are_gone_before_their_jobs_are_leased_again(tmp_path):
    async with office(tmp_path) as here:
        await here.open()
        stray = "trainer/of-nobody.1"
        await here.system.start(ProcessSpec(stray, [sys.executable, "-m", "esperd.trainer.worker"], restart="temporary"))
        (pid,) = [actor.pid for actor in here.system.status() if actor.name == stray]
        process = process_id(pid)
        job_id = await here.submit()
        await here.leased(job_id, 1)
        await here.system.tell("jobs", GetJob(id="nobody"))  # told, not asked: what it raises ends the incarnation
        await here.leased(job_id, 2)
        assert not process.is_alive
        running = [actor.name for actor in here.system.status() if actor.state is ActorState.RUNNING]
        assert [name for name in running if name.startswith("trainer/")] == [worker_name(job_id, 2)]
        assert here.restarts() == 1


@pytest.mark.asyncio
async def test_changes_of_state_reach_a_log_that_was_away_all_of_them_and_in_order(tmp_path):
    async with office(tmp_path) as here:
        here.telemetry.refusals = 1
        await here.open()
        job_id = await here.submit()
        await here.leased(job_id, 1)
        await here.ask(CancelJob(id=job_id))
        with anyio.fail_after(5):
            await here.ask(JobStopped(job_id=job_id, generation=1, why="cancel"))

            async def all_there():
                return here.telemetry.states == ["queued", "leased", "cancelled"]

            await until(all_there)


@pytest.mark.asyncio
async def test_a_resubmission_of_what_was_acknowledged_is_answered_whatever_has_changed_since(tmp_path):
    async with office(tmp_path) as here:
        await here.open()
        first = await here.system.ask("jobs", SubmitJob(job=JOB, idempotency_key="once"))
        await here.system.ask("jobs", DrainJobs())  # new work is refused from here on
        again = await here.system.ask("jobs", SubmitJob(job=JOB, idempotency_key="once"))
        assert (again.id, again.duplicate) == (first.id, True)
        with pytest.raises(Busy):
            await here.system.ask("jobs", SubmitJob(job=JOB, idempotency_key="another"))


@pytest.mark.asyncio
async def test_an_artifact_is_verified_once_before_its_first_piece_and_a_damaged_one_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "CHUNK_BYTES", 1000)
    reads, read, pieces = [], RealFilesystem.read, RealFilesystem.pieces
    monkeypatch.setattr(RealFilesystem, "read", lambda disk, *asked: reads.append(asked) or read(disk, *asked))
    monkeypatch.setattr(RealFilesystem, "pieces", lambda disk, path: reads.append(path) or pieces(disk, path))
    content = bytes(range(100)) * 100
    async with office(tmp_path) as here:
        await here.open()
        blobs = Blobs(tmp_path / "blobs")
        sha256 = blobs.put(content)
        job_id = await here.submit()
        await here.leased(job_id, 1)
        await here.ask(JobStarted(job_id=job_id, generation=1))
        model = Artifact(name="model.safetensors", sha256=sha256, size_bytes=len(content))
        await here.ask(JobSucceeded(job_id=job_id, generation=1, epoch=1, artifacts=(model,)))
        reads.clear()
        asked = [FetchArtifact(id=job_id, name=model.name, offset=offset) for offset in range(0, len(content), 1000)]
        assert b"".join([(await here.ask(each)).data for each in asked]) == content
        assert len(reads) == len(asked) + 1

        blobs.path(sha256).write_bytes(b"x" + content[1:])
        with pytest.raises(StoreFailed, match=f"{model.name} of job {job_id} is damaged, .* moved to .*/quarantine/{sha256}"):
            await here.ask(asked[0])
        assert [name.partition(".")[0] for name in blobs.quarantined()] == [sha256]
        assert not blobs.contains(sha256)
        with pytest.raises(StoreFailed, match="run it again, or restore a backup"):
            await here.ask(asked[0])
        assert here.restarts() == 0
