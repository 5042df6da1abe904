"""What people may do about dead letters: look at them, deliver one again, forget them."""

from __future__ import annotations

import msgspec

from esperd.actors.dead_letters import Kept
from esperd.actors.system import ActorSystem
from esperd.errors import Conflict, NothingToShow
from esperd.messages.base import Reply
from esperd.messages.dead_letters import (
    DeadLetterList,
    DeadLettersDropped,
    DeadLetterShown,
    DeadLetterSummary,
    DropDeadLetters,
    ListDeadLetters,
    RetryDeadLetter,
    ShowDeadLetter,
)
from esperd.messages.jobs import SubmitJob

SHOWN_CHARACTERS = 20_000
RETRY_TIMEOUT_S = 8.0
"""Below the 10 s that a client waits; chosen, not measured."""

Request = ListDeadLetters | ShowDeadLetter | RetryDeadLetter | DropDeadLetters


async def answer(system: ActorSystem, message: Request) -> Reply:
    """Answer a request about dead letters.

    Raises:
        NothingToShow: there is no such letter, or its message was not kept.
        Conflict: a submission is not delivered again by anybody but its client.
        ActorUnavailable: nobody bears the letter's address now; the letter is kept.
        AskTimeout: the retry was not answered in time; the letter is kept, and may yet be handled.
        EsperError: whatever the actor answered a retry with; the letter is kept.
    """
    letters, now = system.dead_letters, system.clock.wall()
    match message:
        case ShowDeadLetter():
            kept = letters.get(message.id)
            return DeadLetterShown(letter=_summary(kept, now), body=_body(kept))
        case RetryDeadLetter():
            return await _retry(system, message.id)
        case DropDeadLetters():
            if message.id is None:
                return DeadLettersDropped(dropped=letters.clear())
            letters.take(message.id)
            return DeadLettersDropped(dropped=1)
        case ListDeadLetters():
            newest = letters.newest(message.limit)
            return DeadLetterList(letters=tuple(_summary(kept, now) for kept in newest), counts=dict(letters.counts))


async def _retry(system: ActorSystem, letter_id: int) -> Reply:
    """Taken before it is delivered, so that two people who retry at once deliver it once; put back unless it was answered."""
    letters = system.dead_letters
    message = letters.get(letter_id).letter.message
    if message is None:
        raise NothingToShow(f"the message of dead letter {letter_id} was not kept: it cannot be delivered again", id=letter_id)
    if isinstance(message, SubmitJob):
        raise Conflict(
            f"dead letter {letter_id} is a submission: its client submits it again under its key, and is checked again then",
            id=letter_id,
        )
    kept = letters.take(letter_id)
    try:
        return await system.ask(kept.letter.to, message, RETRY_TIMEOUT_S)
    except BaseException:
        letters.put_back(kept)
        raise


def _summary(kept: Kept, now: float) -> DeadLetterSummary:
    letter = kept.letter
    return DeadLetterSummary(
        id=kept.id,
        at=letter.at,
        age_s=max(0.0, now - letter.at),
        reason=letter.reason.value,
        message_type=type(letter.message).__name__ if letter.message is not None else None,
        sender=letter.sender,
        to=letter.to,
        size_bytes=kept.size_bytes,
        detail=letter.detail,
        can_retry=letter.message is not None,
    )


def _body(kept: Kept) -> str | None:
    if kept.letter.message is None:
        return None
    try:
        text = msgspec.json.encode(kept.letter.message).decode()
    except (TypeError, ValueError, OverflowError, RecursionError):
        text = repr(kept.letter.message)  # it died because it has no form on the wire
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
