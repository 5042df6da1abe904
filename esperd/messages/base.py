"""What every message is: a frozen, tagged Struct that knows no torch and survives a round trip through msgpack."""

from __future__ import annotations

from typing import TypeVar

import msgspec

LARGEST_INTEGER = 2**63 - 1
"""Of SQLite, which keeps what messages number: sequences, offsets."""

PROTOCOL_VERSION = 2
"""Version of frames and messages: since 2 large byte fields are frames of their own. A
peer that speaks another one is refused with ``protocol_mismatch``."""


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message; never sent alone."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Something one actor says to another. The tag on the wire is the class name."""


class Reply(Message, frozen=True, kw_only=True):
    """An answer to an ask."""


MessageT = TypeVar("MessageT", bound=Message)


class Done(Reply, frozen=True, kw_only=True):
    """The request was carried out; there is nothing more to say."""


class ErrorReply(Reply, frozen=True, kw_only=True):
    """A typed error as a value: the ``code`` names a class of :mod:`esperd.errors`."""

    code: str
    message: str
    fields: dict[str, str | int | float | bool | list[str] | None] = {}
