"""The daemon process: what it opens, in which order, how it waits, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import anyio
import structlog

import esperd
from esperd.actors.clock import SystemClock
from esperd.actors.limits import Turnstile
from esperd.actors.publication import Publisher
from esperd.actors.requests import RequestServer
from esperd.actors.spec import ChildSpec, ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.cache import index as kernel_index
from esperd.cache.actor import CacheActor
from esperd.cache.index import KernelIndex
from esperd.cache.seal import Seal
from esperd.config import Config, endpoint
from esperd.daemon import job_store
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.front_door import FrontDoor
from esperd.daemon.http import bind, build_app, serving
from esperd.daemon.job_store import JobStore
from esperd.daemon.jobs_actor import WORKERS, JobsActor, blob_directory, checkpoint_directory, worker_environment
from esperd.daemon.lock import locked, prepare_runtime_directory, prepare_state_directory
from esperd.daemon.remote import RemoteDoor, client_limits
from esperd.errors import ActorUnavailable
from esperd.logs import configure_logging
from esperd.messages.control import ActorState, ActorStatus
from esperd.messages.jobs import DrainJobs
from esperd.plugins import load_plugins
from esperd.policy import decision_log
from esperd.policy.actor import PolicyActor
from esperd.store.blobs import Blobs
from esperd.store.database import Database
from esperd.telemetry import log as event_log
from esperd.telemetry.actor import TelemetryActor
from esperd.telemetry.log import EventLog
from esperd.telemetry.metrics import Metrics

TICK_S = 1.0
"""How often the loop's lag is measured and the actors' figures are read."""

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

    def not_ready(self) -> list[str]:
        """Reasons why the daemon takes no work now."""
        reasons = ["starting"] if self.starting else []
        if self.draining:
            reasons.append("draining")
        if self.jobs is not None and self.jobs.trouble:
            reasons.append(f"store: {self.jobs.trouble}")
        if self.system is not None:
            waited_for = {ActorState.FAILED, ActorState.WAITING, ActorState.STARTING}
            reasons += [
                f"actor {actor.name} is {actor.state}"
                for actor in self.system.status()
                if actor.state in waited_for and not actor.name.startswith(WORKERS)
            ]
        return reasons


def run_daemon(config: Config) -> int:
    """Run until a signal ends it.

    Args:
        config: the whole configuration.

    Returns:
        0 after a drain, 1 after a second signal cut the drain short.

    Raises:
        StateDirectoryLocked: a live daemon owns the state or the runtime directory.
        StateDirectoryUnusable: a directory cannot be written, belongs to somebody else, or would let others at the sockets.
        ConfigError: a socket path is too long, or the HTTP address is taken.
    """
    configure_logging(config.daemon.log_level)
    os.umask(OURS_ALONE)
    prepare_state_directory(config.state_directory)
    prepare_runtime_directory(config.runtime_directory)
    with locked(config.state_directory, config.runtime_directory), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Daemon(config).run())


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


class _Daemon:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._clock = SystemClock()
        self._plugins = load_plugins(config.plugins.blocked)
        self._metrics = Metrics()
        self._status = Status()
        self._jobs: JobsActor | None = None
        self._remote = RemoteDoor(config, self._metrics, self._clock)

    async def run(self) -> int:
        # Signals are ours until the very end: a third one must not kill a daemon that still has workers to stop.
        with (
            anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
            contextlib.closing(bind(self._config.http)) as listening,
        ):
            result = await self._serve(listening, aiter(signals))
        log.info("stopped", drained=result == 0)
        return result

    async def _serve(self, listening: socket.socket, signals: AsyncIterator[signal.Signals]) -> int:
        config = self._config
        control, workers, events = (endpoint(config.runtime_directory, name) for name in ("control", "workers", "events"))
        self._report_plugins()
        async with contextlib.AsyncExitStack() as stack:
            publisher = await stack.enter_async_context(Publisher(events))
            await stack.enter_async_context(self._remote.publishing())
            parts = await self._open_parts(stack, publisher)
            system = await stack.enter_async_context(ActorSystem(workers_endpoint=workers, clock=self._clock))
            self._status.system = system
            for spec in self._specs(parts, system):
                await system.start(spec, wait=isinstance(spec, ChildSpec))
            door = FrontDoor(system, self._plugins, events, config)
            port = await stack.enter_async_context(serving(listening, build_app(self._metrics, self._status.not_ready)))
            (config.runtime_directory / HTTP_PORT_FILE).write_text(f"{port}\n", encoding="ascii")
            turnstile = Turnstile(client_limits(config))
            server = await stack.enter_async_context(RequestServer(control, door.answer, turnstile=turnstile))
            await stack.enter_async_context(self._remote.answering(door.answer_remote))
            self._status.starting = False
            log.info("ready", version=esperd.__version__, pid=os.getpid(), control=control, http=port)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._tick, door, server)
                drained = await self._until_drained(system, signals)
                tasks.cancel_scope.cancel()
            if not drained:
                await _stop_at_once(system, lambda actor: actor.pid not in (None, os.getpid()))
        return 0 if drained else 1

    async def _open_parts(self, stack: contextlib.AsyncExitStack, publisher: Publisher) -> _Parts:
        """Open databases and blobs. Each database has one owner and migrations of its own; only events may lag a power cut."""
        state = self._config.state_directory
        jobs = await stack.enter_async_context(Database.open(state / "jobs.db", job_store.MIGRATIONS))
        kernels = await stack.enter_async_context(Database.open(state / "kernels.db", kernel_index.MIGRATIONS))
        decisions = await stack.enter_async_context(Database.open(state / "decisions.db", decision_log.MIGRATIONS))
        events = await stack.enter_async_context(Database.open(state / "events.db", event_log.MIGRATIONS, synchronous="NORMAL"))
        return _Parts(
            jobs=JobStore(jobs, self._clock.wall, self._config.jobs),
            index=KernelIndex(kernels),
            decisions=decisions,
            log=EventLog(events),
            publisher=publisher,
            blobs=Blobs(blob_directory(state)),
            seal=Seal.open(state / "seal.key"),
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
            clock=self._clock,
        )
        self._status.jobs = self._jobs
        return self._jobs

    def _report_plugins(self) -> None:
        for record in self._plugins.records():
            if record.error is not None:
                log.warning("plugin failed", plugin=record.name, distribution=record.distribution, error=record.error)

    async def _tick(self, door: FrontDoor, server: RequestServer) -> None:
        """Feed the metrics that nobody else sees."""
        while True:
            before = self._clock.monotonic()
            await self._clock.sleep(TICK_S)
            self._metrics.observe_loop_lag(max(0.0, self._clock.monotonic() - before - TICK_S))
            self._metrics.observe_actors(door.actors())
            self._metrics.observe_requests(server.statistics()._asdict())

    async def _until_drained(self, system: ActorSystem, signals: AsyncIterator[signal.Signals]) -> bool:
        """Wait for SIGTERM or SIGINT, drain; False when a second one, or the drain's timeout, cut it short."""
        first = await anext(signals)
        log.info("draining", signal=first.name, timeout_s=self._config.daemon.drain_timeout_s)
        self._status.draining = True
        with anyio.move_on_after(self._config.daemon.drain_timeout_s):
            async with anyio.create_task_group() as tasks:

                async def give_up() -> None:
                    second = await anext(signals)
                    log.warning("stopping now", signal=second.name)
                    tasks.cancel_scope.cancel()

                tasks.start_soon(give_up)
                await system.ask("jobs", DrainJobs())
                await self._until_idle()
                tasks.cancel_scope.cancel()
                return True
        return False

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
