"""A ZeroMQ socket on the event loop that is drained: whatever is there is read without a turn of the loop for each message.

``zmq.asyncio`` makes a future, and takes a turn of the loop, for every message. Here the socket's file descriptor only wakes
whoever waits; messages are then taken until there are none. Three rules keep that right. The descriptor tells of changes and
not of states, so that everything must be read before waiting, and whoever tried in vain looks again once it is known to wait:
a send or a receive may have consumed the change that another waits for. A message leaves the socket in the very step that
returns it: a receive that is cancelled has taken nothing. And after ``BUDGET`` messages in one go everybody else has a turn.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import zmq

BUDGET = 256
"""Messages read without giving other tasks a turn; chosen, not measured."""

# As plain integers: pyzmq's flags are enums, and a message would pay 30 us for arithmetic with them (measured).
_NO_WAIT, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_READABLE, _WRITABLE, _EVENTS = int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.EVENTS)
_COPIED_BYTES = int(zmq.COPY_THRESHOLD)


class Channel:
    """A socket that is read by one task and written by any, on the event loop that is running when it is made.

    Args:
        socket: bound or connected; it belongs to the channel from now on.
        names_senders: each message is followed by one frame more: the user id that ZAP gave to the connection it came by.
    """

    def __init__(self, socket: zmq.Socket[bytes], *, names_senders: bool = False) -> None:
        self._socket = socket
        self._take = self._take_named if names_senders else self._take_plain
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._taken = 0
        self._expects = True
        self._flows = False
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._wake)

    async def receive(self) -> list[bytes]:
        """The next message's frames. Cancelled, it has taken none.

        Raises:
            zmq.ZMQError: ``ENOTSOCK`` when the channel is closed.
        """
        while True:
            if self._taken >= BUDGET:
                self._taken = 0
                await asyncio.sleep(0)
            if self._expects:
                try:
                    frames = self._take()
                except zmq.Again:
                    pass
                else:
                    self._taken += 1
                    # An attempt in vain costs twice what a look does: where messages come one by one, it is looked first.
                    self._expects = self._flows
                    if self._writers:
                        self._wake()
                    return frames
            self._reader = self._loop.create_future()
            try:
                self._wake()  # the attempt may have consumed the change that a writer waits for
                self._flows = self._reader.done()
                if not self._flows:
                    self._taken = 0
                    await self._reader
            finally:
                self._reader = None
            self._expects = True

    def _take_plain(self) -> list[bytes]:
        frame = self._socket.recv(_NO_WAIT, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_NO_WAIT, copy=False)
            frames.append(frame.bytes)
        return frames

    def _take_named(self) -> list[bytes]:
        frames = self._socket.recv_multipart(_NO_WAIT, copy=False)
        # pyzmq raises when there is no such property; the gate gives every connection one.
        return [*(frame.bytes for frame in frames), str(frames[-1].get("User-Id")).encode()]

    def send_now(self, frames: Sequence[bytes]) -> None:
        """Hand frames to ZeroMQ; those of 64 KiB and more are not copied.

        Raises:
            zmq.Again: when the peer's queue is full, or there is no peer to queue for.
            zmq.ZMQError: ``EHOSTUNREACH`` when a ROUTER knows no such peer, ``ENOTSOCK`` when the channel is closed.
        """
        send = self._socket.send
        last = len(frames) - 1
        try:
            for number, frame in enumerate(frames):
                send(frame, _NO_WAIT if number == last else _MORE, copy=len(frame) < _COPIED_BYTES)
        finally:
            if self._reader is not None or self._writers:
                self._wake()

    async def send(self, frames: Sequence[bytes]) -> None:
        """Hand frames to ZeroMQ, waiting while the queue is full. Cancelled, it has sent nothing.

        Raises:
            zmq.ZMQError: as :meth:`send_now`, but for ``Again``.
        """
        while True:
            try:
                return self.send_now(frames)
            except zmq.Again:
                room: asyncio.Future[None] = self._loop.create_future()
                self._writers.append(room)
                self._wake()  # there may be room since the attempt, and the news of it consumed by now
                try:
                    await room
                finally:
                    if room in self._writers:
                        self._writers.remove(room)

    def monitored(self, events: int) -> Channel:
        """What ZeroMQ tells of this socket's connections, as messages of a channel of its own."""
        return monitor_of(self._socket, events)

    def close(self) -> None:
        """Close the socket; who waits finds it closed. Safe to call twice."""
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        self._socket.close()
        self._release(reader=True, writers=True)

    def _wake(self) -> None:
        """Something changed. Reading ``EVENTS`` consumes the change, so that both sides are looked after."""
        if self._socket.closed:
            self._release(reader=True, writers=True)  # they find it closed
            return
        events = int(self._socket.get(_EVENTS))
        self._release(reader=bool(events & _READABLE), writers=bool(events & _WRITABLE))

    def _release(self, *, reader: bool, writers: bool) -> None:
        if reader and self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        if writers:
            waiting, self._writers = self._writers, []
            for room in waiting:
                if not room.done():
                    room.set_result(None)


def monitor_of(socket: zmq.Socket[Any], events: int) -> Channel:
    """What ZeroMQ tells of a socket's connections: messages for ``zmq.utils.monitor.parse_monitor_message``.

    Args:
        socket: any socket; it is monitored until it is closed, or told otherwise.
        events: which ones, ``zmq.EVENT_…`` added up.
    """
    address = f"inproc://monitor-{secrets.token_hex(8)}"
    socket.monitor(address, events)
    monitor: zmq.Socket[bytes] = zmq.Socket(zmq.Context.shadow(socket.context.underlying), zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(address)
    return Channel(monitor)
