"""The daemon process: what it opens, in which order, how it waits, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass

import anyio
import anyio.to_thread
import structlog

import esperd
from esperd import tracing
from esperd.actors.breaker import Breaker, Limits
from esperd.actors.clock import SystemClock
from esperd.actors.limits import Turnstile
from esperd.actors.publication import Publisher
from esperd.actors.requests import RequestServer, counted_together
from esperd.actors.spec import ChildSpec, ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.actors.tasks import open_task_group
from esperd.cache.actor import COMPILER_TROUBLE, CacheActor
from esperd.cache.index import KernelIndex
from esperd.cache.seal import Seal
from esperd.config import Config, endpoint
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.collecting import Collector
from esperd.daemon.directories import blob_directory, checkpoint_directory
from esperd.daemon.finished_jobs import FinishedJobs
from esperd.daemon.front_door import FrontDoor
from esperd.daemon.http import bind, build_app, serving
from esperd.daemon.job_store import JobStore
from esperd.daemon.jobs_actor import JobsActor
from esperd.daemon.lock import locked, prepare_runtime_directory, prepare_state_directory
from esperd.daemon.machine import Machine, measure
from esperd.daemon.notify import Notifier, Standing
from esperd.daemon.remote import RemoteDoor, client_limits
from esperd.daemon.retention import Retention
from esperd.daemon.service import SIGNALS, Service
from esperd.daemon.space import Level, Space
from esperd.daemon.startable import SOCKETS, require_startable
from esperd.daemon.state import open_databases
from esperd.daemon.status import DaemonStatus, status_of
from esperd.daemon.steady_time import SteadyTime
from esperd.daemon.worker_processes import WORKERS, worker_environment
from esperd.errors import ActorUnavailable, EsperError, StoreFailed
from esperd.logs import configure_logging
from esperd.messages.control import ActorState, ActorStatus
from esperd.messages.jobs import JobState
from esperd.messages.leases import (
    DrainJobs,
    LetGoOfFailed,
)
from esperd.plugins import load_plugins
from esperd.policy.actor import PolicyActor
from esperd.store.blobs import Blobs
from esperd.store.database import Database
from esperd.telemetry.actor import TelemetryActor
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics

COUNT_TIMEOUT_S = 1.0
"""How long the status line waits for the number of queued jobs; chosen, not measured."""

TICK_S = 1.0
"""How often the loop's lag is measured and the actors' figures are read."""

SPACE_LOOK_S = 1.0
"""How often the disk is asked how much room there is; chosen, not measured."""

PROVE_TIMEOUT_S = 5.0
"""How long a look waits for a database on a disk that failed; chosen, not measured."""

DRAIN_AGAIN_S = 0.1
"""Between two tries to tell the jobs actor to drain; chosen, not measured."""

HTTP_PORT_FILE = "http.port"

OURS_ALONE = 0o077
"""The umask of the daemon and its workers: databases, sockets, checkpoints and exports are for this user only."""

log = structlog.get_logger()


@dataclass
class Status:
    """What readiness depends on."""

    starting: bool = True
    draining: bool = False
    system: ActorSystem | None = None
    jobs: JobsActor | None = None
    space: Space | None = None
    remote: RemoteDoor | None = None

    def not_ready(self) -> list[str]:
        """Reasons why the daemon takes no work now."""
        reasons = ["starting"] if self.starting else []
        if self.draining:
            reasons.append("draining")
        if self.space is not None and self.space.trouble:
            reasons.append(self.space.trouble)
        if self.jobs is not None and self.jobs.trouble:
            reasons.append(f"store: {self.jobs.trouble}")
        if self.remote is not None and self.remote.trouble:
            reasons.append(self.remote.trouble)
        if self.system is not None:
            waited_for = {ActorState.FAILED, ActorState.WAITING, ActorState.STARTING}
            reasons += [
                f"actor {actor.name} is {actor.state}"
                for actor in self.system.status()
                if actor.state in waited_for and not actor.name.startswith(WORKERS)
            ]
        return reasons


def run_daemon(config: Config, read_again: Callable[[], Config] | None = None) -> int:
    """Run until a signal ends it.

    Args:
        config: the whole configuration.
        read_again: reads it again at SIGHUP, and raises :class:`ConfigError`; None: it does not change.

    Returns:
        0 after a drain, 1 after a second signal cut the drain short.

    Raises:
        StateDirectoryLocked: a live daemon owns the state or the runtime directory.
        StateDirectoryUnusable: a directory cannot be written, belongs to somebody else, or would let others at the sockets.
        StoreFailed: the disk refuses, or a database cannot be opened.
        ConfigError: see :func:`require_startable`; or an address cannot be listened on.
        AddressUnavailable: an address cannot be listened on now: it is taken, or not up yet.
    """
    configure_logging(config.daemon.log_level)
    faulthandler.enable()  # a watchdog that was not fed sends SIGABRT: the log then holds where every thread was
    os.umask(OURS_ALONE)
    open_as_many_files_as_allowed()
    with contextlib.closing(Notifier.from_environment(os.environ, os.getpid())) as notifier:
        try:
            require_startable(config)
            prepare_state_directory(config.state_directory)
            prepare_runtime_directory(config.runtime_directory)
            with (
                locked(config.state_directory, config.runtime_directory),
                tracing.exporting(config.telemetry.otlp_endpoint, "esperd"),
                asyncio.Runner(loop_factory=_loop_factory()) as runner,
            ):
                return runner.run(_Daemon(config, notifier, read_again or (lambda: config)).run())
        except EsperError as error:
            notifier.send(STATUS=f"failed: {error}")
            raise


def open_as_many_files_as_allowed() -> None:
    """Every client holds a descriptor, and libzmq aborts the process when it gets none for the next one (seen with 1,000 clients
    under a soft limit of 256; systemd's is 1,024). The hard limit is what an administrator set.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop's event loop where it is installed (it is a dependency wherever it exists)."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


@dataclass(frozen=True)
class _Parts:
    """What actors are made of."""

    jobs: JobStore
    index: KernelIndex
    decisions: Database
    log: EventLog
    publisher: Publisher
    blobs: Blobs
    seal: Seal
    space: Space
    databases: Collection[Database]
    machine: Machine
    collector: Collector
    retention: Retention


class _Daemon:
    def __init__(self, config: Config, notifier: Notifier, read_again: Callable[[], Config]) -> None:
        self._config = config
        self._clock = SystemClock()
        self._plugins = load_plugins(config.plugins.blocked)
        self._metrics = Metrics()
        self._status = Status()
        self._jobs: JobsActor | None = None
        self._remote = self._status.remote = RemoteDoor(config, self._metrics, self._clock)
        limits = config.breakers.compiler
        self._compiler_breaker = Breaker(
            "compiler",
            Limits(failures=limits.failures, reset_s=limits.reset_s),
            self._clock.monotonic,
            COMPILER_TROUBLE,
            lambda found: log.warning("a circuit breaker changed", service=found.service, state=str(found.state)),
        )
        self._store: JobStore | None = None
        self._service = Service(
            notifier,
            self._clock,
            self._standing,
            read_again=read_again,
            in_force=lambda: self._config,
            apply=self._apply,
            is_full=lambda: self._status.space is not None and self._status.space.level is Level.FULL,
        )

    async def run(self) -> int:
        # Signals are ours until the very end: a third one must not kill a daemon that still has workers to stop.
        with (
            anyio.open_signal_receiver(*SIGNALS) as signals,
            contextlib.closing(bind(self._config.http)) as listening,
        ):
            async with open_task_group() as tasks:
                tasks.start_soon(self._service.tell)
                result = await self._serve(listening, aiter(signals))
                tasks.cancel_scope.cancel()
        log.info("stopped", drained=result == 0)
        return result

    async def _standing(self) -> Standing:
        """What the service manager is told."""
        queued = None
        if self._store is not None:
            with contextlib.suppress(StoreFailed), anyio.move_on_after(COUNT_TIMEOUT_S):
                queued = await self._store.count(JobState.QUEUED)
        return Standing(self._status.not_ready(), self._jobs.running if self._jobs is not None else 0, queued)

    def _apply(self, config: Config) -> None:
        """Put a configuration in force that differs in live keys only (:data:`esperd.daemon.reload.LIVE`)."""
        self._config = config
        configure_logging(config.daemon.log_level)
        if self._store is not None:
            self._store.limits = config.jobs
        if self._jobs is not None:
            self._jobs.config = config

    async def _serve(self, listening: socket.socket, signals: AsyncIterator[signal.Signals]) -> int:
        config = self._config
        control, workers, events = (endpoint(config.runtime_directory, name) for name in SOCKETS)
        self._report_plugins()
        async with contextlib.AsyncExitStack() as stack:
            publisher = await stack.enter_async_context(Publisher(events))
            await stack.enter_async_context(self._remote.publishing())
            parts = await self._open_parts(stack, publisher)
            system = await stack.enter_async_context(
                ActorSystem(workers_endpoint=workers, clock=self._clock, observer=self._metrics)
            )
            self._status.system = system
            for spec in self._specs(parts, system):
                await system.start(spec, wait=isinstance(spec, ChildSpec))
            door = FrontDoor(system, self._plugins, events, [self._compiler_breaker], config)
            server = RequestServer(control, door.answer, turnstile=Turnstile(client_limits(config)))
            servers = [server]
            began = self._clock.monotonic()

            def status() -> DaemonStatus:
                return status_of(
                    self._metrics,
                    door.actors(),
                    reasons=self._status.not_ready(),
                    disk=parts.space.level,
                    up_s=self._clock.monotonic() - began,
                    requests=counted_together(servers),
                    cards=self._jobs.cards() if self._jobs is not None else (),
                )

            app = build_app(self._metrics, self._status.not_ready, status)
            port = await stack.enter_async_context(serving(listening, app))
            (config.runtime_directory / HTTP_PORT_FILE).write_text(f"{port}\n", encoding="ascii")
            await stack.enter_async_context(server)
            if (remote := await stack.enter_async_context(self._remote.answering(door.answer_remote))) is not None:
                servers.append(remote)
            self._status.starting = False
            await self._service.ready()
            log.info("ready", version=esperd.__version__, pid=os.getpid(), control=control, http=port)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tick, door, servers)
                tasks.start_soon(self._service.obey, signals, system)
                tasks.start_soon(self._service.feed, system)
                tasks.start_soon(parts.retention.run, self._clock.sleep)
                tasks.start_soon(self._watch_space, parts.space, parts.databases)
                tasks.start_soon(parts.collector.run, self._config.storage.collect_every_s, self._clock.sleep)
                tasks.start_soon(self._let_go_of_failed, system)
                drained = await self._until_drained(system)
                tasks.cancel_scope.cancel()
            if not drained:
                await _stop_at_once(system, lambda actor: actor.pid not in (None, os.getpid()))
        return 0 if drained else 1

    async def _open_parts(self, stack: contextlib.AsyncExitStack, publisher: Publisher) -> _Parts:
        """Open databases and blobs, once it is known how much room there is for them."""
        state = self._config.state_directory
        space = Space(state, self._config.storage)
        await anyio.to_thread.run_sync(space.look)
        self._status.space = space
        databases = await open_databases(stack, state, space.refused)
        for name, database in databases.items():
            database.on_commit = functools.partial(self._metrics.observe_commit, name)
        blobs = Blobs(blob_directory(state), on_refused=space.refused)
        self._store = JobStore(databases["jobs"], self._clock.wall, self._config.jobs)
        log_of_events = EventLog(databases["events"])
        return _Parts(
            jobs=self._store,
            index=KernelIndex(databases["kernels"]),
            decisions=databases["decisions"],
            log=log_of_events,
            publisher=publisher,
            blobs=blobs,
            seal=Seal.open(state / "seal.key"),
            retention=Retention(
                FinishedJobs(databases["jobs"]),
                log_of_events,
                Checkpoints(checkpoint_directory(state)),
                self._metrics,
                lambda: self._config.retention,
                self._clock.wall,
                SteadyTime(self._clock.wall, self._clock.monotonic),
            ),
            space=space,
            databases=databases.values(),
            machine=await anyio.to_thread.run_sync(measure),  # asks the GPU's driver, which may take its time
            collector=Collector(
                blobs,
                databases["jobs"],
                databases["kernels"],
                grace_s=self._config.storage.collect_every_s,
                monotonic=self._clock.monotonic,
            ),
        )

    def _specs(self, parts: _Parts, system: ActorSystem) -> list[ChildSpec | ProcessSpec]:
        """Every actor, in order of dependence: who is spoken to starts before who speaks."""
        config = self._config
        publish = self._publish_to(parts.publisher)
        return [
            ChildSpec("telemetry", lambda: TelemetryActor(parts.log, publish, self._metrics, self._plugins)),
            ChildSpec("policy", lambda: PolicyActor(parts.decisions, self._plugins)),
            ProcessSpec(
                name="compiler",
                command=[sys.executable, "-P", "-m", "esperd.compiler"],
                environment=worker_environment(config, threads=1),
                nice=config.compiler.nice,
                start_timeout_s=config.workers.start_timeout_s,
                heartbeat_interval_s=config.workers.heartbeat_interval_s,
                heartbeat_timeout_s=config.workers.heartbeat_timeout_s,
            ),
            ChildSpec(
                "cache",
                lambda: CacheActor(
                    parts.index,
                    parts.blobs,
                    parts.seal,
                    memory_bytes=config.cache.memory_bytes,
                    compile_timeout_s=config.compiler.timeout_s,
                    breaker=self._compiler_breaker,
                    compiled=self._metrics.observe_compilation,
                ),
            ),
            ChildSpec("jobs", lambda: self._make_jobs(parts, system)),
        ]

    def _publish_to(self, publisher: Publisher) -> Callable[[str, bytes], Awaitable[None]]:
        """To watchers of this user, and to those on the network."""

        async def publish(topic: str, payload: bytes) -> None:
            await publisher.publish(topic, payload)
            await self._remote.publish(topic, payload)

        return publish

    def _make_jobs(self, parts: _Parts, system: ActorSystem) -> JobsActor:
        self._jobs = JobsActor(
            store=parts.jobs,
            blobs=parts.blobs,
            checkpoints=Checkpoints(checkpoint_directory(self._config.state_directory)),
            config=self._config,
            plugins=self._plugins,
            metrics=self._metrics,
            start_worker=system.start,
            stop_workers=lambda: _stop_at_once(system, lambda actor: actor.name.startswith(WORKERS)),
            end_worker=lambda name: _stop_at_once(system, lambda actor: actor.name == name),
            clock=self._clock,
            space=parts.space,
            machine=parts.machine,
            draining=self._status.draining,
        )
        self._status.jobs = self._jobs
        return self._jobs

    def _report_plugins(self) -> None:
        for record in self._plugins.records():
            if record.error is not None:
                log.warning("plugin failed", plugin=record.name, distribution=record.distribution, error=record.error)

    async def _tick(self, door: FrontDoor, servers: Collection[RequestServer]) -> None:
        """Feed the metrics that nobody else sees."""
        while True:
            before = self._clock.monotonic()
            await self._clock.sleep(TICK_S)
            self._metrics.observe_loop_lag(max(0.0, self._clock.monotonic() - before - TICK_S))
            self._metrics.observe_actors(door.actors())
            self._metrics.observe_requests(counted_together(servers))

    async def _watch_space(self, space: Space, databases: Collection[Database]) -> None:
        """Look at the disk again and again. One that failed must also take what databases write: they tell when it does not."""
        while True:
            await self._clock.sleep(SPACE_LOOK_S)
            if space.level is Level.FAILING:
                for database in databases:
                    with contextlib.suppress(StoreFailed), anyio.move_on_after(PROVE_TIMEOUT_S):
                        await database.prove()
            await anyio.to_thread.run_sync(space.look)
            self._metrics.observe_space(space.free_bytes, read_only=bool(space.trouble))

    async def _let_go_of_failed(self, system: ActorSystem) -> None:
        """Have the checkpoints of jobs that failed long ago deleted, by the actor that would retry them."""
        storage, steady = self._config.storage, SteadyTime(self._clock.wall, self._clock.monotonic)
        while True:
            if steady.holds():
                try:
                    await system.ask("jobs", LetGoOfFailed(before=self._clock.wall() - storage.keep_failed_s))
                except EsperError as error:  # the next look tries again
                    log.warning("checkpoints of failed jobs could not be let go of", error=str(error))
            await self._clock.sleep(storage.collect_every_s)

    async def _until_drained(self, system: ActorSystem) -> bool:
        """Wait for SIGTERM or SIGINT, drain; False when a second one, or the drain's timeout, cut it short."""
        first = await self._service.stops.get()
        log.info("draining", signal=first.name, timeout_s=self._config.daemon.drain_timeout_s)
        self._status.draining = True
        await self._service.stopping()
        with anyio.move_on_after(self._config.daemon.drain_timeout_s):
            async with anyio.create_task_group() as tasks:

                async def give_up() -> None:
                    second = await self._service.stops.get()
                    log.warning("stopping now", signal=second.name)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(give_up)
                await self._ask_to_drain(system)
                await self._until_idle()
                tasks.cancel_scope.cancel()
                return True
        return False

    async def _ask_to_drain(self, system: ActorSystem) -> None:
        """Until it is done: the jobs actor may be between two incarnations."""
        while True:
            try:
                await system.ask("jobs", DrainJobs())
            except EsperError as error:
                log.warning("the jobs actor does not drain", error=str(error))
                await self._clock.sleep(DRAIN_AGAIN_S)
            else:
                return

    async def _until_idle(self) -> None:
        """Return once no worker holds a lease."""
        while self._jobs is not None and self._jobs.running:
            await self._clock.sleep(0.02)


async def _stop_at_once(system: ActorSystem, whom: Callable[[ActorStatus], bool]) -> None:
    """End these actors now, without the grace they would have to checkpoint; what they were at is resumed or done again."""

    async def stop(name: str) -> None:
        with contextlib.suppress(ActorUnavailable):  # it ended by itself meanwhile
            await system.stop(name, grace_s=0.0)

    async with anyio.create_task_group() as tasks:
        for actor in system.status():
            if whom(actor):
                tasks.start_soon(stop, actor.name)
