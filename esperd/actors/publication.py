"""Events to whoever watches: a publisher that never waits for slow watchers, and a subscriber that knows when it hears.

Lossy by design: a watcher that does not read loses messages beyond the high-water mark. Publications carry their own
sequence numbers, so a watcher sees the hole and fetches what it missed from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import Self

import anyio
import zmq
import zmq.asyncio

from esperd.actors.channel import monitor_of
from esperd.actors.curve import EARLY_FAILURES, ServerSecurity, secure_client, watch_handshakes
from esperd.actors.handshake import Handshake
from esperd.actors.keys import ClientSecurity
from esperd.actors.sockets import (
    bound_what_comes,
    is_remote,
    open_socket,
    require_known_transport,
    require_listener,
    unreachable,
)
from esperd.actors.tasks import open_task_group
from esperd.errors import AuthenticationFailed, EsperError, MalformedMessage

HIGH_WATER_MARK = 10_000
"""Publications queued per watcher before it starts to lose some."""
LARGEST_TOPIC_BYTES = 64 * 1024
"""All that a watcher sends is which topics it wants; one that sends more at a time is disconnected. Chosen, not measured: topics
of ours have less than 100 bytes."""
SUBSCRIBE_TIMEOUT_S = 10.0
REFUSED_LOOK_S = 0.5
"""After this much silence a remote watcher looks whether it is still let in; chosen, not measured."""

TERMINATOR = b"\x00"
"""Ends every topic on the wire: ZeroMQ matches prefixes, and ``job-1`` must not match ``job-10``."""
ECHO = b"\x00echo:"
"""Subscribing to a topic of this form makes the publisher publish on it once. A publisher reads one peer's subscriptions
in order, so hearing the echo proves that all earlier ones are in force. No text topic begins with the terminator."""


def _on_wire(topic: str) -> bytes:
    encoded = topic.encode()
    if not encoded or TERMINATOR in encoded:
        raise MalformedMessage(f"topic {topic!r} must be a non-empty text without NUL", topic=topic)
    return encoded + TERMINATOR


class Publisher:
    """Publishes bytes under topics on an XPUB socket. ``async with Publisher(endpoint):`` binds and unbinds.

    Args:
        endpoint: ``ipc://`` path in a directory that only this user may enter and whose lock the caller holds; or ``tcp://``.
        security: keys and allow-list, for an endpoint that others can reach; the caller opens a :class:`Gate`.
    """

    def __init__(self, endpoint: str, *, security: ServerSecurity | None = None) -> None:
        self.endpoint = endpoint
        self._security = security
        self._socket: zmq.asyncio.Socket | None = None
        self._run = self._running()

    async def __aenter__(self) -> Self:
        await self._run.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._run.__aexit__(kind, error, trace)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Hand a publication to every watcher of the topic; never waits for them.

        Raises:
            MalformedMessage: when the topic is empty or contains NUL.
            RuntimeError: when the publisher is not open.
        """
        if self._socket is None:
            raise RuntimeError("this publisher is not open; use `async with`")
        await self._socket.send_multipart([_on_wire(topic), payload])

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        require_known_transport(self.endpoint)
        with contextlib.closing(open_socket(zmq.XPUB, high_water_mark=HIGH_WATER_MARK)) as socket:
            if self._security is not None:
                self._security.secure(socket)
            bound_what_comes(socket, self.endpoint, LARGEST_TOPIC_BYTES)
            socket.bind(self.endpoint)
            self._socket = socket
            async with open_task_group() as tasks:
                tasks.start_soon(self._read_subscriptions, socket)
                if self._security is not None:
                    tasks.start_soon(watch_handshakes, monitor_of(socket, EARLY_FAILURES), self._security)
                try:
                    yield
                finally:
                    self._socket = None
                    tasks.cancel_scope.cancel()

    async def _read_subscriptions(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frame = (await socket.recv_multipart())[0]
            subscribed, topic = frame[:1] == b"\x01", frame[1:]
            if subscribed and topic.startswith(ECHO):
                await socket.send_multipart([topic, b""])


class Subscriber:
    """Publications as they come: ``async for topic, payload in subscriber``. One reader at a time.

    Once :meth:`open` has returned, everything published from then on arrives, up to the high-water mark.

    Args:
        endpoint: ``ipc://`` path of a publisher, or ``tcp://HOST:PORT``.
        topics: exact topics; empty: everything.
        timeout_s: how long :meth:`open` waits for the publisher.
        security: keys, for a daemon on another machine.
    """

    def __init__(
        self,
        endpoint: str,
        topics: Sequence[str] = (),
        *,
        timeout_s: float = SUBSCRIBE_TIMEOUT_S,
        security: ClientSecurity | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.topics = tuple(topics)
        self._timeout_s = timeout_s
        self._security = security
        self._socket: zmq.asyncio.Socket | None = None
        self._early: list[tuple[str, bytes]] = []
        self._handshake: Handshake | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._refusal: EsperError | None = None

    async def open(self) -> None:
        """Connect and wait until the subscription is in force.

        Raises:
            DaemonUnreachable: when nobody publishes at the endpoint, or it does not respond in time.
            AuthenticationFailed: when the publisher refuses this client, or is another one than its key says.
            MalformedMessage: when a topic is empty or contains NUL.
        """
        wanted = [_on_wire(topic) for topic in self.topics] or [b""]
        if not is_remote(self.endpoint):
            require_listener(self.endpoint)
        echo = ECHO + secrets.token_hex(8).encode()
        socket = open_socket(zmq.SUB, high_water_mark=HIGH_WATER_MARK)
        try:
            for topic in (*wanted, echo):
                socket.subscribe(topic)
            if self._security is not None:
                secure_client(socket, self._security)
            if is_remote(self.endpoint):
                self._handshake = Handshake(socket, self.endpoint, self._security)
            socket.connect(self.endpoint)
            if self._handshake is not None:
                await self._handshake.settled(self._timeout_s)
            await self._hear(socket, echo)
            socket.unsubscribe(echo)
        except BaseException:
            self._leave(socket)
            raise
        self._socket = socket
        if self._handshake is not None:
            self._watcher = asyncio.create_task(self._watch(self._handshake), name=f"handshakes with {self.endpoint}")

    async def close(self) -> None:
        """Disconnect. Safe to call twice."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with anyio.CancelScope(shield=True):  # it reads a socket that is closed next
                await asyncio.wait([watcher])
        socket, self._socket = self._socket, None
        if socket is not None:
            self._leave(socket)

    def _leave(self, socket: zmq.asyncio.Socket) -> None:
        handshake, self._handshake = self._handshake, None
        if handshake is not None:
            handshake.close()  # before its socket
        socket.close(linger=0)

    async def _watch(self, handshake: Handshake) -> None:
        """A publisher that disconnects its watchers lets in again who still may: notice when that is not us any more."""
        while self._refusal is None:
            found = await handshake.next()
            if isinstance(found, AuthenticationFailed):  # one that only ran out of time is tried again, by ZeroMQ
                self._refusal = found

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        return self

    async def __anext__(self) -> tuple[str, bytes]:
        """The next publication.

        Raises:
            StopAsyncIteration: when the subscriber was closed.
            AuthenticationFailed: when a remote publisher does not let this client in any more.
        """
        if self._early:
            return self._early.pop(0)
        look_s = math.inf if self._handshake is None else REFUSED_LOOK_S
        while self._socket is not None:
            if self._refusal is not None:
                raise self._refusal
            with anyio.move_on_after(look_s):
                topic, *payload = await self._socket.recv_multipart()
                if not topic.startswith(ECHO) and len(payload) == 1:
                    return topic.removesuffix(TERMINATOR).decode(errors="replace"), payload[0]
        raise StopAsyncIteration

    async def _hear(self, socket: zmq.asyncio.Socket, echo: bytes) -> None:
        """Read until the echo; keep what was published meanwhile."""
        with anyio.move_on_after(self._timeout_s):
            while True:
                topic, *payload = await socket.recv_multipart()
                if topic == echo:
                    return
                if not topic.startswith(ECHO) and len(payload) == 1:
                    self._early.append((topic.removesuffix(TERMINATOR).decode(errors="replace"), payload[0]))
        raise unreachable(self.endpoint, f"its publisher did not respond within {self._timeout_s:g} s")
