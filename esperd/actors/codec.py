"""Messages to frames and back: ``[head][body][buffer]…``; nothing is decoded that is not a message of this protocol.

Head and body are msgpack. What a message carries in byte fields of its own (a kernel's weights, a piece of an artifact, the state
of a policy) travels as a frame of its own from 64 KiB on: it is neither copied into the body nor out of it. The head says
which fields those frames are, and how many bytes each has; in the body such a field is empty.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_type_hints

import msgspec

from esperd.errors import MalformedMessage, ProtocolMismatch
from esperd.messages import MESSAGE_TYPES, PROTOCOL_VERSION, Message
from esperd.tracing import LONGEST_TRACEPARENT

LARGEST_ID = 2**63 - 1
UNKNOWN_ID = 0
"""Correlation id of an answer to a frame whose own id could not be read. Senders count from 1."""

ENVELOPE = 2
"""Frames of every message: head and body."""

UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises on hostile bytes: one corrupt frame in five is a UnicodeDecodeError, deep nesting a RecursionError;
neither is a msgspec.DecodeError (measured)."""

OUT_OF_BAND_BYTES = 64 * 1024
"""From here on bytes get a frame of their own. Up to here ZeroMQ copies frames as it does bodies, and it makes no difference;
from 1 MB on it halves the time (measured with ``bench/frames.py``)."""

LARGEST_FRAME_BYTES = 256 * 1024 * 1024
"""ZeroMQ ends the connection of a peer that sends a larger frame, before the bytes reach us: nobody of ours sends one."""

CorrelationId = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_ID)]


class Kind(enum.IntEnum):
    """What a frame wants."""

    ASK = 1
    """An answer: a reply or an error, carrying the same id."""
    TELL = 2
    """Nothing back."""
    REPLY = 3


class Buffer(msgspec.Struct, frozen=True, array_like=True):
    """A byte field of the message that travels as a frame of its own."""

    field: str
    size_bytes: Annotated[int, msgspec.Meta(ge=OUT_OF_BAND_BYTES)]


