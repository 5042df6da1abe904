"""A drained socket: nothing is lost, nobody sleeps through a change, everybody has a turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvloop
import zmq

from esperd.actors.channel import BUDGET, Channel

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
LIMIT_S = 30.0


@pytest.fixture(params=LOOPS)
def run(request):
    """Runs a coroutine on one of the event loops the product runs on."""

    def on_loop(work: Coroutine[Any, Any, None]) -> None:
        async def limited() -> None:
            with anyio.fail_after(LIMIT_S):
                await work

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(limited())

    return on_loop


@contextlib.contextmanager
def pair(directory: Path, high_water_mark: int = 0) -> Generator[tuple[Channel, Channel], None, None]:
    """A reader and a writer."""
    reading, writing = zmq.Context.instance().socket(zmq.PULL), zmq.Context.instance().socket(zmq.PUSH)
    for socket in (reading, writing):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, high_water_mark)
        socket.setsockopt(zmq.SNDHWM, high_water_mark)
    writing.setsockopt(zmq.IMMEDIATE, 1)
    reading.bind(f"ipc://{directory}/s")
    writing.connect(f"ipc://{directory}/s")
    with contextlib.closing(Channel(reading)) as reader, contextlib.closing(Channel(writing)) as writer:
        yield reader, writer


def test_receives_that_are_cancelled_as_messages_arrive_lose_none(run, tmp_path):
    messages = 3_000

    async def work() -> None:
        with pair(tmp_path) as (reader, writer):

            async def send() -> None:
                for number in range(messages):
                    await writer.send([b"%d" % number])
                    if number % 7 == 0:
                        await asyncio.sleep(0)

            sending = asyncio.create_task(send())
            received: list[int] = []
            cancelled = 0
            while len(received) < messages:
                try:
                    async with asyncio.timeout(0.0002 * (cancelled % 3)):
                        while len(received) < messages:
                            received.append(int((await reader.receive())[0]))
                except TimeoutError:
                    cancelled += 1
            await sending
            assert received == list(range(messages))
            assert cancelled

    run(work())


def test_a_sender_that_waits_for_its_peer_wakes_whatever_is_read_and_sent_beside_it(run, tmp_path):
    async def work() -> None:
        for attempt in range(60):
            directory = tmp_path / str(attempt)
            directory.mkdir()
            with pair(directory) as (reader, writer):
                await writer.send([b"first"])  # the connection is not there yet: there is no room until it is
                assert await reader.receive() == [b"first"]

    run(work())


def test_a_full_queue_holds_the_sender_and_nothing_is_dropped(run, tmp_path):
    async def work() -> None:
        with pair(tmp_path, high_water_mark=10) as (reader, writer):
            await writer.send([b"0"])
            accepted = 1
            with contextlib.suppress(zmq.Again):
                while True:
                    writer.send_now([b"%d" % accepted])
                    accepted += 1
            last = asyncio.create_task(writer.send([b"last"]))
            got = [(await reader.receive())[0] for _ in range(accepted + 1)]
            await last
            assert got == [*(b"%d" % number for number in range(accepted)), b"last"]

    run(work())


def test_a_channel_that_is_closed_says_so_to_whoever_waits_and_to_whoever_comes_later(run, tmp_path):
    async def work() -> None:
        with pair(tmp_path) as (reader, writer):
            await writer.send([b"one"])
            assert await reader.receive() == [b"one"]
            reader.close()
            with pytest.raises(zmq.ZMQError) as closed:
                await reader.receive()
            assert closed.value.errno == zmq.ENOTSOCK
        directory = tmp_path / "waiting"
        directory.mkdir()
        with pair(directory) as (reader, _):
            waiting = asyncio.create_task(reader.receive())
            await asyncio.sleep(0)
            reader.close()
            with pytest.raises(zmq.ZMQError):
                await waiting

    run(work())


def test_a_reader_that_always_finds_messages_gives_others_their_turn(run, tmp_path):
    async def work() -> None:
        with pair(tmp_path) as (reader, writer):
            for _ in range(3 * BUDGET):
                await writer.send([b""])
            turns = 0

            async def count() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            counting = asyncio.create_task(count())
            await asyncio.sleep(0.05)  # everything is there
            before = turns
            for _ in range(3 * BUDGET):
                await reader.receive()
            assert turns > before
            counting.cancel()

    run(work())


def test_who_waits_on_a_channel_that_is_closed_finds_it_closed(run, tmp_path):
    async def work() -> None:
        with pair(tmp_path) as (reader, _):
            waiting = asyncio.create_task(reader.receive())
            await asyncio.sleep(0)
            reader.close()
            with pytest.raises(zmq.ZMQError) as failure:
                await waiting
            assert failure.value.errno == zmq.ENOTSOCK

    run(work())
