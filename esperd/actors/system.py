"""The actor system: does what the supervisor decides, carries messages between actors, and ends when one is hopeless."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import secrets
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import structlog

from esperd import tracing
from esperd.actors.actor import ASK_TIMEOUT_S
from esperd.actors.cell import Cell, LocalCell
from esperd.actors.clock import Clock, SystemClock
from esperd.actors.codec import Codec, Kind
from esperd.actors.dead_letters import DeadLetter, DeadLetters, Reason
from esperd.actors.envelope import Envelope
from esperd.actors.hub import Hub
from esperd.actors.incarnation import SUPERVISOR
from esperd.actors.observer import Observer, Unobserved, kind_of, result_name
from esperd.actors.outcome import result_of
from esperd.actors.patience import Patience, unanswered
from esperd.actors.process_cell import ProcessCell
from esperd.actors.spec import ChildSpec, ProcessSpec, Spec
from esperd.actors.supervisor import (
    Add,
    Escalate,
    Event,
    Exited,
    Instruction,
    NotifyWatchers,
    RestartLimits,
    Start,
    Started,
    Stop,
    StopRequested,
    Strategy,
    Supervisor,
    Tick,
)
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, ConfigError, Conflict, EsperError, HandlerFailed, WorkerFailed
from esperd.messages import Message, Reply
from esperd.messages.control import ActorState, ActorStatus, Terminated

OUTSIDE = "daemon"
"""Who asks and tells when nobody is named: code of the daemon that is no actor."""
FINISHED = frozenset({ActorState.STOPPED, ActorState.FAILED})

log = structlog.get_logger(__name__)


class ActorSystem:
    """Actors under one supervisor: ``async with ActorSystem(...) as system``.

    Leaving the block stops everybody, the last started first. When an actor crashes more often than its limits allow, the
    block is cancelled, everybody is stopped, and the block raises that actor's error.

    Args:
        workers_endpoint: where process actors connect, ``ipc://`` path in a directory that only this user may enter and
            whose lock the caller holds; None: there are none.
        strategy: who is restarted with a crashed actor.
        limits: how often and how fast actors are restarted.
        clock: time, for backoff and heartbeats.
        rng: source of the backoff's jitter.
        codec: message types and protocol version at process edges.
        wire_check: encode and decode every message between local actors as well, so that one that could not cross a
            process edge is found out without one.
        observer: told of every message; None: nobody counts.
    """

    def __init__(
        self,
        *,
        workers_endpoint: str | None = None,
        strategy: Strategy = "one_for_one",
        limits: RestartLimits | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        codec: Codec | None = None,
        wire_check: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self.observer: Observer = observer or Unobserved()
        self.dead_letters = DeadLetters()
        self.escalated: EsperError | None = None
        """Why the system ends; None while it does not."""
        self._codec = codec or Codec()
        self._wire_check = wire_check
        # Jitter spreads restarts in time; nothing depends on it being unpredictable.
        self._supervisor = Supervisor(strategy, limits, rng=rng or random.Random())  # noqa: S311
        self._hub: Hub | None = None
        if workers_endpoint is not None:
            self._hub = Hub(workers_endpoint, codec=self._codec, clock=self.clock, dead_letters=self.dead_letters)
        self._token = secrets.token_hex(4)
        self._cells: dict[str, Cell] = {}
        self._watchers: dict[str, set[str]] = {}
        self._changed = anyio.Event()
        self._tick_at: float | None = None
        self._is_stopping = False
        self._leaving = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        self._body: anyio.CancelScope | None = None
        self._run = self._running()

    async def __aenter__(self) -> Self:
        await self._run.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._run.__aexit__(kind, error, trace)

    # --- actors ----------------------------------------------------------------------------------------------------------

    async def start(self, spec: Spec, *, wait: bool = True) -> None:
        """Start an actor.

        Args:
            spec: what and how.
            wait: return once it is ready, and give it up if its first start fails. False: return at once; a failed start
                is then treated like any crash.

        Raises:
            Conflict: when an actor of that name exists and has not ended, or the name is the supervisor's.
            ActorUnavailable: when the system is stopping, or the actor was stopped while it started.
            ConfigError: when a process is to be started and the system has no endpoint for them.
            EsperError: whatever its start raised (only with ``wait``).
        """
        self._require_running()
        name = spec.name
        if name == SUPERVISOR or (name in self._cells and not self._is_finished(name)):
            raise Conflict(f"an actor called {name!r} exists already", actor=name)
        self._cells[name] = self._make_cell(spec)
        self._report(Add(name, spec.restart, forgive_start=not wait))
        if not wait:
            return
        await self._until(lambda: self._state(name) not in (ActorState.STARTING, ActorState.WAITING))
        if self._state(name) is ActorState.RUNNING:
            return
        error = self._cells[name].start_error if name in self._cells else None
        raise error or ActorUnavailable(f"{name} was stopped while it started", actor=name)

    async def stop(self, name: str, grace_s: float | None = None) -> None:
        """Stop an actor for good and return when it is gone. An actor that ended already is no mistake.

        Args:
            name: whose end.
            grace_s: seconds it gets before it is made to; None: its spec's.

        Raises:
            ActorUnavailable: when there is no such actor.
        """
        cell = self._cells.get(name)
        if cell is None:
            raise self._no_such_actor(name)
        if grace_s is not None:
            cell.grace_s = grace_s
        self._report(StopRequested(name))
        await self._until(lambda: self._is_finished(name))

    def watch(self, name: str, watcher: str) -> None:
        """Tell ``watcher`` :class:`Terminated` whenever an incarnation of ``name`` ends, until it ends for good.

        Raises:
            ActorUnavailable: when there is no such actor, or it has ended for good.
        """
        if name not in self._cells or self._is_finished(name):
            raise self._no_such_actor(name)
        self._watchers.setdefault(name, set()).add(watcher)

    async def wait_for(self, name: str, state: ActorState) -> None:
        """Return once an actor is in a state."""
        await self._until(lambda: self._state(name) is state)

    def status(self) -> tuple[ActorStatus, ...]:
        """Every actor, in the order of their first start; ended ones as long as they are remembered."""
        found = []
        for child in self._supervisor.children():
            cell = self._cells[child.name]
            mail = cell.mailbox.statistics()
            found.append(
                ActorStatus(
                    name=child.name,
                    state=child.state,
                    pid=cell.pid,
                    generation=child.generation,
                    restarts=child.restarts,
                    mailbox_depth=mail.depth,
                    mailbox_bytes=mail.size_bytes,
                    handled=cell.handled,
                    step=cell.step,
                    last_error=child.last_error,
                    breakers=cell.breakers,
                )
            )
        return tuple(found)

    # --- messages --------------------------------------------------------------------------------------------------------

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S, *, sender: str = OUTSIDE) -> Reply:
        """Send a message to an actor and wait for its answer.

        Raises:
            ActorUnavailable: when there is no such actor, it stopped, is between two incarnations, or is the asker itself.
            AskTimeout: when no answer came in time.
            EsperError: of whatever class the actor answered with.
        """
        if to == sender:
            raise ActorUnavailable(
                f"{to} asks itself: it would wait for ever for its own answer; call the method, or tell", actor=to
            )
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        envelope = Envelope(message, sender, answer, loop.time() + timeout_s, tracing.current())
        patience = Patience(answer, timeout_s, lambda: unanswered(to, message, timeout_s))
        try:
            await self.deliver(to, envelope)
            reply = await answer
        except EsperError as error:
            self.observer.observe_message(to, kind_of(message), error.code)
            raise
        finally:
            patience.end()
        self.observer.observe_message(to, kind_of(message), result_name(reply))
        return result_of(reply)

    async def tell(self, to: str, message: Message, *, sender: str = OUTSIDE) -> None:
        """Send a message to an actor, at most once; waits while its mailbox is full. What cannot be delivered becomes a
        dead letter.
        """
        await self.deliver(to, Envelope(message, sender, trace=tracing.current()))

    async def deliver(self, to: str, envelope: Envelope) -> None:
        """Put an envelope into an actor's mailbox, waiting for room; a tell that cannot be delivered is buried.

        Raises:
            ActorUnavailable: for an ask only: there is no such actor, it stopped, or is between two incarnations.
            MalformedMessage: with ``wire_check``, when the message could not cross a process edge.
        """
        if self._wire_check:
            frames = self._codec.encode(self._codec.head(Kind.TELL, 0, to=to, sender=envelope.sender), envelope.message)
            envelope.message = self._codec.decode(frames)[1]
        cell = self._cells.get(to)
        if cell is None:
            if envelope.answer is not None:
                raise self._no_such_actor(to)
            self.bury(Reason.NO_SUCH_ACTOR, to, envelope)
            return
        if envelope.answer is not None and self._state(to) is ActorState.WAITING:
            raise ActorUnavailable(f"{to} crashed and is being restarted", actor=to)
        try:
            size_bytes = envelope.size_bytes
            if not cell.mailbox.try_put(envelope, size_bytes=size_bytes):
                with anyio.CancelScope(deadline=math.inf if envelope.deadline is None else envelope.deadline):
                    await cell.mailbox.put(envelope, size_bytes=size_bytes)
        except ActorUnavailable:
            if envelope.answer is not None:
                raise
            self.bury(Reason.ACTOR_STOPPED, to, envelope)

    def bury(self, reason: Reason, to: str, envelope: Envelope, detail: str = "") -> None:
        """Make a dead letter of an envelope; whoever waits for its answer is told."""
        log.warning(
            "dead letter", reason=reason.value, to=to, sender=envelope.sender, message_type=type(envelope.message).__name__
        )
        self.dead_letters.add(
            DeadLetter(
                at=self.clock.wall(),
                reason=reason,
                to=to,
                sender=envelope.sender,
                message=envelope.message,
                detail=detail,
            )
        )
        envelope.fail(ActorUnavailable(f"{to} cannot answer: {detail or reason.value}", actor=to), to)

    # --- what the supervisor decides -------------------------------------------------------------------------------------

    def _report(self, event: Event) -> None:
        for instruction in self._supervisor.handle(event, self.clock.monotonic()):
            self._carry_out(instruction)
        for name in [name for name in self._cells if self._supervisor.child(name) is None]:
            del self._cells[name]
        self._plan_tick()
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case Start(name, generation):
                self._cells[name].prepare()
                self._require_tasks().start_soon(self._live, self._cells[name], generation)
            case Stop(name, _):
                self._cells[name].stop()
            case NotifyWatchers():
                self._notify(instruction)
            case Escalate(name, reason):
                self._escalate(name, reason)

    async def _live(self, cell: Cell, generation: int) -> None:
        log.info("starting", actor=cell.name, generation=generation)
        try:
            end = await cell.live(generation, lambda: self._report(Started(cell.name, generation)))
        except BaseException:
            # The whole system is being cancelled, by a bug in it or from outside: nobody comes back.
            self._report(StopRequested())
            self._report(Exited(cell.name, generation, "cancelled", expected=True))
            raise
        if end.expected:
            log.info("ended", actor=cell.name, generation=generation, reason=end.reason)
        else:
            log.error("crashed", actor=cell.name, generation=generation, reason=end.reason)
        self._report(Exited(cell.name, generation, end.reason, end.expected))

    def _notify(self, ended: NotifyWatchers) -> None:
        """In the ordinary lane: what the ended actor said before its end must be read before the news of it."""
        terminated = Terminated(
            actor=ended.name,
            generation=ended.generation,
            reason=ended.reason,
            will_restart=ended.will_restart,
            status=self._cells[ended.name].exit_status,
        )
        for watcher in sorted(self._watchers.get(ended.name, ())):
            self._require_tasks().start_soon(self.deliver, watcher, Envelope(terminated, SUPERVISOR))
        if not ended.will_restart:
            self._watchers.pop(ended.name, None)
            self._cells[ended.name].close()

    def _escalate(self, name: str, reason: str) -> None:
        log.error("giving up", actor=name, reason=reason)
        error_class = WorkerFailed if isinstance(self._cells[name], ProcessCell) else HandlerFailed
        if self.escalated is None:
            self.escalated = error_class(f"{name} {reason}", actor=name, reason=reason)
        self._cancel_body()

    def _plan_tick(self) -> None:
        due = self._supervisor.next_due()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self._require_tasks().start_soon(self._tick, due)

    async def _tick(self, due: float) -> None:
        await self.clock.sleep(due - self.clock.monotonic())
        if self._tick_at == due:
            self._tick_at = None
        self._report(Tick())

    # --- life of the system ----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        """The block runs in its caller's task, everybody else in another: whatever cancels the block from outside, the
        actors are still stopped in order.
        """
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        host = asyncio.create_task(self._host(opened), name="actor system")
        await asyncio.wait((host, opened), return_when=asyncio.FIRST_COMPLETED)
        try:
            if not host.done():
                with anyio.CancelScope() as self._body:
                    host.add_done_callback(lambda _: self._cancel_body())
                    yield
        finally:
            self._leaving.set()
            with anyio.CancelScope(shield=True):
                await asyncio.wait((host,))
            if (failure := host.exception()) is not None:
                raise failure
        if self.escalated is not None:
            raise self.escalated

    async def _host(self, opened: asyncio.Future[None]) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if self._hub is not None:
                await stack.enter_async_context(self._hub.listening())
            self._tasks = await stack.enter_async_context(open_task_group())
            opened.set_result(None)
            await self._leaving.wait()
            await self._stop_all()
            self._tasks.cancel_scope.cancel()

    def _cancel_body(self) -> None:
        if self._body is not None:
            self._body.cancel()

    async def _stop_all(self) -> None:
        self._is_stopping = True
        self._report(StopRequested())
        await self._until(lambda: all(self._is_finished(child.name) for child in self._supervisor.children()))

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self._changed.wait()

    def _make_cell(self, spec: Spec) -> Cell:
        if isinstance(spec, ChildSpec):
            return LocalCell(spec, self)
        if self._hub is None:
            raise ConfigError(f"{spec.name} is a process, and this system has no workers_endpoint", actor=spec.name)
        return ProcessCell(spec, self, self._hub, self._token)

    def _state(self, name: str) -> ActorState | None:
        child = self._supervisor.child(name)
        return None if child is None else child.state

    def _is_finished(self, name: str) -> bool:
        state = self._state(name)
        return state is None or state in FINISHED

    def _no_such_actor(self, name: str) -> ActorUnavailable:
        known = [other for other in self._cells if not self._is_finished(other)]
        return ActorUnavailable(
            f"there is no actor called {name!r}; there are: {', '.join(known) or 'none'}", actor=name, available=known
        )

    def _require_running(self) -> None:
        if self._tasks is None:
            raise ActorUnavailable("the actor system is not open; use `async with`")
        if self._is_stopping:
            raise ActorUnavailable("the actor system is stopping and starts nobody")

    def _require_tasks(self) -> anyio.abc.TaskGroup:
        if self._tasks is None:
            raise ActorUnavailable("the actor system is not open; use `async with`")
        return self._tasks


__all__ = ["ActorSystem", "ChildSpec", "ProcessSpec"]
