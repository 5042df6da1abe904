"""The process side of a process actor: says that it is ready and alive, asks and answers, notices a dead daemon."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import anyio
import anyio.abc
import structlog
import zmq

import esperd
from esperd import tracing
from esperd.actors.actor import ASK_TIMEOUT_S
from esperd.actors.channel import Channel
from esperd.actors.clock import Clock, SystemClock
from esperd.actors.codec import UNKNOWN_ID, Codec, Head, Kind
from esperd.actors.dead_letters import Reason
from esperd.actors.incarnation import SUPERVISOR, Incarnation
from esperd.actors.mailbox import Mailbox
from esperd.actors.outcome import answer_of, error_reply, result_of
from esperd.actors.patience import Patience, unanswered
from esperd.actors.scope import handling
from esperd.actors.shared import Place, Shared, inherited, is_worth_sharing
from esperd.actors.sockets import connect_dealer, unreachable
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, AskTimeout, Busy, EsperError, HandlerFailed, MalformedMessage
from esperd.messages import Done, ErrorReply, Message, Reply
from esperd.messages.control import BreakerStatus, Heartbeat, HeartbeatReceived, Ready, Stop

Handler = Callable[[Message], Awaitable[Reply | None]]
"""Takes one message at a time, in order, unless it is said to take some beside the others. For an ask: what it returns or raises
is the answer (None: ``Done``). For a tell: what it raises ends the link and the process; the supervisor starts another, and
the message is a dead letter."""

Step = Callable[[], int | None]
"""Returns the step counter that heartbeats carry; None when there are no steps."""

FLUSH_TIMEOUT_S = 2.0
"""How long a leaving process waits to hear that what it told was passed on; chosen, not measured."""

log = structlog.get_logger(__name__)


Breakers = Callable[[], tuple[BreakerStatus, ...]]
"""Returns the circuit breakers that heartbeats carry."""


def no_breakers() -> tuple[BreakerStatus, ...]:
    """Of a process that has none."""
    return ()


def _no_steps() -> int | None:
    return None


def _accept_all(_: Message) -> bool:
    return True


def _none(_: Message) -> bool:
    return False


class Link:
    """A process actor's connection to its daemon: ``async with Link.from_environment(handler) as link``.

    Entering connects and says Ready; the block then runs until it ends by itself. It should end when ``stop_requested`` or
    ``daemon_lost`` is set. Leaving it
    waits until the daemon has passed on what was told; how it went is said by the process's exit status.

    Args:
        incarnation: who this process is.
        handler: called for every ask and tell, except for the link's own conversation (Stop, heartbeats, replies).
        step: read at every heartbeat.
        breakers: likewise.
        accepts: whether the handler can take a message; a tell that it cannot take is logged and dropped.
        beside: whether an ask is answered beside those behind it; the handler bounds how many.
        starting: the process cannot take messages yet: entering does not say Ready, :meth:`say_ready` does. It beats meanwhile.
        codec: message types and protocol version.
        clock: decides when the daemon has been silent for too long.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        handler: Handler,
        *,
        step: Step = _no_steps,
        breakers: Breakers = no_breakers,
        accepts: Callable[[Message], bool] = _accept_all,
        beside: Callable[[Message], bool] = _none,
        starting: bool = False,
        codec: Codec | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.incarnation = incarnation
        self.stop_requested = anyio.Event()
        """Set when the daemon told this process to finish what is in hand and exit."""
        self.daemon_lost = anyio.Event()
        """Set when the daemon was silent for the heartbeat timeout, or no longer knows this incarnation. Final."""
        self.closed = anyio.Event()
        """Set when the link has ended, for whatever reason."""
        self._handler = handler
        self._step = step
        self._breakers = breakers
        self._accepts = accepts
        self._beside = beside
        self._starting = starting
        self._codec = codec or Codec()
        self._clock: Clock = clock or SystemClock()
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Reply]] = {}
        self._sending: set[anyio.CancelScope] = set()
        self._inbox: Mailbox[tuple[Head, Message]] = Mailbox(incarnation.actor)
        self._heard_at = self._clock.monotonic()
        self._socket: Channel | None = None
        self._shared: Shared | None = None
        self._run = self._running()

    @classmethod
    def from_environment(
        cls,
        handler: Handler,
        *,
        step: Step = _no_steps,
        environment: Mapping[str, str] | None = None,
        codec: Codec | None = None,
    ) -> Self:
        """A link for the process that a daemon started.

        Raises:
            ConfigError: when the variables a daemon sets are missing or wrong.
        """
        return cls(Incarnation.from_environment(environment), handler, step=step, codec=codec)

    @property
    def name(self) -> str:
        """The actor's name."""
        return self.incarnation.actor

    @property
    def generation(self) -> int:
        """The supervisor's count of this actor's incarnations."""
        return self.incarnation.generation

    async def __aenter__(self) -> Self:
        """Connect and, unless it is starting, say Ready.

        Raises:
            DaemonUnreachable: when nobody listens; what :meth:`say_ready` raises.
        """
        await self._run.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._run.__aexit__(kind, error, trace)

    async def say_ready(self) -> None:
        """Tell the daemon that messages can be taken from now on. Once.

        Raises:
            DaemonUnreachable: when the daemon is lost, or does not answer within the heartbeat timeout.
            ProtocolMismatch: when the daemon speaks another protocol version.
            Conflict: when this incarnation is not the one the daemon waits for.
        """
        ready = Ready(
            actor=self.name,
            generation=self.generation,
            pid=os.getpid(),
            protocol=self._codec.protocol,
            version=esperd.__version__,
            shares_memory=self._shared is not None,
        )
        try:
            await self.ask(SUPERVISOR, ready, self.incarnation.heartbeat_timeout_s)
        except AskTimeout as error:
            raise unreachable(self.incarnation.hub, error.message) from error
        self._starting = False

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """Send a message to an actor and wait for its answer.

        Raises:
            AskTimeout: when no answer came in time.
            ActorUnavailable: when the actor is absent, or is the asker itself.
            DaemonUnreachable: when the daemon is lost or the link has ended.
            EsperError: of whatever class the actor answered with.
        """
        self._require_daemon()
        if to == self.name:
            raise ActorUnavailable(f"{to} asks itself: it would wait for ever for its own answer; tell instead", actor=to)
        request = next(self._ids)
        head = self._codec.head(
            Kind.ASK, request, to=to, sender=self.name, deadline_ms=int(timeout_s * 1000), trace=tracing.current()
        )
        frames = self._codec.encode(head, message)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._open[request] = answer
        patience = Patience(answer, timeout_s, lambda: unanswered(to, message, timeout_s))
        try:
            await self._send(frames, timeout_s)
            return result_of(await answer)
        finally:
            patience.end()
            self._open.pop(request, None)

    async def tell(self, to: str, message: Message) -> None:
        """Send a message to an actor, at most once; waits while the connection's queue is full.

        Raises:
            DaemonUnreachable: when the daemon is lost or the link has ended.
        """
        self._require_daemon()
        head = self._codec.head(Kind.TELL, next(self._ids), to=to, sender=self.name, trace=tracing.current())
        await self._send(self._codec.encode(head, message))

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        self._shared = inherited(self.incarnation.shared, self.name)
        try:
            with contextlib.closing(connect_dealer(self.incarnation.hub, self.incarnation.identity)) as self._socket:
                async with open_task_group() as tasks:
                    tasks.start_soon(self._read, self._socket)
                    if not self._starting:
                        await self.say_ready()
                    tasks.start_soon(self._beat, self._socket)
                    tasks.start_soon(self._listen_for_daemon)
                    tasks.start_soon(self._serve, tasks)
                    try:
                        yield
                        await self._flush()
                    finally:
                        tasks.cancel_scope.cancel()
        finally:
            self._socket = None
            if self._shared is not None:
                self._shared.close()
            self._fail_open(unreachable(self.incarnation.hub, "this link has ended"))
            self.closed.set()

    async def _flush(self) -> None:
        """Return once the daemon has passed on everything that was told: before it hears that this process ended."""
        if self.daemon_lost.is_set() or self._starting:
            return  # to a process that never said Ready nobody listens
        last = self._heartbeat()
        try:
            await self.ask(SUPERVISOR, last, FLUSH_TIMEOUT_S)
        except EsperError as error:
            log.warning("left without knowing that all was heard", actor=self.name, reason=error.message)

    async def _read(self, socket: Channel) -> None:
        while True:
            frames = await socket.receive()
            self._heard_at = self._clock.monotonic()
            try:
                if self._shared is not None:
                    frames = self._shared.fetch(frames)
                head, message = self._codec.decode(frames)
            except EsperError as error:
                await self._refuse(frames, error)
                continue
            match message:
                case HeartbeatReceived():
                    pass
                case Stop():
                    self.stop_requested.set()
                case ErrorReply() if head.kind is Kind.REPLY and head.id == UNKNOWN_ID:
                    self._lose_daemon(message.message)
                case Reply() if head.kind is Kind.REPLY:
                    self._settle(head.id, message)
                case _:
                    await self._accept(head, message)

    async def _refuse(self, frames: Sequence[bytes], error: EsperError) -> None:
        """A frame that is no message of ours: whoever waits for its answer, on either side, gets the error."""
        log.warning("malformed frame from the daemon", actor=self.name, error=error.message)
        opening = self._codec.opening(frames)
        if opening is None:
            return
        answer = self._open.get(opening.id)
        if opening.kind == Kind.REPLY and answer is not None and not answer.done():
            answer.set_exception(error)
        elif opening.kind == Kind.ASK or (opening.kind == Kind.TELL and opening.id != UNKNOWN_ID):
            await self._reply(opening.id, SUPERVISOR, error_reply(error, actor=self.name, message=None))

    async def _accept(self, head: Head, message: Message) -> None:
        try:
            self._inbox.put_nowait((head, message))
        except Busy as error:
            if head.kind is Kind.ASK:
                await self._reply(head.id, head.sender, error_reply(error, actor=self.name, message=message))
            else:
                log.warning("message dropped, the inbox is full", actor=self.name, message_type=type(message).__name__)
                full = Busy(error.message, **error.fields, reason=Reason.MAILBOX_FULL.value)
                await self._acknowledge(head, error_reply(full, actor=self.name, message=message))

    async def _serve(self, tasks: anyio.abc.TaskGroup) -> None:
        """One message at a time. An ask's exception is the asker's; a tell's ends the process."""
        while True:
            head, message = await self._inbox.get()
            if head.kind is not Kind.ASK:
                await self._handle_tell(head, message)
            elif self._beside(message):
                tasks.start_soon(self._answer, head, message)
            else:
                await self._answer(head, message)

    async def _handle_tell(self, head: Head, message: Message) -> None:
        """The daemon hears how it went: what is not said to have been handled becomes a dead letter when this process ends."""
        kind = type(message).__name__
        if not self._accepts(message):
            log.warning("not handled", actor=self.name, sender=head.sender, message_type=kind)
            error = HandlerFailed(f"{self.name} does not handle {kind}", message_type=kind, reason=Reason.NOT_HANDLED.value)
            await self._acknowledge(head, error_reply(error, actor=self.name, message=message))
            return
        try:
            with handling(self.name, message, head.trace):
                await self._handler(message)
        except Exception as error:
            await self._acknowledge(head, error_reply(error, actor=self.name, message=message))
            raise
        await self._acknowledge(head, Done())

    async def _acknowledge(self, head: Head, reply: Reply) -> None:
        if head.id != UNKNOWN_ID and not self.daemon_lost.is_set():
            await self._reply(head.id, head.sender, reply)

    async def _answer(self, head: Head, message: Message) -> None:
        try:
            with handling(self.name, message, head.trace):
                answer = answer_of(await self._handler(message), actor=self.name, message=message)
        except Exception as error:  # noqa: BLE001 - whatever the handler raises is the asker's answer
            answer = error_reply(error, actor=self.name, message=message)
        await self._reply(head.id, head.sender, answer)

    async def _reply(self, request: int, to: str, answer: Reply) -> None:
        head = self._codec.head(Kind.REPLY, request, to=to, sender=self.name)
        try:
            frames = self._codec.encode(head, answer)
        except MalformedMessage as error:
            frames = self._codec.encode(head, error_reply(error, actor=self.name, message=answer))
        await self._send(frames)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(actor=self.name, generation=self.generation, step=self._step(), breakers=self._breakers())

    async def _beat(self, socket: Channel) -> None:
        head = self._codec.head(Kind.TELL, UNKNOWN_ID, to=SUPERVISOR, sender=self.name)
        while not self.daemon_lost.is_set():
            beat = self._heartbeat()
            try:
                socket.send_now(self._codec.encode(head, beat))
            except zmq.Again:
                log.debug("the daemon does not read", actor=self.name)  # its silence is judged by _listen_for_daemon
            await self._clock.sleep(self.incarnation.heartbeat_interval_s)

    async def _listen_for_daemon(self) -> None:
        timeout_s = self.incarnation.heartbeat_timeout_s
        while not self.daemon_lost.is_set():
            silent_s = self._clock.monotonic() - self._heard_at
            if silent_s < timeout_s:
                await self._clock.sleep(timeout_s - silent_s)
                continue
            # This process may have been the one that slept: read what is queued before judging.
            await self._clock.sleep(self.incarnation.heartbeat_interval_s)
            if self._clock.monotonic() - self._heard_at >= timeout_s:
                self._lose_daemon(f"silent for {timeout_s:g} s")

    def _lose_daemon(self, why: str) -> None:
        if not self.daemon_lost.is_set():
            log.error("daemon lost", actor=self.name, generation=self.generation, reason=why)
            self.daemon_lost.set()
        for sending in self._sending:
            sending.cancel()
        self._fail_open(unreachable(self.incarnation.hub, why))

    def _require_daemon(self) -> None:
        if self.daemon_lost.is_set():
            raise unreachable(self.incarnation.hub, "the daemon that started this process is gone")
        if self._socket is None:
            raise unreachable(self.incarnation.hub, "this link is not open")

    async def _send(self, frames: Sequence[bytes], timeout_s: float = math.inf) -> None:
        """Hand frames to ZeroMQ, waiting for room as long as there is a daemon, and no longer than was said."""
        places: list[Place] = []
        if self._socket is not None and self._shared is not None and is_worth_sharing(frames):
            frames, places = await self._shared.place(frames)
        sent = False
        try:
            if self._socket is None:  # it may have closed while bytes were placed
                raise unreachable(self.incarnation.hub, "this link is not open")
            sent = await self._send_placed(self._socket, frames, timeout_s)
        finally:
            if places and not sent and self._shared is not None:
                self._shared.withdraw(places)

    async def _send_placed(self, socket: Channel, frames: Sequence[bytes], timeout_s: float) -> bool:
        """Whether it was sent in time."""
        with contextlib.suppress(zmq.Again):
            socket.send_now(frames)
            return True
        with anyio.move_on_after(timeout_s), anyio.CancelScope() as sending:
            # Without a peer, ZeroMQ waits for one for ever; a lost daemon must not hold whoever asks it.
            self._sending.add(sending)
            try:
                await socket.send(frames)
                return True
            finally:
                self._sending.discard(sending)
        if sending.cancelled_caught:
            raise unreachable(self.incarnation.hub, "it was lost before this could be sent")
        return False

    def _settle(self, request: int, reply: Reply) -> None:
        answer = self._open.get(request)
        if answer is not None and not answer.done():
            answer.set_result(reply)

    def _fail_open(self, error: EsperError) -> None:
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(error)
