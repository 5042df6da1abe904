"""The trainer's process as the daemon sees it: what it asks, what it tells, how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import desks
import msgspec
import pytest

from esperd.actors.actor import Actor, handles
from esperd.actors.spec import ChildSpec, ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.errors import Conflict, StoreFailed
from esperd.messages.base import Done
from esperd.messages.control import Terminated
from esperd.messages.kernels import ProvideKernel
from esperd.messages.leases import (
    EXIT_NO_FAULT,
    CheckpointWritten,
    JobBroken,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
)
from esperd.messages.policy import Decide
from esperd.messages.reports import Report
from esperd.messages.telemetry import EpochCompleted, Record
from esperd.store.blobs import Blobs

WORKER = "trainer/job-1"


class Policy(Actor):
    """Decides with the strategy the job names, and keeps nothing."""

    @handles(Decide)
    async def decide(self, message):
        return desks.InProcessDesk().decide(message)


class Cache(Actor):
    """Compiles whatever it is asked for, here and now."""

    def __init__(self):
        self.asked_by = []

    @handles(ProvideKernel)
    async def provide(self, message):
        self.asked_by.append(message.job)
        return await anyio.to_thread.run_sync(desks.InProcessDesk().kernel, message.key)


class Telemetry(Actor):
    """Keeps the batches it is told to record."""

    def __init__(self):
        self.batches = []
        self.refusals = 0

    @handles(Record)
    async def record(self, message):
        if self.refusals:
            self.refusals -= 1
            raise StoreFailed("events.db: database is locked")
        self.batches.append(message)
        return Done()

    def bodies(self):
        return [event.body for batch in self.batches for event in batch.events]


class Jobs(Actor):
    """Keeps what the worker reports; with ``stale`` it refuses the lease, as a daemon does that gave the job to another."""

    def __init__(self, *, stale=False):
        self.stale = stale
        self.refusals = 0
        self.told = []
        self.ended = anyio.Event()
        self.end = None

    async def on_start(self, context):
        self.context = context

    @handles(JobStarted)
    async def started(self, message):
        await self.context.watch(WORKER)
        return self._note(message)

    @handles(CheckpointWritten)
    async def checkpoint(self, message):
        if self.stale:
            raise Conflict("generation 3 lost its lease to generation 4")
        return self._note(message)

    @handles(JobSucceeded)
    async def succeeded(self, message):
        return self._note(message)

    @handles(JobStopped)
    async def stopped(self, message):
        return self._note(message)

    @handles(JobBroken)
    async def broken(self, message):
        return self._note(message)

    @handles(Terminated)
    async def terminated(self, message):
        self.end = message
        self.ended.set()

    def _note(self, message):
        if self.refusals:
            self.refusals -= 1
            raise StoreFailed("jobs.db: database is locked")
        self.told.append(message)
        return Done()


class Office:
    """The worker's surroundings for one lease: real actors around a real process."""

    def __init__(self, directory, *, stale=False):
        self.directory = directory
        self.blobs = Blobs(directory / "blobs")
        self.jobs, self.telemetry, self.cache = Jobs(stale=stale), Telemetry(), Cache()

    async def run(self, job, checkpoint=None):
        """Lease the job to a worker process and wait for the process's end."""
        job = msgspec.structs.replace(job, workdir=str(Path(desks.__file__).parent))
        system = ActorSystem(workers_endpoint=f"ipc://{self.directory}/w.sock")
        async with system:
            for name, actor in (("telemetry", self.telemetry), ("policy", Policy()), ("cache", self.cache)):
                await system.start(ChildSpec(name, lambda actor=actor: actor))
            await system.start(ChildSpec("jobs", lambda: self.jobs))
            await system.start(ProcessSpec(WORKER, [sys.executable, "-m", "esperd.trainer.worker"], restart="temporary"))
            await system.tell(
                WORKER,
                Lease(
                    job_id="job-1",
                    generation=3,
                    job=job,
                    checkpoint=checkpoint,
                    blob_directory=str(self.blobs.directory),
                    checkpoint_directory=str(self.blobs.directory),
                    resumed=0,
                ),
            )
            with anyio.fail_after(60):
                await self.jobs.ended.wait()


@pytest.mark.asyncio
async def test_a_worker_trains_its_lease_with_the_daemons_actors_numbers_its_events_and_ends(tmp_path):
    office = Office(tmp_path)
    await office.run(desks.growing_job())
    started, *_, ended = office.jobs.told
    assert isinstance(started, JobStarted)
    assert isinstance(ended, JobSucceeded)
    assert {message.generation for message in office.jobs.told} == {3}
    assert office.jobs.end.reason == "finished"
    files = {artifact.name: office.blobs.get(artifact.sha256) for artifact in ended.artifacts}
    here = desks.train(desks.growing_job(), office.blobs)
    assert files["model.safetensors"] == here.files["model.safetensors"]
    report = msgspec.json.decode(files["report.json"], type=Report)
    assert report.seeds == here.report.seeds
    assert set(office.cache.asked_by) == {"job-1"}
    # Batches carry generation and number, so that none is logged twice.
    assert [batch.key for batch in office.telemetry.batches] == [f"3-{n}" for n in range(1, len(office.telemetry.batches) + 1)]
    assert [body.epoch for body in office.telemetry.bodies() if isinstance(body, EpochCompleted)] == list(range(1, 10))


@pytest.mark.asyncio
async def test_a_worker_that_lost_its_lease_leaves_without_a_verdict_on_the_job(tmp_path):
    office = Office(tmp_path, stale=True)
    await office.run(desks.growing_job(checkpoint_every_s=0.0))
    assert [type(message) for message in office.jobs.told] == [JobStarted]
    assert office.jobs.end.status == EXIT_NO_FAULT


@pytest.mark.asyncio
async def test_a_store_that_fails_for_a_moment_fails_no_job(tmp_path):
    office = Office(tmp_path)
    for actor in (office.jobs, office.telemetry):
        actor.refusals = 2
    await office.run(desks.growing_job(budget={"epochs": 1}, growth={"enabled": False}, checkpoint_every_s=0.0))
    assert [type(message) for message in office.jobs.told] == [JobStarted, CheckpointWritten, JobSucceeded]
    assert [batch.key for batch in office.telemetry.batches] == [f"3-{n}" for n in range(1, len(office.telemetry.batches) + 1)]
    assert (office.jobs.end.reason, office.jobs.end.status) == ("finished", 0)
