"""Asks that are answered beside the mail behind them, each kind up to its limit; see :func:`esperd.actors.actor.handles`."""

from __future__ import annotations

from collections import Counter

import anyio

from esperd.actors.mailbox import RETRY_AFTER_S
from esperd.errors import Busy
from esperd.messages import Message


class Beside:
    """Counts what one incarnation answers at the same time.

    Args:
        name: the actor's, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: Counter[type[Message]] = Counter()
        self._changed = anyio.Event()

    def enter(self, message: Message, limit: int) -> None:
        """Begin to answer a message.

        Raises:
            Busy: when ``limit`` of its kind are being answered.
        """
        kind = type(message)
        if self._running[kind] >= limit:
            raise Busy(
                f"{self._name} answers {limit} {kind.__name__} already; try again in {RETRY_AFTER_S} s",
                actor=self._name,
                retry_after_s=RETRY_AFTER_S,
            )
        self._running[kind] += 1

    def leave(self, message: Message) -> None:
        """A message that entered is answered."""
        self._running[type(message)] -= 1
        self._changed.set()

    async def ended(self) -> None:
        """Return once nothing is being answered."""
        while self._running.total():
            self._changed = anyio.Event()
            await self._changed.wait()
