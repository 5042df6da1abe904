"""Where an actor lives: its mailbox, which outlasts it, and one incarnation after the other."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

import anyio
import anyio.abc
import structlog

from esperd.actors.actor import ASK_TIMEOUT_S, Actor
from esperd.actors.beside import Beside
from esperd.actors.clock import Clock
from esperd.actors.dead_letters import Reason
from esperd.actors.envelope import Envelope
from esperd.actors.mailbox import Mailbox
from esperd.actors.observer import TOLD, Observer, kind_of
from esperd.actors.outcome import answer_of
from esperd.actors.scope import handling
from esperd.actors.spec import ChildSpec, Spec
from esperd.actors.supervisor import STOPPED
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, Busy, EsperError, HandlerFailed
from esperd.messages import Message, Reply
from esperd.messages.control import BreakerStatus


class Post(Protocol):
    """What a cell needs of the system around it."""

    @property
    def clock(self) -> Clock:
        """Time."""
        ...

    @property
    def observer(self) -> Observer:
        """Who counts."""
        ...

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S, *, sender: str = "") -> Reply:
        """See :class:`~esperd.actors.system.ActorSystem`."""
        ...

    async def tell(self, to: str, message: Message, *, sender: str = "") -> None:
        """See :class:`~esperd.actors.system.ActorSystem`."""
        ...

    async def deliver(self, to: str, envelope: Envelope) -> None:
        """Put an envelope into a mailbox; see :class:`~esperd.actors.system.ActorSystem`."""
        ...

    def watch(self, name: str, watcher: str) -> None:
        """See :class:`~esperd.actors.system.ActorSystem`."""
        ...

    def bury(self, reason: Reason, to: str, envelope: Envelope, detail: str = "") -> None:
        """Make a dead letter of it, and tell its asker."""
        ...


class End(NamedTuple):
    """How an incarnation ended."""

    reason: str
    expected: bool
    error: EsperError | None = None
    """What to raise to whoever waits for the start; None when it did not fail."""


class StopMark:
    """Control mail: there is nothing to read after this."""


STOP_MARK = StopMark()


class Cell(ABC):
    """An actor's place. One incarnation at a time.

    Args:
        spec: how it is started.
        post: the system around it.
    """

    def __init__(self, spec: Spec, post: Post) -> None:
        self.name = spec.name
        self.grace_s = spec.grace_s
        self.mailbox: Mailbox[Envelope | StopMark] = Mailbox(spec.name)
        self.handled = 0
        """Messages handled by this incarnation; for a process: forwarded to it."""
        self.start_error: EsperError | None = None
        """How the last incarnation that did not start failed."""
        self.exit_status: int | None = None
        """Of the last incarnation's process, negative for a signal; None while there is none to tell."""
        self._post = post
        self._stop_requested = anyio.Event()

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """The process it runs in; None while it has none."""

    @property
    def step(self) -> int | None:
        """Its step counter; None when it has none."""
        return None

    @property
    def breakers(self) -> tuple[BreakerStatus, ...]:
        """Circuit breakers in a process of its own; those of the daemon's process belong to nobody."""
        return ()

    def prepare(self) -> None:
        """Forget what was meant for the last incarnation. Before :meth:`live`, and before a :meth:`stop` of the next one."""
        self._stop_requested = anyio.Event()
        self.mailbox.drop_control(lambda item: item is STOP_MARK)
        self.handled = 0
        self.exit_status = None

    async def live(self, generation: int, started: Callable[[], None]) -> End:
        """One incarnation, from its start to its end. ``started`` is called when it is ready for messages."""
        end = await self._live(generation, started)
        self.start_error = end.error
        return end

    @abstractmethod
    async def _live(self, generation: int, started: Callable[[], None]) -> End: ...

    def stop(self) -> None:
        """Ask the incarnation to end within ``grace_s``; then it is made to."""
        if not self._stop_requested.is_set():
            self._stop_requested.set()
            self.mailbox.put_control(STOP_MARK)

    def close(self) -> None:
        """The actor will not live again: turn its unread mail and every later sender away."""
        for item in self.mailbox.close():
            if isinstance(item, Envelope):
                self._post.bury(Reason.ACTOR_STOPPED, self.name, item)

    def stopped_error(self) -> ActorUnavailable:
        """What an asker gets whose message this actor can no longer answer."""
        return ActorUnavailable(f"{self.name} stopped before it answered", actor=self.name)


