"""Messages that reached nobody, or whose handler failed: the last thousand, and counts of all."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from esperd.messages import Message

KEPT = 1_000


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


class DeadLetters:
    """A ring of the last ones, and a count of all by reason."""

    def __init__(self, kept: int = KEPT) -> None:
        self._ring: deque[DeadLetter] = deque(maxlen=kept)
        self._counts: Counter[Reason] = Counter()

    def add(self, letter: DeadLetter) -> None:
        """Count it and keep it, in the oldest one's place when the ring is full."""
        self._ring.append(letter)
        self._counts[letter.reason] += 1

    @property
    def counts(self) -> dict[str, int]:
        """How many died of what, since the start."""
        return {reason.value: number for reason, number in self._counts.items()}

    def __iter__(self) -> Iterator[DeadLetter]:
        return iter(tuple(self._ring))

    def __len__(self) -> int:
        return len(self._ring)
