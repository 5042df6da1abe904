"""Requests from outside: the daemon's server end and the client's end. Every request is answered, also with an error."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import anyio
import anyio.abc
import zmq

from esperd import tracing
from esperd.actors.channel import Channel
from esperd.actors.clock import SystemClock
from esperd.actors.codec import LARGEST_FRAME_BYTES, UNKNOWN_ID, Codec, Head, Kind
from esperd.actors.curve import EARLY_FAILURES, ServerSecurity, secure_client, watch_handshakes
from esperd.actors.handshake import Handshake
from esperd.actors.keys import ClientSecurity
from esperd.actors.limits import Turnstile, require_small
from esperd.actors.outcome import answer_of, error_reply, result_of
from esperd.actors.patience import Patience
from esperd.actors.sockets import (
    bind_router,
    connect_dealer,
    is_remote,
    open_dealer,
    require_listener,
    unreachable,
)
from esperd.actors.tasks import open_task_group
from esperd.errors import AskTimeout, AuthenticationFailed, Busy, EsperError, MalformedMessage
from esperd.messages import Message, Reply

Handler = Callable[[bytes, Message], Awaitable[Reply | None]]
"""Takes a client's id and its request; returns the answer (None: ``Done``) or raises. The id is the name of the key it proved to
have, or, on a socket without keys, a number of its connection. It leaves context variables as it finds them: its task goes on
with other requests."""

SERVER = "daemon"
"""The name requests are addressed to."""
MAX_IN_FLIGHT = 256
RETRY_AFTER_S = 0.5
DRAIN_S = 1.0
"""How long requests in hand may finish when the server closes; chosen, not measured."""
FAREWELL_S = 0.25
"""How long the server stays after its last answers. A client's connection queues nothing for an absent peer (ZMQ_IMMEDIATE), and
with that setting ZeroMQ also drops what the client has received and not read when the peer leaves: 1 answer in 15 on a busy
machine, measured."""
TIMEOUT_S = 10.0
OVERSIZE = 4
"""Up to so many times a client's largest request a frame is read, and its sender hears why it was refused; beyond, ZeroMQ ends
the connection. Chosen. Over tcp it is once: there libzmq keeps as much for anybody who connects, and our clients look first."""


class RequestStatistics(NamedTuple):
    """A server since it was opened."""

    answered: int
    #: answers handed to ZeroMQ, errors included
    malformed: int
    #: frames that were no request of this protocol version
    refused: int
    #: requests turned away with ``busy``
    undeliverable: int
    #: answers whose client was gone or did not read


def counted_together(servers: Iterable[RequestServer]) -> dict[str, int]:
    """What became of the requests of several servers, by the names of :class:`RequestStatistics`."""
    columns = zip(*(server.statistics() for server in servers), strict=True)
    return dict(zip(RequestStatistics._fields, map(sum, columns), strict=True))


class _Request(NamedTuple):
    """One, let in."""

    client: bytes
    who: bytes
    head: Head
    message: Message


class RequestServer:
    """Answers clients on a ROUTER socket, several at a time.

    ``async with RequestServer(endpoint, handler):`` serves until the block ends; requests in hand then get ``drain_s`` to
    finish. A handler's exception is the client's answer.

    Args:
        endpoint: ``ipc://`` path in a directory that only this user may enter and whose lock the caller holds; or ``tcp://``.
        handler: called once per request, concurrently.
        codec: message types and protocol version.
        max_in_flight: requests handled at one time; more are answered with ``busy``.
        drain_s: seconds given to requests in hand at the end.
        security: keys and allow-list, for an endpoint that others can reach; the caller opens a :class:`Gate`.
        turnstile: what one client may ask; None: no limits but the server's own.
    """

    def __init__(
        self,
        endpoint: str,
        handler: Handler,
        *,
        codec: Codec | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        drain_s: float = DRAIN_S,
        security: ServerSecurity | None = None,
        turnstile: Turnstile | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._handler = handler
        self._codec = codec or Codec()
        self._max_in_flight = max_in_flight
        self._drain_s = drain_s
        self._security = security
        self._turnstile = turnstile
        self._clock = SystemClock()
        self._in_flight = 0
        self._free: list[asyncio.Future[_Request]] = []
        self._idle = anyio.Event()
        self._answered = 0
        self._malformed = 0
        self._refused = 0
        self._undeliverable = 0
        self._run = self._running()

    def statistics(self) -> RequestStatistics:
        """Counters now."""
        return RequestStatistics(
            answered=self._answered,
            malformed=self._malformed,
            refused=self._refused,
            undeliverable=self._undeliverable,
        )

    async def __aenter__(self) -> Self:
        await self._run.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._run.__aexit__(kind, error, trace)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        with contextlib.closing(self._bind()) as socket:
            async with open_task_group() as answers:
                if self._security is not None:
                    answers.start_soon(watch_handshakes, socket.monitored(EARLY_FAILURES), self._security)
                reading = anyio.CancelScope()
                answers.start_soon(self._read, socket, answers, reading)
                try:
                    yield
                finally:
                    reading.cancel()
                    with anyio.move_on_after(self._drain_s, shield=True):
                        await self._finish_in_hand()
                    answers.cancel_scope.cancel()

    def _bind(self) -> Channel:
        largest = LARGEST_FRAME_BYTES
        if self._turnstile is not None:
            largest = self._turnstile.limits.request_bytes * (1 if is_remote(self.endpoint) else OVERSIZE)
        return bind_router(self.endpoint, security=self._security, largest_bytes=largest)

    async def _finish_in_hand(self) -> None:
        if not self._in_flight:
            return
        while self._in_flight:
            self._idle = anyio.Event()
            await self._idle.wait()
        await anyio.sleep(FAREWELL_S)

    async def _read(self, socket: Channel, answers: anyio.abc.TaskGroup, reading: anyio.CancelScope) -> None:
        with reading:
            while True:
                client, *frames = await socket.receive()
                who = client
                try:
                    if self._security is not None:
                        who = self._security.client(frames.pop()).encode()
                    if self._turnstile is not None:
                        self._turnstile.admit(who, frames, self._clock.monotonic())
                    head, message = self._codec.decode(frames)
                    if head.kind is not Kind.ASK:
                        raise MalformedMessage(f"a client may only ask; got a {head.kind.name.lower()}")
                except EsperError as error:
                    if isinstance(error, Busy | AuthenticationFailed):
                        self._refused += 1
                    else:
                        self._malformed += 1
                    opening = self._codec.opening(frames)
                    answer = error_reply(error, actor=SERVER, message=None)
                    self._send(socket, client, opening.id if opening else UNKNOWN_ID, answer)
                    continue
                try:
                    if self._in_flight >= self._max_in_flight:
                        raise self._busy()
                    if self._turnstile is not None:
                        self._turnstile.enter(who, RETRY_AFTER_S)
                except Busy as error:
                    self._refused += 1
                    self._send(socket, client, head.id, error_reply(error, actor=SERVER, message=message))
                    continue
                self._in_flight += 1
                self._hand_over(_Request(client, who, head, message), socket, answers)

    def _hand_over(self, request: _Request, socket: Channel, answers: anyio.abc.TaskGroup) -> None:
        """To a task that has nothing to do, or to a new one: a task for every request would cost more than the request."""
        if self._free:
            self._free.pop().set_result(request)
        else:
            answers.start_soon(self._work, socket, request)

    async def _work(self, socket: Channel, request: _Request) -> None:
        """Answer a request, then whatever is handed over next."""
        loop = asyncio.get_running_loop()
        while True:
            await self._answer(socket, *request)
            next_one: asyncio.Future[_Request] = loop.create_future()
            self._free.append(next_one)
            request = await next_one

    async def _answer(self, socket: Channel, client: bytes, who: bytes, head: Head, message: Message) -> None:
        try:
            try:
                with tracing.span(f"{SERVER} {type(message).__name__}", parent=head.trace):
                    returned = await self._handler(who, message)
                answer = answer_of(returned, actor=SERVER, message=message)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is the client's answer
                answer = error_reply(error, actor=SERVER, message=message)
            self._send(socket, client, head.id, answer)
        finally:
            if self._turnstile is not None:
                self._turnstile.leave(who)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _send(self, socket: Channel, client: bytes, request: int, answer: Reply) -> None:
        head = self._codec.head(Kind.REPLY, request, to="", sender=SERVER)
        try:
            frames = self._codec.encode(head, answer)
        except MalformedMessage as error:
            frames = self._codec.encode(head, error_reply(error, actor=SERVER, message=answer))
        try:
            socket.send_now([client, *frames])
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._undeliverable += 1
        else:
            self._answered += 1

    def _busy(self) -> Busy:
        return Busy(
            f"the daemon handles {self._max_in_flight} requests already; try again in {RETRY_AFTER_S} s",
            retry_after_s=RETRY_AFTER_S,
            in_flight=self._in_flight,
        )


class RequestClient:
    """Asks a daemon. Opened by ``async with`` or by :meth:`open` and :meth:`close`; any number of requests at a time.

    Args:
        endpoint: ``ipc://`` path of the daemon's request socket, or ``tcp://HOST:PORT``.
        timeout_s: how long a request waits for its answer unless it says otherwise.
        codec: message types and protocol version.
        sender: how the client names itself.
        security: keys, for a daemon on another machine.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = TIMEOUT_S,
        *,
        codec: Codec | None = None,
        sender: str = "client",
        security: ClientSecurity | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._codec = codec or Codec()
        self._sender = sender
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Reply]] = {}
        self._heard = False
        self.largest_request_bytes: int | None = None
        """What the daemon takes; larger requests are refused here. None: not known, and every request is sent."""
        self._security = security
        self._handshake: Handshake | None = None
        self._refusal: EsperError | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._socket: Channel | None = None
        self._reader: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect.

        Raises:
            DaemonUnreachable: when nobody listens at the endpoint.
            AuthenticationFailed: when the daemon refuses this client, or is another one than its key says.
            ConfigError: when the endpoint is neither ipc nor tcp.
        """
        self._socket = await self._connected() if is_remote(self.endpoint) else self._connect()
        # A plain task: a client may be opened and closed by different tasks, which a task group does not allow.
        self._reader = asyncio.create_task(self._read(self._socket), name=f"replies from {self.endpoint}")

    def _connect(self) -> Channel:
        return connect_dealer(self.endpoint)

    async def _connected(self) -> Channel:
        """A connection over tcp, once the daemon has let this client in; from then on the watcher hears when it does no more."""
        dealer = open_dealer()
        try:
            if self._security is not None:
                secure_client(dealer, self._security)
            self._handshake = Handshake(dealer, self.endpoint, self._security)
            dealer.connect(self.endpoint)
            await self._handshake.settled(self.timeout_s)
        except BaseException:
            if self._handshake is not None:
                self._handshake.close()
            dealer.close(linger=0)
            raise
        self._watcher = asyncio.create_task(self._watch(self._handshake), name=f"handshakes with {self.endpoint}")
        return Channel(dealer)

    async def _watch(self, handshake: Handshake) -> None:
        while True:
            self._refusal = await handshake.next()
            if self._refusal is not None:
                self._fail_open(self._refusal)

    async def close(self) -> None:
        """Disconnect; requests still open fail with ``daemon_unreachable``. Safe to call twice."""
        tasks, socket = (self._reader, self._watcher), self._socket
        self._reader = self._watcher = self._socket = None
        for task in tasks:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._handshake is not None:
            self._handshake.close()
        if socket is not None:
            socket.close()
        self._fail_open(unreachable(self.endpoint, "this client was closed"))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def request(self, message: Message, *, timeout_s: float | None = None) -> Reply:
        """Send a request and wait for its answer.

        Args:
            message: the request.
            timeout_s: seconds to wait; None: the client's own.

        Raises:
            DaemonUnreachable: when nobody answers, or the client is not open.
            MalformedMessage: when the request is larger than the daemon takes.
            AskTimeout: when the daemon is there but does not answer this request in time.
            EsperError: of whatever class the daemon answered with.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        with tracing.span(f"{self._sender} {type(message).__name__}"):
            return await self._request(message, limit_s)

    async def _request(self, message: Message, limit_s: float) -> Reply:
        if self._socket is None:
            raise unreachable(self.endpoint, "this client is not open")
        if self._refusal is not None:
            raise self._refusal
        request = next(self._ids)
        deadline_ms = None if math.isinf(limit_s) else int(limit_s * 1000)
        head = self._codec.head(
            Kind.ASK, request, to=SERVER, sender=self._sender, deadline_ms=deadline_ms, trace=tracing.current()
        )
        frames = self._codec.encode(head, message)
        if self.largest_request_bytes is not None:
            require_small(frames, self.largest_request_bytes)  # ZeroMQ would end the connection, without a word
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._open[request] = answer
        patience = Patience(answer, limit_s, lambda: self._late(message, limit_s))
        try:
            try:
                self._socket.send_now(frames)
            except zmq.Again:
                with anyio.move_on_after(limit_s):
                    await self._socket.send(frames)
            return result_of(await answer)
        except zmq.ZMQError as error:
            if error.errno != zmq.ENOTSOCK:
                raise
            raise unreachable(self.endpoint, "this client was closed") from error
        finally:
            patience.end()
            self._open.pop(request, None)

    def _late(self, message: Message, limit_s: float) -> EsperError:
        if not self._heard:
            return unreachable(self.endpoint, f"no answer within {limit_s:g} s")
        if not is_remote(self.endpoint):
            try:
                require_listener(self.endpoint)
            except EsperError as error:
                return error
        return AskTimeout(
            f"the daemon at {self.endpoint} did not answer {type(message).__name__} within {limit_s:g} s",
            endpoint=self.endpoint,
            message_type=type(message).__name__,
            timeout_s=limit_s,
        )

    async def _read(self, socket: Channel) -> None:
        while True:
            frames = await socket.receive()
            self._heard = True
            self._settle(frames)

    def _settle(self, frames: Sequence[bytes]) -> None:
        """Give an answer to whoever waits for it. One that nobody waits for any more came too late."""
        error: EsperError | None = None
        reply: Message | None = None
        try:
            head, reply = self._codec.decode(frames)
            request = head.id
            if not isinstance(reply, Reply):
                error = MalformedMessage(f"the daemon answered with a {type(reply).__name__}, which is no reply")
            elif request == UNKNOWN_ID:
                result_of(reply)
        except EsperError as failure:
            error = failure
            opening = self._codec.opening(frames)
            request = opening.id if opening else UNKNOWN_ID
        if request == UNKNOWN_ID and error is not None:
            self._fail_open(error)
            return
        answer = self._open.get(request)
        if answer is None or answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        elif isinstance(reply, Reply):
            answer.set_result(reply)

    def _fail_open(self, error: EsperError) -> None:
        for answer in self._open.values():
            if not answer.done():
                answer.set_exception(error)
