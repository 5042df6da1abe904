"""Where process actors connect: one ROUTER, one reader; each peer is known by name, generation and the daemon's token."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import anyio
import structlog
import zmq

from esperd.actors.channel import Channel
from esperd.actors.clock import Clock
from esperd.actors.codec import UNKNOWN_ID, Codec, Head, Kind
from esperd.actors.dead_letters import DeadLetter, DeadLetters, Reason
from esperd.actors.envelope import Envelope
from esperd.actors.incarnation import SUPERVISOR, Incarnation
from esperd.actors.mailbox import Mailbox
from esperd.actors.outcome import error_reply
from esperd.actors.sockets import bind_router
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, Busy, Conflict, EsperError, MalformedMessage
from esperd.messages import Done, Message, Reply
from esperd.messages.control import Heartbeat, HeartbeatReceived, Ready

SEND_AGAIN_S = 0.02
"""Pause before another attempt to send to a peer whose queue is full; chosen, not measured."""

log = structlog.get_logger(__name__)


class Received(NamedTuple):
    """A message from a process, for somebody else."""

    head: Head
    message: Message


class Peer:
    """The daemon's end of one incarnation of a process actor."""

    def __init__(self, incarnation: Incarnation, now: float) -> None:
        self.incarnation = incarnation
        self.ready = anyio.Event()
        self.pid: int | None = None
        """As it says itself, in Ready: the spawned process may be a wrapper around it."""
        self.step: int | None = None
        self.heard_at = now
        self.spoke = False
        """Whether it ever said anything."""
        self.inbox: Mailbox[Received] = Mailbox(f"messages from {incarnation.actor}")
        self.asks: dict[int, Envelope] = {}
        """Asks sent to it that it has not answered, by correlation id."""
        self._ids = itertools.count(1)

    @property
    def name(self) -> str:
        """The actor's name."""
        return self.incarnation.actor

    def open_ask(self, envelope: Envelope) -> int:
        """Remember who waits for an answer; returns the correlation id to send."""
        for request in [request for request, ask in self.asks.items() if ask.is_abandoned]:
            del self.asks[request]
        request = next(self._ids)
        self.asks[request] = envelope
        return request

    def settle(self, request: int, reply: Reply) -> None:
        """Give an answer to whoever waits for it."""
        envelope = self.asks.pop(request, None)
        if envelope is not None:
            envelope.settle(reply)

    def fail_asks(self, error: EsperError) -> None:
        """Nobody will answer any more."""
        for envelope in self.asks.values():
            envelope.fail(error, self.name)
        self.asks.clear()


