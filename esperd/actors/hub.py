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
from esperd.actors.dead_letters import BURIED_BY_LINK, DeadLetter, DeadLetters, Reason
from esperd.actors.envelope import Envelope
from esperd.actors.incarnation import SUPERVISOR, Incarnation
from esperd.actors.mailbox import Mailbox
from esperd.actors.outcome import error_reply
from esperd.actors.shared import Place, Shared, is_worth_sharing
from esperd.actors.sockets import bind_router
from esperd.actors.tasks import open_task_group
from esperd.errors import ActorUnavailable, Busy, Conflict, EsperError, MalformedMessage
from esperd.messages import Done, ErrorReply, Message, Reply
from esperd.messages.control import BreakerStatus, Heartbeat, HeartbeatReceived, Ready, Stop

SEND_AGAIN_S = 0.02
"""Pause before another attempt to send to a peer whose queue is full; chosen, not measured."""

log = structlog.get_logger(__name__)


class Received(NamedTuple):
    """A message from a process, for somebody else."""

    head: Head
    message: Message


class Peer:
    """The daemon's end of one incarnation of a process actor."""

    def __init__(self, incarnation: Incarnation, now: float, shared: Shared | None = None) -> None:
        self.incarnation = incarnation
        self.ready = anyio.Event()
        self.pid: int | None = None
        """As it says itself, in Ready: the spawned process may be a wrapper around it."""
        self.step: int | None = None
        self.breakers: tuple[BreakerStatus, ...] = ()
        self.heard_at = now
        self.spoke = False
        """Whether it ever said anything."""
        self.inbox: Mailbox[Received] = Mailbox(f"messages from {incarnation.actor}")
        self._asks: dict[int, Envelope] = {}
        """Sent to it and not answered, by correlation id."""
        self._tells: dict[int, Envelope] = {}
        """Sent to it; it has not said how it went."""
        self.shared = shared
        """Memory that it may share, whether or not it got it."""
        self.shares_memory = False
        """Whether it said that it has it."""
        self._ids = itertools.count(1)

    @property
    def name(self) -> str:
        """The actor's name."""
        return self.incarnation.actor

    def remember(self, envelope: Envelope) -> int:
        """Until it is answered, or handled; returns the correlation id to send."""
        request = next(self._ids)
        if envelope.answer is None:
            self._tells[request] = envelope
            return request
        for abandoned in [number for number, ask in self._asks.items() if ask.is_abandoned]:
            del self._asks[abandoned]
        self._asks[request] = envelope
        return request

    def unsent(self, request: int) -> None:
        """A message that was remembered did not go out."""
        self._asks.pop(request, None)
        self._tells.pop(request, None)

    def settle(self, request: int, reply: Reply) -> Envelope | None:
        """Give an answer to whoever waits for it.

        Returns:
            A tell that the process did not handle: the answer, which nobody waits for, is an error.
        """
        ask = self._asks.pop(request, None)
        if ask is not None:
            ask.settle(reply)
        told = self._tells.pop(request, None)
        return told if isinstance(reply, ErrorReply) else None

    def forget_open(self) -> list[Envelope]:
        """What will be answered and handled by nobody any more."""
        left = [*self._asks.values(), *self._tells.values()]
        self._asks.clear()
        self._tells.clear()
        return left


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

    def expect(self, incarnation: Incarnation, shared: Shared | None = None) -> Peer:
        """From now on, listen to this incarnation.

        Args:
            incarnation: who it is.
            shared: memory it will share; closed by :meth:`forget`.
        """
        peer = Peer(incarnation, self._clock.monotonic(), shared)
        self._peers[incarnation.identity] = peer
        return peer

    def forget(self, peer: Peer) -> None:
        """Refuse whatever this incarnation still says."""
        self._peers.pop(peer.incarnation.identity, None)
        if peer.shared is not None:
            peer.shared.close()

    async def send(self, peer: Peer, envelope: Envelope, deadline_ms: int | None) -> None:
        """Send a message on to a process, waiting while it does not read; the answer settles the envelope.

        Raises:
            ActorUnavailable: when the process is not connected.
            MalformedMessage: when the message has no form on the wire.
        """
        is_followed = not isinstance(envelope.message, Stop)  # part of the link's conversation: nobody says to have handled it
        head = self._codec.head(
            Kind.TELL if envelope.answer is None else Kind.ASK,
            peer.remember(envelope) if is_followed else UNKNOWN_ID,
            to=peer.name,
            sender=envelope.sender,
            deadline_ms=deadline_ms,
            trace=envelope.trace,
        )
        try:
            await self._send_patiently(peer, self._codec.encode(head, envelope.message))
        except EsperError:  # not when this is cancelled: what may have been sent is told of when the process is gone
            peer.unsent(head.id)
            raise

    async def answer(self, peer: Peer, request: int, reply: Reply) -> None:
        """Send an answer to a process that asked.

        Raises:
            ActorUnavailable: when the process is not connected.
        """
        await self._send_patiently(peer, self._reply_frames(request, reply))

    async def _send_patiently(self, peer: Peer, frames: Sequence[bytes]) -> None:
        places: list[Place] = []
        if peer.shared is not None and peer.shares_memory and is_worth_sharing(frames):
            frames, places = await peer.shared.place(frames)
        try:
            while not self._send(peer.incarnation.identity, frames):
                await self._clock.sleep(SEND_AGAIN_S)  # it does not read; its silence is judged by its heartbeats
        except BaseException:
            if peer.shared is not None:
                peer.shared.withdraw(places)
            raise

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
                if peer is not None and peer.shared is not None:
                    frames = peer.shared.fetch(frames)
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
                    peer.pid, peer.shares_memory = message.pid, message.shares_memory
                    await self._answer_now(identity, head.id, Done())
                    peer.ready.set()
                case Heartbeat() if head.to == SUPERVISOR and head.kind is Kind.TELL:
                    peer.step, peer.breakers = message.step, message.breakers
                    beat = self._codec.head(Kind.TELL, UNKNOWN_ID, to=peer.name, sender=SUPERVISOR)
                    await self._try_send(identity, self._codec.encode(beat, HeartbeatReceived()))
                case Reply() if head.kind is Kind.REPLY:
                    unhandled = peer.settle(head.id, message)
                    if unhandled is not None and isinstance(message, ErrorReply):
                        self._bury_unhandled(peer, unhandled, message)
                case _:
                    await self._take_in(peer, head, message)

    def _bury_unhandled(self, peer: Peer, envelope: Envelope, why: ErrorReply) -> None:
        told = why.fields.get("reason")
        reason = next((known for known in BURIED_BY_LINK if known == told), Reason.HANDLER_FAILED)
        head = self._codec.head(Kind.TELL, UNKNOWN_ID, to=peer.name, sender=envelope.sender)
        self._bury(reason, head, envelope.message, why.message)

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
