"""A message on its way inside one process, with the place where its answer is awaited."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from esperd.actors.mailbox import payload_bytes
from esperd.actors.outcome import error_reply
from esperd.messages import Message, Reply


@dataclass(eq=False, slots=True)
class Envelope:
    """One ask or tell.

    Args:
        message: what is said.
        sender: name of the actor, or of whatever else, that says it.
        answer: settled with the reply (an :class:`~esperd.messages.ErrorReply` for a failure); None for a tell.
        deadline: when the asker gives up, in the event loop's time; None for a tell.
        trace: ``traceparent`` of the span it was sent from; empty: nobody traces it.
        sent_at: when it was made, by ``time.perf_counter``.
    """

    message: Message
    sender: str
    answer: asyncio.Future[Reply] | None = None
    deadline: float | None = None
    trace: str = ""
    sent_at: float = field(default_factory=time.perf_counter)

    @property
    def size_bytes(self) -> int:
        """Payload bytes it adds to a mailbox."""
        return payload_bytes(self.message)

    @property
    def is_abandoned(self) -> bool:
        """Whether its asker no longer waits."""
        return self.answer is not None and self.answer.done()

    def settle(self, reply: Reply) -> None:
        """Give the asker its answer; nothing happens when nobody waits."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(reply)

    def fail(self, error: BaseException, actor: str) -> None:
        """Give the asker an error instead of an answer."""
        self.settle(error_reply(error, actor=actor, message=self.message))