class LocalContext:
    """:class:`~esperd.actors.actor.Context` of an actor inside this process."""

    def __init__(self, name: str, generation: int, post: Post, tasks: anyio.abc.TaskGroup) -> None:
        self.name = name
        self.generation = generation
        self.clock = post.clock
        self._post = post
        self._tasks = tasks

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """Ask another actor."""
        return await self._post.ask(to, message, timeout_s, sender=self.name)

    async def tell(self, to: str, message: Message) -> None:
        """Tell an actor; itself too, for later."""
        await self._post.tell(to, message, sender=self.name)

    async def watch(self, name: str) -> None:
        """Be told when an actor's incarnations end."""
        self._post.watch(name, self.name)

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> None:
        """Run something beside the handlers."""
        self._tasks.start_soon(function, *arguments)


class LocalCell(Cell):
    """An actor on this event loop."""

    def __init__(self, spec: ChildSpec, post: Post) -> None:
        super().__init__(spec, post)
        self._factory = spec.factory
        self._is_alive = False

    @property
    def pid(self) -> int | None:
        """Ours, while the actor lives."""
        return os.getpid() if self._is_alive else None

    async def _live(self, generation: int, started: Callable[[], None]) -> End:
        is_started = False
        self._is_alive = True
        structlog.contextvars.bind_contextvars(actor=self.name, generation=generation)  # of this incarnation's task
        try:
            async with open_task_group() as tasks:
                tasks.start_soon(self._enforce_grace, tasks.cancel_scope)
                actor = self._factory()
                await actor.on_start(LocalContext(self.name, generation, self._post, tasks))
                is_started = True
                started()
                await self._read_mail(actor, tasks)
                await actor.on_stop()
                tasks.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 - whatever an actor raises ends its incarnation, and no more
            return self._crash(error, is_started=is_started)
        finally:
            self._is_alive = False
        if not is_started:
            return End(STOPPED, expected=True, error=self.stopped_error())
        return End(STOPPED, expected=True)

    def _crash(self, error: Exception, *, is_started: bool) -> End:
        reason = f"{type(error).__name__}: {error}"
        if is_started:
            return End(reason, expected=False)
        if not isinstance(error, EsperError):
            failure = HandlerFailed(f"{self.name} could not start: {reason}", actor=self.name)
            failure.__cause__ = error
            error = failure
        return End(reason, expected=False, error=error)

    async def _enforce_grace(self, scope: anyio.CancelScope) -> None:
        await self._stop_requested.wait()
        await self._post.clock.sleep(self.grace_s)
        scope.cancel()

    async def _read_mail(self, actor: Actor, tasks: anyio.abc.TaskGroup) -> None:
        beside = Beside(self.name)
        while isinstance(envelope := await self.mailbox.get(), Envelope):
            self._post.observer.observe_wait(self.name, time.perf_counter() - envelope.sent_at)
            if envelope.is_abandoned:
                self._post.bury(Reason.EXPIRED, self.name, envelope)
                continue
            self.handled += 1
            limit = actor.concurrency(envelope.message)
            if envelope.answer is None or limit == 1:
                await self._handle(actor, envelope)
                continue
            try:
                beside.enter(envelope.message, limit)
            except Busy as error:
                envelope.fail(error, self.name)
            else:
                tasks.start_soon(self._handle_beside, actor, envelope, beside)
        await beside.ended()

    async def _handle_beside(self, actor: Actor, envelope: Envelope, beside: Beside) -> None:
        try:
            await self._handle(actor, envelope)
        finally:
            beside.leave(envelope.message)

    async def _handle(self, actor: Actor, envelope: Envelope) -> None:
        """An ask's exception is its asker's; a tell's is the supervisor's."""
        if envelope.answer is None:
            if not actor.can_handle(envelope.message):
                self._post.bury(Reason.NOT_HANDLED, self.name, envelope)
                return
            try:
                await self._run_handler(actor, envelope)
            except Exception as error:
                self._post.bury(Reason.HANDLER_FAILED, self.name, envelope, f"{type(error).__name__}: {error}")
                raise
            self._post.observer.observe_message(self.name, kind_of(envelope.message), TOLD)
            return
        try:
            returned = await self._run_handler(actor, envelope)
            envelope.settle(answer_of(returned, actor=self.name, message=envelope.message))
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is the asker's answer
            envelope.fail(error, self.name)
        except BaseException:
            envelope.fail(self.stopped_error(), self.name)
            raise

    async def _run_handler(self, actor: Actor, envelope: Envelope) -> Reply | None:
        began = time.perf_counter()
        try:
            with handling(self.name, envelope.message, envelope.trace):
                return await actor.handle(envelope.message)
        finally:
            self._post.observer.observe_handled(self.name, time.perf_counter() - began)