class Head(msgspec.Struct, frozen=True, array_like=True):
    """The envelope on the wire. Later versions may append fields; the first three keep their place and type for ever, so
    that any two versions can tell each other that they differ.
    """

    protocol: int
    kind: Kind
    id: CorrelationId
    """Unique among the sender's open asks; an answer repeats it."""
    to: str
    sender: str
    deadline_ms: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Milliseconds the asker still waits; None: it does not say."""
    trace: Annotated[str, msgspec.Meta(max_length=LONGEST_TRACEPARENT)] = ""
    """W3C ``traceparent`` of the span it was sent from; empty: nobody traces it. A peer that does not know it leaves it out, and
    skips it.
    """
    buffers: tuple[Buffer, ...] = ()
    """What the frames after the body are, in their order."""


class Opening(msgspec.Struct, frozen=True, array_like=True):
    """The part of a head that every protocol version shares."""

    protocol: int
    kind: int
    id: CorrelationId


class Codec:
    """Encodes and decodes the frames of one protocol version.

    Args:
        message_types: the messages it knows; anything else is malformed.
        protocol: the version it speaks.
    """

    def __init__(self, message_types: Sequence[type[Message]] = MESSAGE_TYPES, protocol: int = PROTOCOL_VERSION) -> None:
        self.protocol = protocol
        self._byte_fields = {message_type: _byte_fields(message_type) for message_type in message_types}
        self._encoder = msgspec.msgpack.Encoder()
        self._opening = msgspec.msgpack.Decoder(Opening)
        self._head = msgspec.msgpack.Decoder(Head)
        self._body = msgspec.msgpack.Decoder(Union[tuple(message_types)])  # noqa: UP007 - a union built at run time

    def head(
        self,
        kind: Kind,
        id: int,  # noqa: A002 - as the field is called
        *,
        to: str,
        sender: str,
        deadline_ms: int | None = None,
        trace: str = "",
    ) -> Head:
        """A head of this codec's protocol."""
        return Head(self.protocol, kind, id, to, sender, deadline_ms, trace)

    def encode(self, head: Head, message: Message) -> list[bytes]:
        """Frames of a message.

        Raises:
            MalformedMessage: when the message's type is not one this codec knows, a value in it has no msgpack form, or it is too
                large for the peer.
        """
        byte_fields = self._byte_fields.get(type(message))
        if byte_fields is None:
            raise MalformedMessage(
                f"{type(message).__name__} is not a message of this protocol; add it to esperd.messages",
                type=type(message).__name__,
            )
        large: dict[str, bytes] = {}
        for field in byte_fields:
            value = getattr(message, field)
            if len(value) >= OUT_OF_BAND_BYTES:
                large[field] = value
        body = message
        try:
            if large:
                head = msgspec.structs.replace(head, buffers=tuple(Buffer(field, len(value)) for field, value in large.items()))
                body = msgspec.structs.replace(message, **dict.fromkeys(large, b""))
            frames = [self._encoder.encode(head), self._encoder.encode(body), *large.values()]
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MalformedMessage(
                f"{type(message).__name__} holds a value that cannot be sent: {error}", type=type(message).__name__
            ) from error
        largest = max(map(len, frames))
        if largest > LARGEST_FRAME_BYTES:
            raise MalformedMessage(
                f"{type(message).__name__} has {largest} bytes in one piece, and a peer takes {LARGEST_FRAME_BYTES}",
                type=type(message).__name__,
                size_bytes=largest,
                limit_bytes=LARGEST_FRAME_BYTES,
            )
        return frames

    def opening(self, frames: Sequence[bytes]) -> Opening | None:
        """Protocol, kind and id of frames that may be of another version or broken; None when not even that is readable."""
        if not frames:
            return None
        try:
            return self._opening.decode(frames[0])
        except UNDECODABLE:
            return None

    def decode(self, frames: Sequence[bytes]) -> tuple[Head, Message]:
        """Head and message of frames.

        Raises:
            ProtocolMismatch: when the sender speaks another protocol version; names both.
            MalformedMessage: when the frames are anything but a message of this protocol.
        """
        if len(frames) < ENVELOPE:
            raise MalformedMessage(f"a message has 2 frames or more, head and body first; got {len(frames)}", frames=len(frames))
        try:
            head = self._head.decode(frames[0])
        except UNDECODABLE as error:
            self._require_protocol(frames[0])
            raise MalformedMessage(f"not a message of protocol {self.protocol}: {error}") from error
        if head.protocol != self.protocol:
            self._require_protocol(frames[0])
        try:
            message: Message = self._body.decode(frames[1])
        except UNDECODABLE as error:
            raise MalformedMessage(f"not a message of protocol {self.protocol}: {error}") from error
        if head.buffers or len(frames) > ENVELOPE:
            self._put_back(head, message, frames[ENVELOPE:])
        return head, message

    def _require_protocol(self, frame: bytes) -> None:
        try:
            opening = self._opening.decode(frame)
        except UNDECODABLE as error:
            raise MalformedMessage(f"the head is not readable: {error}") from error
        if opening.protocol != self.protocol:
            older = "the peer" if opening.protocol < self.protocol else "this side"
            raise ProtocolMismatch(
                f"the peer speaks protocol {opening.protocol}, this side {self.protocol}; upgrade esperd on {older}",
                peer=opening.protocol,
                own=self.protocol,
            )

    def _put_back(self, head: Head, message: Message, frames: Sequence[bytes]) -> None:
        """Give a message the bytes that travelled beside it."""
        name = type(message).__name__
        if len(head.buffers) != len(frames):
            raise MalformedMessage(
                f"{name} comes with {len(frames)} frames after its body, and its head names {len(head.buffers)}",
                frames=len(frames),
                named=len(head.buffers),
            )
        byte_fields = self._byte_fields[type(message)]
        for buffer, frame in zip(head.buffers, frames, strict=True):
            if buffer.field not in byte_fields or getattr(message, buffer.field):
                raise MalformedMessage(f"{name} has no empty field of bytes called {buffer.field[:64]!r}", type=name)
            if len(frame) != buffer.size_bytes:
                raise MalformedMessage(
                    f"{name}.{buffer.field} should have {buffer.size_bytes} bytes, and {len(frame)} came", type=name
                )
            msgspec.structs.force_setattr(message, buffer.field, frame)


def _byte_fields(message_type: type[Message]) -> tuple[str, ...]:
    hints: dict[str, Any] = get_type_hints(message_type)
    return tuple(field for field in message_type.__struct_fields__ if hints[field] is bytes)
