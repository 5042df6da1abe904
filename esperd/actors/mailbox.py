"""A bounded queue for one reader: full by count or by bytes, senders wait their turn, control mail overtakes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import anyio
import msgspec

from esperd.errors import ActorUnavailable, Busy

MAX_MESSAGES = 1_024
MAX_BYTES = 64 * 1024 * 1024
MAX_CONTROL = 1_024
RETRY_AFTER_S = 0.1
"""What a refused sender is told to wait; chosen, not measured."""

ItemT = TypeVar("ItemT")


class MailboxStatistics(NamedTuple):
    """A mailbox at one moment."""

    depth: int
    #: messages waiting, control mail included
    size_bytes: int
    #: payload bytes of the waiting messages, as far as known
    waiting_senders: int
    #: senders held back because the mailbox is full
    refused: int
    #: messages turned away with ``busy`` since it was made


def payload_bytes(message: msgspec.Struct) -> int:
    """Bytes a message carries in its own byte fields: what makes one large. Other fields count as nothing."""
    return sum(
        len(value)
        for name in message.__struct_fields__
        if isinstance(value := getattr(message, name), bytes | bytearray | memoryview)
    )


@dataclass(eq=False)
class _Sender(Generic[ItemT]):
    """Somebody whose message does not fit yet."""

    item: ItemT
    size_bytes: int
    admitted: anyio.Event = field(default_factory=anyio.Event)


class Mailbox(Generic[ItemT]):
    """First in, first out, per lane.

    A message larger than ``max_bytes`` is admitted when nothing else waits: refusing it for ever would be a deadlock.

    Args:
        name: whose mailbox, for errors.
        max_messages: messages the ordinary lane holds.
        max_bytes: payload bytes the ordinary lane holds.
        max_control: messages the control lane holds.
    """

    def __init__(
        self,
        name: str,
        *,
        max_messages: int = MAX_MESSAGES,
        max_bytes: int = MAX_BYTES,
        max_control: int = MAX_CONTROL,
    ) -> None:
        self.name = name
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._max_control = max_control
        self._control: deque[ItemT] = deque()
        self._ordinary: deque[tuple[ItemT, int]] = deque()
        self._senders: deque[_Sender[ItemT]] = deque()
        self._size_bytes = 0
        self._refused = 0
        self._closed = False
        self._reader: asyncio.Future[None] | None = None

    def statistics(self) -> MailboxStatistics:
        """Depth and bytes now."""
        return MailboxStatistics(
            depth=len(self._control) + len(self._ordinary),
            size_bytes=self._size_bytes,
            waiting_senders=len(self._senders),
            refused=self._refused,
        )

    def try_put(self, item: ItemT, *, size_bytes: int = 0) -> bool:
        """Add an item if it fits now; False when it would have to wait.

        Raises:
            ActorUnavailable: when the mailbox is closed.
        """
        self._require_open()
        if self._senders or not self._has_room(size_bytes):
            return False
        self._admit(item, size_bytes)
        return True

    async def put(self, item: ItemT, *, size_bytes: int = 0) -> None:
        """Add an item, waiting for room, behind whoever waits already.

        Raises:
            ActorUnavailable: when the mailbox is or becomes closed before the item is in it.
        """
        if self.try_put(item, size_bytes=size_bytes):
            return
        sender = _Sender(item, size_bytes)
        self._senders.append(sender)
        try:
            await sender.admitted.wait()
        except BaseException:
            if sender in self._senders:
                self._senders.remove(sender)
                self._admit_senders()
            raise
        if sender in self._senders:
            self._senders.remove(sender)
            self._require_open()

    def put_nowait(self, item: ItemT, *, size_bytes: int = 0) -> None:
        """Add an item if it fits now.

        Raises:
            Busy: when the mailbox is full, or others wait for room.
            ActorUnavailable: when it is closed.
        """
        if not self.try_put(item, size_bytes=size_bytes):
            self._refused += 1
            raise self._busy()

    def put_control(self, item: ItemT) -> None:
        """Add an item that overtakes every ordinary one.

        Raises:
            Busy: when the control lane is full.
            ActorUnavailable: when the mailbox is closed.
        """
        self._require_open()
        if len(self._control) >= self._max_control:
            self._refused += 1
            raise self._busy()
        self._control.append(item)
        self._wake_reader()

    async def get(self) -> ItemT:
        """The next item, control mail first. One reader at a time."""
        while not self._control and not self._ordinary:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._control:
            return self._control.popleft()
        item, size_bytes = self._ordinary.popleft()
        self._size_bytes -= size_bytes
        self._admit_senders()
        return item

    def drop_control(self, unwanted: Callable[[ItemT], bool]) -> None:
        """Forget control mail that no longer applies, such as a stop meant for an incarnation that is gone."""
        self._control = deque(item for item in self._control if not unwanted(item))

    def close(self) -> list[ItemT]:
        """Take no more mail, wake every waiting sender with an error, and return what was not read."""
        self._closed = True
        unread = [*self._control, *(item for item, _ in self._ordinary)]
        self._control.clear()
        self._ordinary.clear()
        self._size_bytes = 0
        for sender in self._senders:
            sender.admitted.set()
        return unread

    def _has_room(self, size_bytes: int) -> bool:
        if len(self._ordinary) >= self._max_messages:
            return False
        return not self._ordinary or self._size_bytes + size_bytes <= self._max_bytes

    def _admit(self, item: ItemT, size_bytes: int) -> None:
        self._ordinary.append((item, size_bytes))
        self._size_bytes += size_bytes
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _admit_senders(self) -> None:
        while self._senders and self._has_room(self._senders[0].size_bytes):
            sender = self._senders.popleft()
            self._admit(sender.item, sender.size_bytes)
            sender.admitted.set()

    def _require_open(self) -> None:
        if self._closed:
            raise ActorUnavailable(f"{self.name} has stopped and takes no more messages", actor=self.name)

    def _busy(self) -> Busy:
        return Busy(
            f"the mailbox of {self.name} is full ({len(self._ordinary)} messages, {self._size_bytes} bytes); "
            f"try again in {RETRY_AFTER_S} s",
            actor=self.name,
            retry_after_s=RETRY_AFTER_S,
        )
