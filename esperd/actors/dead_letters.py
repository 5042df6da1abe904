"""Messages that reached nobody, or whose handler failed: the last thousand within 16 MiB, and counts of all."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from esperd.errors import NothingToShow
from esperd.messages import Message

KEPT = 1_000
MAX_BYTES = 16 * 1024 * 1024
"""Bytes of messages kept, as they are on the wire; chosen, not measured."""


class Reason(enum.StrEnum):
    """Why a message died."""

    NO_SUCH_ACTOR = "no_such_actor"
    ACTOR_STOPPED = "actor_stopped"
    HANDLER_FAILED = "handler_failed"
    NOT_HANDLED = "not_handled"
    EXPIRED = "expired"
    """Its asker gave up before its turn came."""
    MAILBOX_FULL = "mailbox_full"
    UNDECODABLE = "undecodable"
    UNENCODABLE = "unencodable"
    STALE_GENERATION = "stale_generation"
    PROCESS_DIED = "process_died"
    """It was sent to a process that ended before it said that the message was handled."""


BURIED_BY_LINK = (Reason.MAILBOX_FULL, Reason.NOT_HANDLED)
"""What the far side of a link says, in the field ``reason`` of its error, of a tell that no handler began. Any other error is the
handler's own.
"""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """One of them."""

    at: float
    """Seconds since the epoch."""
    reason: Reason
    to: str
    sender: str
    message: Message | None
    """None when it could not be decoded."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A dead letter under its number."""

    id: int
    letter: DeadLetter
    size_bytes: int | None
    """Of its message on the wire; None when it has no form there."""


class DeadLetters:
    """The last ones, and a count of all by reason.

    Args:
        kept: letters kept at most.
        max_bytes: bytes of their messages kept at most. A message that is larger by itself is forgotten, its letter is kept.
    """

    def __init__(self, kept: int = KEPT, max_bytes: int = MAX_BYTES) -> None:
        self._most = kept
        self._max_bytes = max_bytes
        self._kept: dict[int, Kept] = {}
        self._size_bytes = 0
        self._last_id = 0
        self._counts: Counter[Reason] = Counter()

    def add(self, letter: DeadLetter) -> None:
        """Count it and keep it, in the oldest ones' place when there is no room."""
        self._counts[letter.reason] += 1
        self._last_id += 1
        size_bytes = wire_bytes(letter.message)
        if size_bytes is not None and size_bytes > self._max_bytes:
            letter = replace(letter, message=None, detail=f"{letter.detail} (message of {size_bytes} bytes not kept)".strip())
        self.put_back(Kept(id=self._last_id, letter=letter, size_bytes=size_bytes))

    def get(self, letter_id: int) -> Kept:
        """One of those kept.

        Raises:
            NothingToShow: when it is not kept, or not any more.
        """
        found = self._kept.get(letter_id)
        if found is None:
            raise NothingToShow(
                f"there is no dead letter {letter_id}; `esper dead-letters list` shows the {len(self._kept)} that are kept",
                id=letter_id,
            )
        return found

    def take(self, letter_id: int) -> Kept:
        """Like :meth:`get`; it is not kept any more.

        Raises:
            NothingToShow: when it is not kept, or not any more.
        """
        found = self.get(letter_id)
        del self._kept[letter_id]
        self._size_bytes -= self._held(found)
        return found

    def put_back(self, kept: Kept) -> None:
        """Keep a letter that was taken, under its number."""
        self._kept[kept.id] = kept
        self._size_bytes += self._held(kept)
        while len(self._kept) > self._most or self._size_bytes > self._max_bytes:
            self.take(min(self._kept))

    def clear(self) -> int:
        """Forget all; returns how many there were."""
        dropped = len(self._kept)
        self._kept.clear()
        self._size_bytes = 0
        return dropped

    def newest(self, limit: int) -> tuple[Kept, ...]:
        """Those kept, newest first."""
        return tuple(self._kept[letter_id] for letter_id in sorted(self._kept, reverse=True)[:limit])

    @property
    def counts(self) -> dict[str, int]:
        """How many died of what, since the start."""
        return {reason.value: number for reason, number in self._counts.items()}

    def __iter__(self) -> Iterator[DeadLetter]:
        return iter(tuple(kept.letter for kept in self._kept.values()))

    def __len__(self) -> int:
        return len(self._kept)

    def _held(self, kept: Kept) -> int:
        return (kept.size_bytes or 0) if kept.letter.message is not None else 0


def wire_bytes(message: Message | None) -> int | None:
    """Bytes of a message on the wire; None without a message, or when it has no form there."""
    if message is None:
        return None
    try:
        return len(msgspec.msgpack.encode(message))
    except (TypeError, ValueError, OverflowError, RecursionError):
        return None
