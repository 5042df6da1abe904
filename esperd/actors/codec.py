"""Messages to frames and back: ``[head][body]``, both msgpack, nothing decoded that is not a message of this protocol."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated, Union

import msgspec

from esperd.errors import MalformedMessage, ProtocolMismatch
from esperd.messages import MESSAGE_TYPES, PROTOCOL_VERSION, Message
from esperd.tracing import LONGEST_TRACEPARENT

LARGEST_ID = 2**63 - 1
UNKNOWN_ID = 0
"""Correlation id of an answer to a frame whose own id could not be read. Senders count from 1."""

UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises on hostile bytes: one corrupt frame in five is a UnicodeDecodeError, deep nesting a RecursionError;
neither is a msgspec.DecodeError (measured)."""

CorrelationId = Annotated[int, msgspec.Meta(ge=0, le=LARGEST_ID)]


class Kind(enum.IntEnum):
    """What a frame wants."""

    ASK = 1
    """An answer: a reply or an error, carrying the same id."""
    TELL = 2
    """Nothing back."""
    REPLY = 3


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
        self._message_types = frozenset(message_types)
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
            MalformedMessage: when the message's type is not one this codec knows, or a value in it has no msgpack form.
        """
        if type(message) not in self._message_types:
            raise MalformedMessage(
                f"{type(message).__name__} is not a message of this protocol; add it to esperd.messages",
                type=type(message).__name__,
            )
        try:
            return [self._encoder.encode(head), self._encoder.encode(message)]
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise MalformedMessage(
                f"{type(message).__name__} holds a value that cannot be sent: {error}", type=type(message).__name__
            ) from error

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
        if len(frames) != 2:
            raise MalformedMessage(f"a message has 2 frames, head and body; got {len(frames)}", frames=len(frames))
        try:
            opening = self._opening.decode(frames[0])
        except UNDECODABLE as error:
            raise MalformedMessage(f"the head is not readable: {error}") from error
        if opening.protocol != self.protocol:
            older = "the peer" if opening.protocol < self.protocol else "this side"
            raise ProtocolMismatch(
                f"the peer speaks protocol {opening.protocol}, this side {self.protocol}; upgrade esperd on {older}",
                peer=opening.protocol,
                own=self.protocol,
            )
        try:
            head = self._head.decode(frames[0])
            message: Message = self._body.decode(frames[1])
        except UNDECODABLE as error:
            raise MalformedMessage(f"not a message of protocol {self.protocol}: {error}") from error
        return head, message
