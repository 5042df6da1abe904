"""A large payload from the daemon to a process of its own: inside the message, as a frame beside it, through shared memory.

One daemon, one process actor, one message at a time; the three ways take turns. What is timed is an ask that carries the bytes,
with a small answer: encoded, sent, received, decoded, handed to a handler as ``bytes``. The first message through shared memory
is told apart: it is the first to use those pages.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time

import harness
import uvloop

from esperd.actors import codec, shared
from esperd.actors.incarnation import Incarnation
from esperd.actors.link import Link
from esperd.actors.spec import ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.messages import Done, ErrorReply, Message
from esperd.messages.control import Heartbeat, HeartbeatReceived, Ready, Stop

SIZES = (65_536, 250_000, 1_000_000, 4_000_000, 16_000_000, 60_000_000, 256_000_000)
QUICK_SIZES = SIZES[:5]
MOVED = 100_000_000
"""Bytes a round moves for each size and way, at least 5 messages and at most 100."""
NEVER = 2**40
WAYS = {"inside": (NEVER, NEVER), "frame": (codec.OUT_OF_BAND_BYTES, NEVER), "shared": (codec.OUT_OF_BAND_BYTES, 65_536)}
"""From which size on a payload is a frame, and from which it is shared."""


class Load(Message, frozen=True, kw_only=True):
    """Bytes."""

    body: bytes


CODEC = codec.Codec((Load, Done, ErrorReply, Heartbeat, HeartbeatReceived, Ready, Stop))


def choose(way: str) -> None:
    """From now on, send large payloads this way."""
    codec.OUT_OF_BAND_BYTES, shared.SHARED_BYTES = WAYS[way]


async def serve() -> None:
    """The process: takes what it is sent."""

    async def take(message: Message) -> None:
        assert isinstance(message, Load)

    async with Link(Incarnation.from_environment(), take, codec=CODEC) as link:
        await link.stop_requested.wait()


async def measure(sizes: tuple[int, ...], rounds: int) -> dict[tuple[int, str], list[float]]:
    """Milliseconds by size and way, one median a round; ``first`` is one message a round, through memory not used before."""
    found: dict[tuple[int, str], list[float]] = {}
    for size in sizes:
        body = os.urandom(size)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="esperd-bench-") as directory:
                async with ActorSystem(workers_endpoint=f"ipc://{directory}/w", codec=CODEC) as system:
                    await system.start(ProcessSpec("taker", [sys.executable, __file__, "serve"]))
                    if size < shared.SEGMENT_BYTES:
                        choose("shared")
                        found.setdefault((size, "first"), []).append(await timed(system, body))
                    times: dict[str, list[float]] = {}
                    for _ in range(max(5, min(100, MOVED // size))):
                        for way in WAYS if size < shared.SEGMENT_BYTES else ("inside", "frame"):
                            choose(way)
                            times.setdefault(way, []).append(await timed(system, body))
                    for way, taken in times.items():
                        found.setdefault((size, way), []).append(statistics.median(taken[1:]))
        told = ", ".join(f"{way} {statistics.median(found[size, way]):.2f} ms" for at, way in found if at == size)
        print(f"{size:>11,} B: {told}", file=sys.stderr)
    return found


async def timed(system: ActorSystem, body: bytes) -> float:
    """Milliseconds that one message takes."""
    began = time.perf_counter()
    await system.ask("taker", Load(body=body))
    return (time.perf_counter() - began) * 1e3


def figures(found: dict[tuple[int, str], list[float]]) -> list[harness.Figure]:
    """A frame over the inside of a message, shared memory over a frame."""
    pairs = (("frame", "inside"), ("shared", "frame"), ("first", "frame"))
    return [
        harness.median_figure(
            f"{size} B {way}", found[size, way], unit="ms", better="lower", against=other, baseline=found[size, other]
        )
        for way, other in pairs
        for size in sorted({size for size, _ in found})
        if (size, way) in found
    ]


def main() -> None:
    """Measure, compare, print, write."""
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=5, quick_repeats=1)
    sizes = QUICK_SIZES if chosen.quick else SIZES
    with open(os.devnull, "w") as nothing:  # noqa: PTH123 - a descriptor
        keep, told = os.dup(1), nothing.fileno()
        os.dup2(told, 1)  # the actor system logs there
        try:
            measured = uvloop.run(measure(sizes, chosen.repeats))
        finally:
            os.dup2(keep, 1)
    found = harness.results("frames", figures(measured), quick=chosen.quick, settings={"rounds": chosen.repeats})
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        asyncio.run(serve())
    else:
        main()
