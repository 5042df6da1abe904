"""A bad line between a client and a daemon: frames are dropped, doubled, swapped and cut short."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import zmq
import zmq.asyncio

FAULTS = ("drop request", "drop answer", "double request", "double answer", "swap request", "cut request", "cut answer")


class BadLine:
    """What went over it.

    Args:
        rng: draws which messages suffer, and how.
        share: of messages that do.
    """

    def __init__(self, rng: random.Random, share: float) -> None:
        self._rng = rng
        self._share = share
        self.injected: list[str] = []
        """Faults so far, in order."""
        self._held: list[bytes] | None = None

    def carry(self, direction: str, frames: list[bytes]) -> list[list[bytes]]:
        """What comes out at the other end for a message: nothing, one or several.

        Args:
            direction: ``request`` or ``answer``.
            frames: the message; the first frame of it is the client's address.
        """
        held, self._held = self._held, None
        arrives = self._hurt(direction, frames) if self._rng.random() < self._share else [frames]
        return [*arrives, held] if held is not None else arrives

    def _hurt(self, direction: str, frames: list[bytes]) -> list[list[bytes]]:
        fault = self._rng.choice(
            [name for name in FAULTS if name.endswith(direction) or (name, direction) == ("swap", "request")]
        )
        self.injected.append(fault)
        match fault.partition(" ")[0]:
            case "drop":
                return []
            case "double":
                return [frames, frames]
            case "swap":  # it arrives behind the next one
                self._held = frames
                return []
        place = self._rng.randrange(1, len(frames))
        return [[*frames[:place], frames[place][: len(frames[place]) // 2], *frames[place + 1 :]]]


@contextlib.asynccontextmanager
async def bad_line(front: str, behind: str, line: BadLine) -> AsyncIterator[None]:
    """A line from ``front`` to ``behind``, for as long as the block lasts.

    Args:
        front: endpoint that clients connect to.
        behind: endpoint of a daemon.
        line: does the damage.
    """
    context = zmq.asyncio.Context.instance()
    with contextlib.closing(context.socket(zmq.ROUTER)) as clients:
        clients.linger = 0
        clients.bind(front)
        servers: dict[bytes, zmq.asyncio.Socket] = {}
        reading: list[asyncio.Task[None]] = []

        async def answers(client: bytes, server: zmq.asyncio.Socket) -> None:
            while True:
                for frames in line.carry("answer", [client, *await server.recv_multipart()]):
                    await clients.send_multipart(frames)

        async def requests() -> None:
            while True:
                frames = await clients.recv_multipart()
                for client, *rest in line.carry("request", frames):
                    if client not in servers:
                        servers[client] = context.socket(zmq.DEALER)
                        servers[client].linger = 0
                        servers[client].connect(behind)
                        reading.append(asyncio.create_task(answers(client, servers[client])))
                    await servers[client].send_multipart(rest)

        reading.append(asyncio.create_task(requests()))
        try:
            yield
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            for server in servers.values():
                server.close()
