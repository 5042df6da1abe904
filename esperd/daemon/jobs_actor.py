"""The jobs actor: admits jobs, leases them to trainer workers, and believes only what carries the lease's generation."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import anyio
import msgspec
import structlog

from esperd import tracing
from esperd.actors.actor import Actor, Context, handles
from esperd.actors.clock import Clock
from esperd.actors.spec import ProcessSpec
from esperd.config import Config
from esperd.daemon.admission import check_job
from esperd.daemon.announcer import Announcer
from esperd.daemon.artifacts import chunk
from esperd.daemon.cards import CardStatus
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.failure import analyse
from esperd.daemon.held import Held
from esperd.daemon.job_store import DONE_FOR_GOOD, Asked, JobStore, LeasedJob
from esperd.daemon.machine import Machine, measure, oom_kills
from esperd.daemon.placement import Need, need, never_fits
from esperd.daemon.placing import Placing
from esperd.daemon.resuming import Unread, last_good
from esperd.daemon.space import Space
from esperd.daemon.usage import Usage
from esperd.daemon.worker_processes import out_of_memory, worker_environment, worker_name
from esperd.errors import (
    Busy,
    Conflict,
    EsperError,
    IllegalTransition,
    JobNotFound,
    NeverFits,
    NothingToShow,
    OutOfMemory,
    StoreFailed,
)
from esperd.messages.base import Done
from esperd.messages.control import Terminated
from esperd.messages.failures import AnalyseFailure, FailureAnalysis, RetryJob
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    ArtifactChunk,
    ArtifactList,
    CancelJob,
    FetchArtifact,
    GetJob,
    Job,
    JobError,
    JobInfo,
    JobList,
    JobState,
    JobSubmitted,
    ListArtifacts,
    ListJobs,
    PauseJob,
    ResumeJob,
    SubmitJob,
)
from esperd.messages.leases import (
    EXIT_NO_FAULT,
    CheckpointWritten,
    DrainJobs,
    JobBroken,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
    LeaseJobs,
    LetGoOfFailed,
    ProveAlive,
    StopJob,
)
from esperd.plugins import Plugins
from esperd.store.blobs import Blobs
from esperd.telemetry.metrics import Metrics

POLL_S = 0.5
"""How often the queue is looked at for jobs whose retry time has come."""

FETCHES = 16
"""Pieces of artifacts that are read at the same time, each up to 4 MiB; chosen, not measured."""

ANNOUNCE_S = 2.0
"""How long an actor that ends waits for its last announcements to be logged; chosen, not measured."""


log = structlog.get_logger()


class JobsActor(Actor):
    """Admits, leases, and records.

    Args:
        store: the durable truth.
        blobs: artifacts.
        checkpoints: of unfinished jobs.
        config: limits and worker settings.
        plugins: for admission checks and observing hooks.
        metrics: fed with every change of state.
        start_worker: starts a process actor; returns once it is ready, raises when it is not.
        stop_workers: stops every trainer worker there is, whoever started it, and returns when they are gone.
        end_worker: ends the process of one, by name: it is sent SIGTERM, and killed soon after.
        clock: time.
        space: the room on the disk; None: there is always enough.
        machine: what it has; None: it is measured.
    """

    def __init__(
        self,
        *,
        store: JobStore,
        blobs: Blobs,
        checkpoints: Checkpoints,
        config: Config,
        plugins: Plugins,
        metrics: Metrics,
        start_worker: Callable[[ProcessSpec], Awaitable[None]],
        stop_workers: Callable[[], Awaitable[None]],
        end_worker: Callable[[str], Coroutine[Any, Any, None]],
        clock: Clock,
        space: Space | None = None,
        machine: Machine | None = None,
        draining: bool = False,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._checkpoints = checkpoints
        self._tidying = anyio.Lock()
        self.config = config
        """In force; may be replaced at any time."""
        self._plugins = plugins
        self._metrics = metrics
        self._start_worker = start_worker
        self._stop_workers = stop_workers
        self._end_worker = end_worker
        self._clock = clock
        self._space = space
        self._placing = Placing(machine or measure(), clock.monotonic)
        self._held: dict[str, Held] = {}
        self._traces: dict[str, str] = {}
        """Span that an unfinished job was submitted in. Not kept beyond this incarnation: a job found at its start has none."""
        self._draining = draining
        self._taken_back = False
        self._look_is_due = False
        self._context: Context | None = None
        self._announcer: Announcer | None = None
        self.trouble = ""
        """What the store refuses; empty while it works."""

    @property
    def context(self) -> Context:
        """The actor's view of the system; there from :meth:`on_start` on."""
        if self._context is None:
            raise RuntimeError("the jobs actor was used before it was started")
        return self._context

    async def on_start(self, context: Context) -> None:
        """Take back what a dead daemon, or a dead incarnation of this actor, had leased; then look at the queue.

        Workers of a dead incarnation end first: nobody knows any more what they were told, and two workers must not train
        one job.
        """
        self._context = context
        self._announcer = Announcer(context)
        context.start_soon(self._announcer.run)
        await self._stop_workers()
        with self._bearing_store_trouble():
            await self._take_back()
        context.start_soon(self._poll)

    async def on_stop(self) -> None:
        """Let the last changes of state reach the log."""
        if self._announcer is not None:
            with anyio.move_on_after(ANNOUNCE_S):
                await self._announcer.emptied()

    async def _poll(self) -> None:
        while True:
            self._look()
            self._end_overdue()
            await self._clock.sleep(POLL_S)

    def _look(self) -> None:
        """Have the queue looked at, after the mail that is there; once, however often it is asked for meanwhile."""
        if not self._look_is_due:
            self._look_is_due = True
            # Beside the handlers: one that waited for room in its own mailbox would wait for itself.
            self.context.start_soon(self.context.tell, self.context.name, LeaseJobs())

    @contextlib.contextmanager
    def _bearing_store_trouble(self) -> Iterator[None]:
        """For what nobody asked for and the next look does again: a store that fails is said, and ends nothing."""
        try:
            yield
        except StoreFailed as error:
            log.warning("the store fails; tried again soon", error=str(error))
            self.trouble = str(error)
        else:
            if self.trouble:
                log.info("the store works again")
            self.trouble = ""

    async def _take_back(self) -> None:
        if self._taken_back:
            return
        for info in await self._store.recover():
            self._announce(info)
        for info in await self._store.list(limit=-1):
            self._metrics.observe_job(info)
        await self._tidy(self._checkpoints.sweep, await self._store.kept_checkpoints())
        await self._tidy(self._blobs.remove_temporaries)
        self._taken_back = True

    async def _tidy(self, delete: Callable[..., object], *arguments: object) -> None:
        """Delete what nobody refers to any more. What cannot be deleted now is tried again later: at the next checkpoint of
        its job, or by the next daemon.
        """
        async with self._tidying:
            try:
                await anyio.to_thread.run_sync(delete, *arguments)
            except (StoreFailed, OSError) as error:
                log.warning("what is not needed any more could not be deleted", error=str(error))

    # --- clients ---------------------------------------------------------------------------------------------------------

    @handles(SubmitJob)
    async def submit(self, message: SubmitJob) -> JobSubmitted:
        """Admit a job; durable before it is answered."""
        if known := await self._store.submitted(message.job, message.idempotency_key):
            return JobSubmitted(id=known.id, duplicate=True)  # whatever has changed since, it was acknowledged
        if self._draining:
            raise Busy("the daemon is shutting down; submit again when it is back", retry_after_s=5.0)
        check_job(message.job, self._plugins)
        if lacking := never_fits(need(message.job), self._placing.room(self.config.resources)):
            raise NeverFits(f"the job can never run on this machine; {lacking}; lower it, or raise [resources] of the daemon")
        self._require_room()
        submitted = await self._store.submit(message.job, message.idempotency_key)
        if not submitted.duplicate:
            if traceparent := tracing.current():
                self._traces[submitted.info.id] = traceparent
            self._announce(submitted.info)
            self._look()
        return JobSubmitted(id=submitted.info.id, duplicate=submitted.duplicate)

    @handles(ListJobs)
    async def list_jobs(self, message: ListJobs) -> JobList:
        """All jobs, newest first."""
        return JobList(jobs=tuple(map(self._waiting, await self._store.list(message.limit))))

    @handles(GetJob)
    async def get_job(self, message: GetJob) -> JobInfo:
        """One job."""
        return self._waiting(await self._store.get(message.id))

    def _waiting(self, info: JobInfo) -> JobInfo:
        """A job with what it waits for, or the card it runs on."""
        if info.state is JobState.QUEUED:
            return msgspec.structs.replace(info, waits_for=self._placing.waits_for(info.id))
        held = self._held.get(worker_name(info.id, info.attempt))
        return info if held is None else msgspec.structs.replace(info, card=self._placing.told(held.need.card))

    @handles(PauseJob)
    async def pause(self, message: PauseJob) -> JobInfo:
        """Have a job checkpoint and wait."""
        return await self._asked(await self._store.pause(message.id))

    @handles(ResumeJob)
    async def resume(self, message: ResumeJob) -> JobInfo:
        """Queue a paused job again."""
        self._require_room()
        info = await self._asked(await self._store.resume(message.id))
        self._look()
        return info

    @handles(CancelJob)
    async def cancel(self, message: CancelJob) -> JobInfo:
        """Stop a job for good."""
        return await self._asked(await self._store.cancel(message.id))

    async def _asked(self, asked: Asked) -> JobInfo:
        if asked.tell_worker is not None:
            await self._stop_worker(worker_name(asked.info.id, asked.info.attempt), asked.tell_worker)
        elif asked.info.state not in (JobState.LEASED, JobState.RUNNING):
            self._announce(asked.info)
        return asked.info

    @handles(RetryJob)
    async def retry(self, message: RetryJob) -> JobInfo:
        """Queue a failed or dead job again."""
        self._require_room()
        info = await self._store.retry(message.id)
        self._announce(info)
        self._look()
        return info

    @handles(AnalyseFailure)
    async def analyse_failure(self, message: AnalyseFailure) -> FailureAnalysis:
        """Why a job failed."""
        return analyse(await self._store.get(message.id), await self._store.attempts(message.id))

    @handles(ListArtifacts)
    async def list_artifacts(self, message: ListArtifacts) -> ArtifactList:
        """What a job left in the store."""
        return ArtifactList(artifacts=await self._store.artifacts(message.id))

    @handles(FetchArtifact, concurrent=FETCHES)
    async def fetch_artifact(self, message: FetchArtifact) -> ArtifactChunk:
        """A piece of an artifact, verified as a whole before the first one. That may take long: no other mail waits for it."""
        for artifact in await self._store.artifacts(message.id):
            if artifact.name == message.name:
                return await anyio.to_thread.run_sync(chunk, self._blobs, message.id, artifact, message.offset)
        info = await self._store.get(message.id)
        raise NothingToShow(f"job {message.id} is {info.state} and has no {message.name}", id=message.id, state=info.state)

    # --- workers ---------------------------------------------------------------------------------------------------------

    @handles(LeaseJobs)
    async def lease_jobs(self, _message: LeaseJobs) -> None:
        """Note which workers are gone, then give queued jobs to workers, as many as may run."""
        self._look_is_due = False
        if self._space is not None and self._space.trouble:
            await self._rest()
        with self._bearing_store_trouble():
            await self._take_back()
            await self._let_go()
            await self._lease()

    def _require_room(self) -> None:
        """Raises: ReadOnly: while the disk has no room for new work."""
        if self._space is not None:
            self._space.require_room()

    async def _rest(self) -> None:
        """Have every worker checkpoint and stop; their jobs wait in the queue until there is room again."""
        for name, held in list(self._held.items()):
            if held.stop is None and not held.ended and held.gone is None:
                log.warning("a job waits for room on the disk", job=held.job_id)
                await self._stop_worker(name, StopJob(why="drain"))

    @property
    def _may_lease(self) -> bool:
        return not self._draining and not (self._space is not None and self._space.trouble)

    async def _lease(self) -> None:
        while self._may_lease and len(self._held) < self.config.jobs.max_running:
            leased = await self._store.lease(self._clock.wall(), {"configuration": _digest(self.config)}, self._lacking)
            if leased is None:
                if self._placing.look_is_due:
                    self.context.start_soon(self._look_at_cards)
                return
            name = worker_name(leased.info.id, leased.generation)
            self._held[name] = Held(leased.info.id, leased.generation, need=self._placing.wanted, oom_kills=oom_kills())
            self._announce(leased.info)
            self.context.start_soon(self._start_traced, name, leased)

    async def _start_traced(self, name: str, leased: LeasedJob) -> None:
        job = leased.info.id
        with tracing.span("jobs lease", parent=self._traces.get(job, ""), job=job, attempt=leased.generation):
            await self._start(name, leased)

    def _lacking(self, job_id: str, job: Job, expected: Usage) -> str:
        return self._placing.lacking(job_id, job, expected, self._set_aside(), self.config.resources)

    def _set_aside(self) -> list[Need]:
        return [held.need for held in self._held.values()]

    async def _look_at_cards(self) -> None:
        await self._placing.look(self._set_aside)
        self._look()

    def cards(self) -> tuple[CardStatus, ...]:
        """Every GPU, with the jobs on it."""
        return self._placing.cards({held.job_id: held.need for held in self._held.values()})

    async def _start(self, name: str, leased: LeasedJob) -> None:
        """Start a worker and hand it the lease. Runs beside the handlers: importing torch takes seconds."""
        job = leased.info.job
        spec = ProcessSpec(
            name=name,
            # -P: what lies in the folder that the daemon was started from is not part of the user's environment.
            command=[job.python or sys.executable, "-P", "-m", "esperd.trainer.worker"],
            environment=worker_environment(self.config, threads=job.threads, card=self._held[name].need.card),
            restart="temporary",
            grace_s=self.config.daemon.drain_timeout_s,
            start_timeout_s=self.config.workers.start_timeout_s,
            heartbeat_interval_s=self.config.workers.heartbeat_interval_s,
            heartbeat_timeout_s=self.config.workers.heartbeat_timeout_s,
            stall_timeout_s=self.config.workers.stall_timeout_s,
        )
        try:
            checkpoint = await last_good(self._store, self._checkpoints, leased)
        except Unread as error:
            self._held[name].unread = JobError(code=StoreFailed.code, message=str(error))
            return await self._could_not_start(name, str(error))
        except (StoreFailed, OSError) as error:  # the daemon's own trouble, and no fault of the job
            return await self._could_not_start(name, f"its checkpoint could not be looked up: {error}", EXIT_NO_FAULT)
        except EsperError as error:
            return await self._could_not_start(name, f"could not start: {error}")
        try:
            lease = Lease(
                job_id=leased.info.id,
                generation=leased.generation,
                job=job,
                checkpoint=checkpoint,
                blob_directory=str(self._blobs.directory),
                checkpoint_directory=str(self._checkpoints.of(leased.info.id).directory),
                resumed=leased.resumed,
                trace=tracing.current(),
                pieces=leased.info.pieces,
            )
            await self._start_worker(spec)
            await self.context.watch(name)
            await self.context.ask(name, lease)
            await self._handed(name)
        except EsperError as error:
            status = error.fields.get("status")
            await self._could_not_start(name, f"could not start: {error}", status if isinstance(status, int) else None)
        except OSError as error:  # whatever the machine refuses to one job must not end the others
            log.exception("a worker could not start", job=leased.info.id)
            await self._could_not_start(name, f"could not start: {error}", EXIT_NO_FAULT)

    async def _could_not_start(self, name: str, reason: str, status: int | None = None) -> None:
        """Where a worker died before it was watched, nobody else will say so; a second word about it changes nothing."""
        ended = Terminated(actor=name, generation=0, reason=reason, will_restart=False, status=status)
        await self.context.tell(self.context.name, ended)

    async def _handed(self, name: str) -> None:
        """The worker has its lease, and is told what was asked of it while it started."""
        held = self._held.get(name)
        if held is None:
            return
        held.handed = True
        if held.stop is not None:
            await self._stop_worker(name, held.stop)

    async def _stop_worker(self, name: str, stop: StopJob) -> None:
        """Have a worker stop, now or as soon as it has its lease."""
        held = self._held.get(name)
        if held is None or held.ended or held.gone is not None:
            return  # what was asked is recorded with the job, and done when its worker's end is
        held.stop = stop
        if held.handed:
            held.told_to_stop(self._clock.monotonic(), self.config.daemon.drain_timeout_s)
            await self.context.tell(name, stop)

    def _end_overdue(self) -> None:
        """End the processes of workers that should have left and are still there: a loop that hangs reads no message."""
        if self.trouble:
            return  # they may have stopped, and only cannot say so
        for name, held in self._held.items():
            if held.is_overdue(self._clock.monotonic()):
                held.was_ended = held.patience
                log.warning(
                    "a worker does not leave and is ended", worker=name, job=held.job_id, told=held.stop and held.stop.why
                )
                self.context.start_soon(self._end_worker, name)

    @handles(JobStarted)
    async def job_started(self, message: JobStarted) -> Done:
        """Model and data are loaded."""
        info = await self._store.started(message.job_id, message.generation, message.circumstances)
        self._announce(info)
        self._plugins.notify("esperd_job_started", job=info)
        return Done()

    @handles(CheckpointWritten)
    async def checkpoint_written(self, message: CheckpointWritten) -> Done:
        """A checkpoint is the one to resume from, as soon as this is answered."""
        held = self._checkpoints.of(message.job_id)
        if not await anyio.to_thread.run_sync(held.contains, message.sha256):
            # An older word, heard late, may have swept it away: what the row names must be there.
            raise StoreFailed(f"there is no checkpoint {message.sha256} of job {message.job_id}", sha256=message.sha256)
        info = await self._store.checkpoint(message.job_id, message.generation, message.sha256, message.epoch)
        # Before the answer: its worker writes no other one until then.
        await self._tidy(self._checkpoints.keep_only, message.job_id, info.checkpoint, info.previous_checkpoint)
        return Done()

    @handles(JobSucceeded)
    async def job_succeeded(self, message: JobSucceeded) -> Done:
        """Report and model are in the store."""
        info = await self._store.succeeded(message.job_id, message.generation, message.epoch, message.artifacts, message.peak)
        return self._ended(info)

    @handles(JobStopped)
    async def job_stopped(self, message: JobStopped) -> Done:
        """The worker stopped as it was asked to."""
        return self._ended(await self._store.stopped(message.job_id, message.generation, message.why, message.peak))

    @handles(JobBroken)
    async def job_broken(self, message: JobBroken) -> Done:
        """The job cannot succeed; where memory ran out, it may with less."""
        ends = self._store.out_of_memory if message.error.code == OutOfMemory.code else self._store.broken
        return self._ended(await ends(message.job_id, message.generation, message.error, message.peak))

    def _ended(self, info: JobInfo) -> Done:
        held = self._held.get(worker_name(info.id, info.attempt))
        if held is not None:
            held.reported(self._clock.monotonic(), self.config.daemon.drain_timeout_s)
        self._announce(info)
        return Done()

    @handles(Terminated)
    async def worker_terminated(self, message: Terminated) -> None:
        """A worker is gone. If it had not reported an end, its job is lost to it and waits for the next attempt."""
        held = self._held.get(message.actor)
        if held is not None:
            held.gone = held.gone or message
            self._look()

    async def _let_go(self) -> None:
        """Record the end of every worker that is gone. One that cannot be recorded now is still there at the next look."""
        for name, held in list(self._held.items()):
            if held.gone is None:
                continue
            if not held.ended:
                try:
                    self._announce(await self._record_end(held, held.gone))
                except (Conflict, IllegalTransition, JobNotFound) as error:
                    log.warning("a worker ended after its lease", worker=name, error=str(error))
            self._placing.freed(held.need)
            del self._held[name]

    async def _record_end(self, held: Held, gone: Terminated) -> JobInfo:
        """What becomes of a job whose worker ended without a word about it."""
        if held.stop is not None and (disobedience := held.disobedience):
            return await self._store.stopped(held.job_id, held.generation, held.stop.why, disobedience=disobedience)
        if self._draining:  # it ended with the daemon
            return await self._store.stopped(held.job_id, held.generation, "drain")
        if held.unread is not None:
            return await self._store.checkpoints_unread(held.job_id, held.generation, held.unread)
        if gone.status == EXIT_NO_FAULT:
            log.warning("worker left", job=held.job_id, reason=gone.reason)
            return await self._store.worker_left(held.job_id, held.generation)
        if reason := out_of_memory(gone, held.oom_kills):
            log.warning("out of memory", job=held.job_id, reason=reason)
            error = JobError(code=OutOfMemory.code, message=reason)
            return await self._store.out_of_memory(held.job_id, held.generation, error)
        info = await self._store.worker_lost(held.job_id, held.generation, gone.reason)
        log.warning("worker lost", job=held.job_id, reason=gone.reason, state=str(info.state))
        return info

    @handles(LetGoOfFailed)
    async def let_go_of_failed(self, message: LetGoOfFailed) -> Done:
        """Delete the checkpoints of jobs that failed long ago. Here, where a retry cannot come between."""
        forgotten = await self._store.let_go_of_failed(message.before)
        for job_id in forgotten:
            await self._tidy(self._checkpoints.forget, job_id)
        if forgotten:
            log.info("checkpoints of failed jobs are no longer kept", jobs=forgotten)
        return Done()

    @handles(DrainJobs)
    async def drain(self, _message: DrainJobs) -> Done:
        """Admit and lease nothing more; every worker checkpoints and stops."""
        self._draining = True
        for name in list(self._held):
            await self._stop_worker(name, StopJob(why="drain"))
        return Done()

    @handles(ProveAlive)
    async def prove_alive(self, _message: ProveAlive) -> Done:
        """Mail is read, and the store writes."""
        await self._store.prove()
        return Done()

    @property
    def running(self) -> int:
        """Workers that hold a lease, starting ones included."""
        return len(self._held)

    def _announce(self, info: JobInfo) -> None:
        """Tell everybody who watches that a job changed its state."""
        self._metrics.observe_job(info)
        if info.state in FINAL_JOB_STATES:
            self._traces.pop(info.id, None)
            self._plugins.notify("esperd_job_finished", job=info)
        if info.state in DONE_FOR_GOOD:
            self.context.start_soon(self._tidy, self._checkpoints.forget, info.id)
        if self._announcer is not None:
            self._announcer.announce(info)


def _digest(config: Config) -> str:
    """Twelve digits that change with the configuration; it may hold what should not stand in a record."""
    return hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest()[:12]
