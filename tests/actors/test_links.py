"""Links without processes: the same event loop, real sockets."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import zmq
import zmq.asyncio

from esperd.actors.codec import Codec, Head, Kind
from esperd.actors.dead_letters import Reason
from esperd.actors.incarnation import Incarnation
from esperd.actors.link import Link
from esperd.actors.mailbox import MAX_MESSAGES
from esperd.actors.spec import ProcessSpec
from esperd.actors.system import ActorSystem
from esperd.actors.threadlink import ThreadLink
from esperd.errors import ActorUnavailable, Busy, ConfigError, DaemonUnreachable, EsperError, MalformedMessage
from esperd.messages import Done, ErrorReply, Message, Reply
from esperd.messages.control import ActorState, Heartbeat, HeartbeatReceived, ListActors, Ready, Stop

CODEC = Codec()
PROGRAM = Path(__file__).with_name("process_program.py")


class FakeDaemon:
    """A ROUTER that answers Ready, Heartbeat and the flush; the test says the rest."""

    def __init__(self, directory: Path) -> None:
        self.router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self.endpoint = f"ipc://{directory}/hub.sock"
        self.router.bind(self.endpoint)
        self.identity = b""

    @property
    def incarnation(self) -> Incarnation:
        return Incarnation(
            hub=self.endpoint,
            actor="w",
            generation=1,
            token="t",
            heartbeat_interval_s=0.05,
            heartbeat_timeout_s=20.0,
        )

    async def answer(self) -> tuple[Head, Message]:
        """Keep the link alive until it says something of its own, and return that."""
        while True:
            self.identity, *frames = await self.router.recv_multipart()
            head, message = CODEC.decode(frames)
            if isinstance(message, Ready) or (isinstance(message, Heartbeat) and head.kind is Kind.ASK):
                await self.say(Kind.REPLY, head.id, Done())
            elif isinstance(message, Heartbeat):
                await self.say(Kind.TELL, 0, HeartbeatReceived())
            else:
                return head, message

    async def serve(self) -> None:
        while True:
            await self.answer()

    async def say(self, kind: Kind, number: int, message: Message) -> None:
        head = CODEC.head(kind, number, to="w", sender="other")
        await self.router.send_multipart([self.identity, *CODEC.encode(head, message)])

    async def garble(self, kind: Kind, number: int) -> None:
        head, _ = CODEC.encode(CODEC.head(kind, number, to="w", sender="other"), Done())
        await self.router.send_multipart([self.identity, head, b"\xff\xff"])


@contextlib.contextmanager
def fake_daemon(directory: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(directory)
    with contextlib.closing(daemon.router):
        yield daemon


async def ignore(message: Message) -> Reply | None:
    return None


@pytest.mark.asyncio
async def test_an_answer_that_is_no_message_is_the_askers_error(tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:

            async def garble_the_answer() -> None:
                head, _ = await daemon.answer()
                await daemon.garble(Kind.REPLY, head.id)
                await daemon.serve()

            tasks.start_soon(garble_the_answer)
            async with Link(daemon.incarnation, ignore) as link:
                with pytest.raises(MalformedMessage):
                    await link.ask("other", ListActors())
            tasks.cancel_scope.cancel()


@pytest.mark.asyncio
async def test_an_ask_that_is_no_message_is_answered_with_an_error(tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:
            answers: list[Message] = []
            answered = anyio.Event()

            async def garble_an_ask() -> None:
                await daemon.answer()
                await daemon.garble(Kind.ASK, 9)
                answers.append((await daemon.answer())[1])
                answered.set()
                await daemon.serve()

            tasks.start_soon(garble_an_ask)
            async with Link(daemon.incarnation, ignore) as link:
                await link.tell("other", ListActors())
                await answered.wait()
            tasks.cancel_scope.cancel()
    [answer] = answers
    assert isinstance(answer, ErrorReply)
    assert answer.code == "malformed_message"


@pytest.mark.asyncio
async def test_a_stop_sets_an_event_and_a_failing_tell_ends_the_link_with_its_own_exception(tmp_path: Path) -> None:
    async def fail(message: Message) -> Reply | None:
        raise ValueError("told to")

    async def live(daemon: FakeDaemon) -> None:
        async with Link(daemon.incarnation, fail) as link:
            await link.tell("other", ListActors())
            await link.stop_requested.wait()
            await daemon.say(Kind.TELL, 0, ListActors())
            await anyio.sleep_forever()

    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:

            async def stop_it() -> None:
                await daemon.answer()
                await daemon.say(Kind.TELL, 0, Stop())
                await daemon.serve()

            tasks.start_soon(stop_it)
            with pytest.raises(ValueError, match="told to"):
                await live(daemon)
            tasks.cancel_scope.cancel()


@pytest.mark.asyncio
async def test_a_tell_that_finds_a_full_inbox_is_refused_with_that_reason_and_no_other_is(tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:
            refused: list[ErrorReply] = []
            full, release = anyio.Event(), anyio.Event()

            async def overfill() -> None:
                with anyio.move_on_after(0.2):
                    await daemon.serve()
                for number in range(1, MAX_MESSAGES + 10):
                    await daemon.say(Kind.TELL, number, ListActors())
                _, message = await daemon.answer()
                assert isinstance(message, ErrorReply)
                refused.append(message)
                full.set()
                await daemon.serve()

            async def hold(message: Message) -> None:
                await release.wait()

            tasks.start_soon(overfill)
            async with Link(daemon.incarnation, hold):
                with anyio.fail_after(20):
                    await full.wait()
                release.set()
            tasks.cancel_scope.cancel()
    assert (refused[0].code, refused[0].fields["reason"]) == (Busy.code, Reason.MAILBOX_FULL)


@pytest.mark.asyncio
async def test_an_actor_that_asks_itself_over_its_link_is_told_so(tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(daemon.serve)
            async with Link(daemon.incarnation, ignore) as link:
                with pytest.raises(ActorUnavailable, match="asks itself"):
                    await link.ask("w", ListActors())
            with pytest.raises(DaemonUnreachable, match="not open"):
                await link.tell("other", ListActors())
            tasks.cancel_scope.cancel()


@pytest.mark.asyncio
async def test_a_thread_link_opens_is_told_asked_and_closes(tmp_path: Path) -> None:
    with fake_daemon(tmp_path) as daemon:
        async with anyio.create_task_group() as tasks:
            answers: list[Message] = []

            async def converse() -> None:
                head, _ = await daemon.answer()
                await daemon.say(Kind.ASK, 4, ListActors())
                answers.append((await daemon.answer())[1])
                await daemon.say(Kind.TELL, 0, Stop())
                await daemon.say(Kind.REPLY, head.id, ErrorReply(code="job_not_found", message="none"))
                await daemon.serve()

            tasks.start_soon(converse)
            heard, error = await anyio.to_thread.run_sync(_converse, daemon.incarnation.to_environment())
            tasks.cancel_scope.cancel()
    assert sorted(type(message).__name__ for message in heard) == ["ListActors", "Stop"]
    assert error == "job_not_found"
    assert answers == [Done()]


def _converse(environment: dict[str, str]) -> tuple[list[Message], str]:
    link = ThreadLink(environment=environment)
    with pytest.raises(DaemonUnreachable):
        link.ask("other", ListActors())
    heard: list[Message] = []
    error = ""
    with link:
        assert (link.name, link.generation, link.daemon_lost, link.closed) == ("w", 1, False, False)
        try:
            link.ask("other", ListActors())
        except EsperError as failure:
            error = failure.code
        while len(heard) < 2:
            heard.append(link.received.get(timeout=5))
        with pytest.raises(queue.Empty):
            link.received.get_nowait()
    link.close()
    assert link.closed
    with pytest.raises(DaemonUnreachable):
        link.tell("other", ListActors())
    return heard, error


def test_a_thread_link_to_nobody_says_so_when_it_is_opened(tmp_path: Path) -> None:
    nobody = Incarnation(
        hub=f"ipc://{tmp_path}/none.sock",
        actor="w",
        generation=1,
        token="t",
        heartbeat_interval_s=1.0,
        heartbeat_timeout_s=1.0,
    )
    link = ThreadLink(environment=nobody.to_environment())
    with pytest.raises(DaemonUnreachable, match="no such socket"):
        link.open()
    assert link.closed
    with pytest.raises(ConfigError):
        ThreadLink(environment={})


@pytest.mark.asyncio
async def test_a_process_that_does_not_read_fills_bounded_queues_until_it_is_replaced(tmp_path: Path) -> None:
    spec = ProcessSpec(
        "worker",
        [sys.executable, str(PROGRAM), "serve"],
        restart="temporary",
        heartbeat_interval_s=0.05,
        heartbeat_timeout_s=1.5,
    )
    async with ActorSystem(workers_endpoint=f"ipc://{tmp_path}/w.sock") as system:
        await system.start(spec)
        [status] = system.status()
        assert status.pid is not None
        os.kill(status.pid, signal.SIGSTOP)
        sent, blocked = 0, False
        while not blocked:
            with anyio.move_on_after(0.3) as patience:
                await system.tell("worker", Heartbeat(actor="x" * 1_000, generation=1))
                sent += 1
            blocked = patience.cancelled_caught
        assert system.status()[0].mailbox_depth == MAX_MESSAGES
        assert sent < 20 * MAX_MESSAGES
        with anyio.fail_after(20):
            await system.wait_for("worker", ActorState.FAILED)
        assert system.dead_letters.counts["actor_stopped"] >= MAX_MESSAGES