class Hub:
    """Reads what processes say and sends them what others say. Knows incarnations, not actors.

    Args:
        endpoint: ``ipc://`` path in a directory that only this user may enter and whose lock the caller holds.
        codec: message types and protocol version.
        clock: stamps when a peer was heard.
        dead_letters: where undecodable and stale frames are counted.
    """

    def __init__(self, endpoint: str, *, codec: Codec, clock: Clock, dead_letters: DeadLetters) -> None:
        self.endpoint = endpoint
        self._codec = codec
        self._clock = clock
        self._dead_letters = dead_letters
        self._peers: dict[bytes, Peer] = {}
        self._socket: Channel | None = None

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncGenerator[None, None]:
        """Bind, and read until the block ends."""
        with contextlib.closing(bind_router(self.endpoint)) as self._socket:
            async with open_task_group() as tasks:
                tasks.start_soon(self._read, self._socket)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()
                    self._socket = None

    def expect(self, incarnation: Incarnation) -> Peer:
        """From now on, listen to this incarnation."""
        peer = Peer(incarnation, self._clock.monotonic())
        self._peers[incarnation.identity] = peer
        return peer

    def forget(self, peer: Peer) -> None:
        """Refuse whatever this incarnation still says."""
        self._peers.pop(peer.incarnation.identity, None)

    async def send(self, peer: Peer, envelope: Envelope, deadline_ms: int | None) -> None:
        """Send a message on to a process, waiting while it does not read; the answer settles the envelope.

        Raises:
            ActorUnavailable: when the process is not connected.
            MalformedMessage: when the message has no form on the wire.
        """
        is_ask = envelope.answer is not None
        head = self._codec.head(
            Kind.ASK if is_ask else Kind.TELL,
            peer.open_ask(envelope) if is_ask else UNKNOWN_ID,
            to=peer.name,
            sender=envelope.sender,
            deadline_ms=deadline_ms,
            trace=envelope.trace,
        )
        try:
            await self._send_patiently(peer, self._codec.encode(head, envelope.message))
        except EsperError:
            peer.asks.pop(head.id, None)
            raise

    async def answer(self, peer: Peer, request: int, reply: Reply) -> None:
        """Send an answer to a process that asked.

        Raises:
            ActorUnavailable: when the process is not connected.
        """
        await self._send_patiently(peer, self._reply_frames(request, reply))

    async def _send_patiently(self, peer: Peer, frames: Sequence[bytes]) -> None:
        while not self._send(peer.incarnation.identity, frames):
            await self._clock.sleep(SEND_AGAIN_S)  # it does not read; its silence is judged by its heartbeats

    def _send(self, identity: bytes, frames: Sequence[bytes]) -> bool:
        """Hand frames to ZeroMQ; False when the peer's queue is full.

        Always without waiting: one peer that does not read must not hold up the others on the same socket.
        """
        if self._socket is None:
            raise ActorUnavailable("the hub is closed", identity=identity.decode(errors="replace"))
        try:
            self._socket.send_now([identity, *frames])
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            name = identity.decode(errors="replace").partition(":")[0]
            raise ActorUnavailable(f"{name} is not connected", identity=name) from error
        return True

    def _reply_frames(self, request: int, reply: Reply) -> list[bytes]:
        head = self._codec.head(Kind.REPLY, request, to="", sender=SUPERVISOR)
        try:
            return self._codec.encode(head, reply)
        except MalformedMessage as error:
            return self._codec.encode(head, error_reply(error, actor=SUPERVISOR, message=reply))

    async def _read(self, socket: Channel) -> None:
        while True:
            identity, *frames = await socket.receive()
            peer = self._peers.get(identity)
            try:
                head, message = self._codec.decode(frames)
            except EsperError as error:
                await self._refuse_frames(identity, peer, frames, error)
                continue
            if peer is None:
                await self._refuse_stranger(identity, head, message)
                continue
            peer.heard_at, peer.spoke = self._clock.monotonic(), True
            match message:
                case Ready() if head.to == SUPERVISOR:
                    peer.pid = message.pid
                    await self._answer_now(identity, head.id, Done())
                    peer.ready.set()
                case Heartbeat() if head.to == SUPERVISOR and head.kind is Kind.TELL:
                    peer.step = message.step
                    beat = self._codec.head(Kind.TELL, UNKNOWN_ID, to=peer.name, sender=SUPERVISOR)
                    await self._try_send(identity, self._codec.encode(beat, HeartbeatReceived()))
                case Reply() if head.kind is Kind.REPLY:
                    peer.settle(head.id, message)
                case _:
                    await self._take_in(peer, head, message)

    async def _take_in(self, peer: Peer, head: Head, message: Message) -> None:
        """Put it where the peer's own task finds it: a full mailbox somewhere must not stop this reader."""
        try:
            peer.inbox.put_nowait(Received(head, message))
        except (Busy, ActorUnavailable) as error:
            reason = Reason.MAILBOX_FULL if isinstance(error, Busy) else Reason.STALE_GENERATION
            self._bury(reason, head, message, error.message)
            if head.kind is Kind.ASK:
                await self._answer_now(peer.incarnation.identity, head.id, error_reply(error, actor=head.to, message=message))

    async def _refuse_frames(self, identity: bytes, peer: Peer | None, frames: Sequence[bytes], error: EsperError) -> None:
        """Not a message of this protocol: counted, and told to whoever waits for an answer, on either side."""
        name = identity.decode(errors="replace").partition(":")[0]
        log.warning("malformed frame from a process", peer=name, error=error.message)
        self._dead_letters.add(
            DeadLetter(at=self._clock.wall(), reason=Reason.UNDECODABLE, to="", sender=name, message=None, detail=error.message)
        )
        opening = self._codec.opening(frames)
        if opening is None:
            return
        failure = error_reply(error, actor=SUPERVISOR, message=None)
        if opening.kind == Kind.REPLY:
            if peer is not None:
                peer.settle(opening.id, failure)
        else:
            await self._answer_now(identity, opening.id, failure)

    async def _refuse_stranger(self, identity: bytes, head: Head, message: Message) -> None:
        """An incarnation that this daemon does not know, or not any more. Id 0 tells its link to give up."""
        name = identity.decode(errors="replace").partition(":")[0]
        if not isinstance(message, Heartbeat):
            self._bury(Reason.STALE_GENERATION, head, message, name)
        error = Conflict(f"{name} is not the incarnation this daemon waits for; it must exit", identity=name)
        request = head.id if head.kind is Kind.ASK else UNKNOWN_ID
        await self._answer_now(identity, request, error_reply(error, actor=SUPERVISOR, message=message))

    async def _answer_now(self, identity: bytes, request: int, reply: Reply) -> None:
        await self._try_send(identity, self._reply_frames(request, reply))

    async def _try_send(self, identity: bytes, frames: Sequence[bytes]) -> None:
        """Send if that is possible now. Who does not read, or left, misses an answer and is judged by its silence."""
        try:
            sent = self._send(identity, frames)
        except ActorUnavailable:
            sent = False
        if not sent:
            log.debug("could not answer a process", peer=identity.decode(errors="replace").partition(":")[0])

    def _bury(self, reason: Reason, head: Head, message: Message, detail: str) -> None:
        self._dead_letters.add(
            DeadLetter(at=self._clock.wall(), reason=reason, to=head.to, sender=head.sender, message=message, detail=detail)
        )
