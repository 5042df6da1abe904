"""What people and the daemon say about messages that reached nobody, or whose handler failed."""

from __future__ import annotations

from typing import Annotated

import msgspec

from esperd.messages.base import LARGEST_INTEGER, Message, Reply, Value

LetterId = Annotated[int, msgspec.Meta(ge=1, le=LARGEST_INTEGER)]


class DeadLetterSummary(Value, frozen=True, kw_only=True):
    """One dead letter, without what it says."""

    id: int
    """Counted from 1 since the daemon started; never given twice."""
    at: float
    """When it died, seconds since the epoch."""
    age_s: float
    reason: str
    message_type: str | None
    """None: it could not be decoded."""
    sender: str
    to: str
    size_bytes: int | None
    """Of its message on the wire; None when it has no form there, or was never read."""
    detail: str
    can_retry: bool
    """Whether its message was kept."""


class ListDeadLetters(Message, frozen=True, kw_only=True):
    """Ask for the dead letters that are kept, newest first; answered by :class:`DeadLetterList`."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 100


class DeadLetterList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListDeadLetters`."""

    letters: tuple[DeadLetterSummary, ...]
    counts: dict[str, int]
    """All that died since the daemon started, by reason; more than are kept."""


class ShowDeadLetter(Message, frozen=True, kw_only=True):
    """Ask for one dead letter with its message; answered by :class:`DeadLetterShown`."""

    id: LetterId


class DeadLetterShown(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ShowDeadLetter`."""

    letter: DeadLetterSummary
    body: str | None
    """The message as JSON, cut where it is long; None when it was not kept."""


class RetryDeadLetter(Message, frozen=True, kw_only=True):
    """Deliver a dead letter's message to whoever bears its address now, as an ask: the answer, or the error, is the
    answer to this request, and a handler that fails again ends no actor.
    """

    id: LetterId


class DropDeadLetters(Message, frozen=True, kw_only=True):
    """Forget one dead letter, or all; answered by :class:`DeadLettersDropped`. Counts stay."""

    id: LetterId | None = None
    """None: all."""


class DeadLettersDropped(Reply, frozen=True, kw_only=True):
    """Answer to :class:`DropDeadLetters`."""

    dropped: int
