"""The jobs actor: admits jobs, leases them to trainer workers, and believes only what carries the lease's generation."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import anyio
import msgspec
import structlog

from esperd.actors.actor import Actor, Context, handles
from esperd.actors.clock import Clock
from esperd.actors.spec import ProcessSpec
from esperd.config import Config
from esperd.daemon.admission import check_job
from esperd.daemon.job_store import Asked, JobStore, LeasedJob
from esperd.errors import Busy, EsperError, NothingToShow
from esperd.messages.base import Done
from esperd.messages.control import Terminated
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    ArtifactChunk,
    ArtifactList,
    CancelJob,
    CheckpointWritten,
    DrainJobs,
    FetchArtifact,
    GetJob,
    JobBroken,
    JobInfo,
    JobList,
    JobStarted,
    JobState,
    JobStopped,
    JobSubmitted,
    JobSucceeded,
    Lease,
    LeaseJobs,
    ListArtifacts,
    ListJobs,
    PauseJob,
    ResumeJob,
    StopJob,
    SubmitJob,
)
from esperd.messages.telemetry import JobStateChanged, NewEvent, Record
from esperd.plugins import Plugins
from esperd.store.blobs import Blobs
from esperd.telemetry.metrics import Metrics

POLL_S = 0.5
"""How often the queue is looked at for jobs whose retry time has come."""

CHUNK_BYTES = 4 * 1024 * 1024

log = structlog.get_logger()


@dataclass
class Held:
    """A lease that a worker holds."""

    job_id: str
    generation: int
    handed: bool = False
    """True once the worker has the lease; before, it understands nothing."""
    stop: StopJob | None = None
    """What it must be told as soon as it has the lease."""
    ended: bool = False
    """True once the worker reported the end: its exit is then no loss."""


class JobsActor(Actor):
    """Admits, leases, and records.

    Args:
        store: the durable truth.
        blobs: checkpoints and artifacts.
        config: limits and worker settings.
        plugins: for admission checks and observing hooks.
        metrics: fed with every change of state.
        start_worker: starts a process actor; returns once it is ready, raises when it is not.
        clock: time.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        blobs: Blobs,
        config: Config,
        plugins: Plugins,
        metrics: Metrics,
        start_worker: Callable[[ProcessSpec], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._config = config
        self._plugins = plugins
        self._metrics = metrics
        self._start_worker = start_worker
        self._clock = clock
        self._held: dict[str, Held] = {}
        self._draining = False
        self._context: Context | None = None

    @property
    def context(self) -> Context:
        """The actor's view of the system; there from :meth:`on_start` on."""
        if self._context is None:
            raise RuntimeError("the jobs actor was used before it was started")
        return self._context

    async def on_start(self, context: Context) -> None:
        """Take back what a dead daemon, or a dead incarnation of this actor, had leased; then look at the queue."""
        self._context = context
        for info in await self._store.recover():
            await self._announce(info)
        for info in await self._store.list(limit=1_000_000):
            self._metrics.observe_job(info)
        context.start_soon(self._poll)

    async def _poll(self) -> None:
        while True:
            await self.context.tell(self.context.name, LeaseJobs())
            await self._clock.sleep(POLL_S)

    # --- clients ---------------------------------------------------------------------------------------------------------

    @handles(SubmitJob)
    async def submit(self, message: SubmitJob) -> JobSubmitted:
        """Admit a job; durable before it is answered."""
        if self._draining:
            raise Busy("the daemon is shutting down; submit again when it is back", retry_after_s=5.0)
        check_job(message.job, self._plugins)
        submitted = await self._store.submit(message.job, message.idempotency_key)
        if not submitted.duplicate:
            await self._announce(submitted.info)
            await self.context.tell(self.context.name, LeaseJobs())
        return JobSubmitted(id=submitted.info.id, duplicate=submitted.duplicate)

    @handles(ListJobs)
    async def list_jobs(self, message: ListJobs) -> JobList:
        """All jobs, newest first."""
        return JobList(jobs=await self._store.list(message.limit))

    @handles(GetJob)
    async def get_job(self, message: GetJob) -> JobInfo:
        """One job."""
        return await self._store.get(message.id)

    @handles(PauseJob)
    async def pause(self, message: PauseJob) -> JobInfo:
        """Have a job checkpoint and wait."""
        return await self._asked(await self._store.pause(message.id))

    @handles(ResumeJob)
    async def resume(self, message: ResumeJob) -> JobInfo:
        """Queue a paused job again."""
        info = await self._asked(await self._store.resume(message.id))
        await self.context.tell(self.context.name, LeaseJobs())
        return info

    @handles(CancelJob)
    async def cancel(self, message: CancelJob) -> JobInfo:
        """Stop a job for good."""
        return await self._asked(await self._store.cancel(message.id))

    async def _asked(self, asked: Asked) -> JobInfo:
        if asked.tell_worker is not None:
            await self._stop_worker(self._worker_of(asked.info.id), asked.tell_worker)
        elif asked.info.state not in (JobState.LEASED, JobState.RUNNING):
            await self._announce(asked.info)
        return asked.info

    @handles(ListArtifacts)
    async def list_artifacts(self, message: ListArtifacts) -> ArtifactList:
        """What a job left in the store."""
        return ArtifactList(artifacts=await self._store.artifacts(message.id))

    @handles(FetchArtifact)
    async def fetch_artifact(self, message: FetchArtifact) -> ArtifactChunk:
        """A piece of an artifact."""
        for artifact in await self._store.artifacts(message.id):
            if artifact.name == message.name:
                data = await anyio.to_thread.run_sync(self._blobs.read_range, artifact.sha256, message.offset, CHUNK_BYTES)
                return ArtifactChunk(offset=message.offset, data=data, size_bytes=artifact.size_bytes)
        info = await self._store.get(message.id)
        raise NothingToShow(f"job {message.id} is {info.state} and has no {message.name}", id=message.id, state=info.state)

    # --- workers ---------------------------------------------------------------------------------------------------------

    @handles(LeaseJobs)
    async def lease_jobs(self, _message: LeaseJobs) -> None:
        """Give queued jobs to workers, as many as may run."""
        while not self._draining and len(self._held) < self._config.jobs.max_running:
            leased = await self._store.lease(self._clock.wall())
            if leased is None:
                return
            name = worker_name(leased.info.id, leased.generation)
            self._held[name] = Held(leased.info.id, leased.generation)
            await self._announce(leased.info)
            self.context.start_soon(self._start, name, leased)

    async def _start(self, name: str, leased: LeasedJob) -> None:
        """Start a worker and hand it the lease. Runs beside the handlers: importing torch takes seconds."""
        job = leased.info.job
        spec = ProcessSpec(
            name=name,
            # -P: what lies in the folder that the daemon was started from is not part of the user's environment.
            command=[job.python or sys.executable, "-P", "-m", "esperd.trainer.worker"],
            environment=worker_environment(self._config, threads=job.threads),
            restart="temporary",
            grace_s=self._config.daemon.drain_timeout_s,
            start_timeout_s=self._config.workers.start_timeout_s,
            heartbeat_interval_s=self._config.workers.heartbeat_interval_s,
            heartbeat_timeout_s=self._config.workers.heartbeat_timeout_s,
        )
        lease = Lease(
            job_id=leased.info.id,
            generation=leased.generation,
            job=job,
            checkpoint=leased.info.checkpoint,
            blob_directory=str(self._blobs.directory),
            resumed=leased.resumed,
        )
        try:
            await self._start_worker(spec)
            await self.context.watch(name)
            await self.context.ask(name, lease)
            await self._handed(name)
        except EsperError as error:
            # Where the worker died before it was watched, nobody else will say so; a second word about it changes nothing.
            ended = Terminated(actor=name, generation=0, reason=f"could not start: {error}", will_restart=False)
            await self.context.tell(self.context.name, ended)

    async def _handed(self, name: str) -> None:
        """The worker has its lease, and is told what was asked of it while it started."""
        held = self._held.get(name)
        if held is None:
            return
        held.handed = True
        if held.stop is not None:
            await self.context.tell(name, held.stop)

    async def _stop_worker(self, name: str, stop: StopJob) -> None:
        """Have a worker stop, now or as soon as it has its lease."""
        held = self._held[name]
        if held.ended:
            return
        held.stop = stop
        if held.handed:
            await self.context.tell(name, stop)

    @handles(JobStarted)
    async def job_started(self, message: JobStarted) -> Done:
        """Model and data are loaded."""
        info = await self._store.started(message.job_id, message.generation)
        await self._announce(info)
        self._plugins.notify("esperd_job_started", job=info)
        return Done()

    @handles(CheckpointWritten)
    async def checkpoint_written(self, message: CheckpointWritten) -> Done:
        """A checkpoint is the one to resume from, as soon as this is answered."""
        await self._store.checkpoint(message.job_id, message.generation, message.sha256, message.epoch)
        return Done()

    @handles(JobSucceeded)
    async def job_succeeded(self, message: JobSucceeded) -> Done:
        """Report and model are in the store."""
        info = await self._store.succeeded(message.job_id, message.generation, message.epoch, message.artifacts)
        return await self._ended(info)

    @handles(JobStopped)
    async def job_stopped(self, message: JobStopped) -> Done:
        """The worker stopped as it was asked to."""
        return await self._ended(await self._store.stopped(message.job_id, message.generation, message.why))

    @handles(JobBroken)
    async def job_broken(self, message: JobBroken) -> Done:
        """The job cannot succeed."""
        return await self._ended(await self._store.broken(message.job_id, message.generation, message.error))

    async def _ended(self, info: JobInfo) -> Done:
        self._held[self._worker_of(info.id)].ended = True
        await self._announce(info)
        return Done()

    @handles(Terminated)
    async def worker_terminated(self, message: Terminated) -> None:
        """A worker is gone. If it had not reported an end, its job is lost to it and waits for the next attempt."""
        held = self._held.pop(message.actor, None)
        if held is None:
            return
        if not held.ended and self._draining:  # ended with the daemon, through no fault of the job
            await self._announce(await self._store.stopped(held.job_id, held.generation, "drain"))
        elif not held.ended:
            info = await self._store.worker_lost(held.job_id, held.generation, message.reason)
            log.warning("worker lost", job=held.job_id, reason=message.reason, state=str(info.state))
            await self._announce(info)
        await self.context.tell(self.context.name, LeaseJobs())

    @handles(DrainJobs)
    async def drain(self, _message: DrainJobs) -> Done:
        """Admit and lease nothing more; every worker checkpoints and stops."""
        self._draining = True
        for name in self._held:
            await self._stop_worker(name, StopJob(why="drain"))
        return Done()

    def _worker_of(self, job_id: str) -> str:
        """Address of the worker that holds a job's lease."""
        return next(name for name, held in self._held.items() if held.job_id == job_id)

    @property
    def running(self) -> int:
        """Workers that hold a lease, starting ones included."""
        return len(self._held)

    async def _announce(self, info: JobInfo) -> None:
        """Tell everybody who watches that a job changed its state."""
        self._metrics.observe_job(info)
        if info.state in FINAL_JOB_STATES:
            self._plugins.notify("esperd_job_finished", job=info)
        body = JobStateChanged(state=info.state, attempt=info.attempt, error=info.error)
        event = NewEvent(at=self._clock.wall(), body=body)
        key = f"state:{info.attempt}:{info.state}:{time.time_ns()}"
        await self.context.tell("telemetry", Record(job=info.id, key=key, events=(event,)))


def worker_name(job_id: str, generation: int) -> str:
    """Address of the trainer worker that holds this lease; no two leases share one."""
    return f"trainer/{job_id}.{generation}"


def worker_environment(config: Config, *, threads: int) -> dict[str, str]:
    """Variables of a process that imports torch.

    Thread counts must be set before the import: ``torch.set_num_threads`` in one thread does not bind the OpenMP pool of
    another. Plugins that the daemon blocks are blocked in its processes too.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "ESPERD__DAEMON__LOG_LEVEL": config.daemon.log_level,
        "ESPERD__PLUGINS__BLOCKED": msgspec.json.encode(config.plugins.blocked).decode(),
    }


def blob_directory(state_directory: Path) -> Path:
    """Where a daemon keeps checkpoints, artifacts and kernels."""
    return state_directory / "blobs"
