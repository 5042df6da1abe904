from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import msgspec
import pytest
import zmq
import zmq.asyncio

from esperd.actors.codec import Codec, Kind
from esperd.actors.limits import ClientLimits, Turnstile
from esperd.actors.requests import RequestClient, RequestServer
from esperd.errors import (
    AskTimeout,
    Busy,
    ConfigError,
    DaemonUnreachable,
    HandlerFailed,
    JobNotFound,
    MalformedMessage,
    ProtocolMismatch,
)
from esperd.messages import PROTOCOL_VERSION, Done, ErrorReply, Message, Reply
from esperd.messages.control import ActorList, ListActors, ListPlugins
from esperd.messages.jobs import GetJob

NO_ACTORS = ActorList(actors=(), dead_letters={})


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/requests.sock"


@contextlib.contextmanager
def raw_dealer(endpoint: str) -> Iterator[zmq.asyncio.Socket]:
    dealer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    dealer.connect(endpoint)
    with contextlib.closing(dealer):
        yield dealer


async def answer(client: bytes, message: Message) -> Reply | None:
    match message:
        case GetJob(id="typed"):
            raise JobNotFound("no job is called 'typed'", id="typed")
        case GetJob(id="bug"):
            return {}["missing"]
        case GetJob(id="wrong"):
            return "text"  # type: ignore[return-value]
        case ListActors():
            return NO_ACTORS
    return None


async def round_trip(endpoint: str) -> None:
    async with RequestServer(endpoint, answer), RequestClient(endpoint) as client:
        assert await client.request(ListActors()) == NO_ACTORS
        assert await client.request(ListPlugins()) == Done()


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_a_request_is_answered_with_what_the_handler_returns(endpoint: str, *, use_uvloop: bool) -> None:
    anyio.run(round_trip, endpoint, backend_options={"use_uvloop": use_uvloop})


@pytest.mark.asyncio
async def test_a_typed_error_arrives_as_itself_with_its_fields(endpoint: str) -> None:
    async with RequestServer(endpoint, answer), RequestClient(endpoint) as client:
        with pytest.raises(JobNotFound, match="typed") as caught:
            await client.request(GetJob(id="typed"))
    assert caught.value.fields == {"id": "typed"}


@pytest.mark.asyncio
async def test_a_bug_in_a_handler_is_the_clients_answer_and_the_server_lives(endpoint: str) -> None:
    async with RequestServer(endpoint, answer), RequestClient(endpoint) as client:
        with pytest.raises(HandlerFailed, match="KeyError: 'missing'"):
            await client.request(GetJob(id="bug"))
        with pytest.raises(HandlerFailed, match="not a Reply"):
            await client.request(GetJob(id="wrong"))
        assert await client.request(ListActors()) == NO_ACTORS


@pytest.mark.asyncio
async def test_slow_requests_do_not_hold_up_quick_ones_and_answers_find_their_asker(endpoint: str) -> None:
    release = anyio.Event()

    async def slow_for_jobs(client: bytes, message: Message) -> Reply | None:
        if isinstance(message, GetJob):
            await release.wait()
            return ErrorReply(code="job_not_found", message=message.id)
        return NO_ACTORS

    failures: list[str] = []

    async def ask_slowly(client: RequestClient, job: str) -> None:
        with pytest.raises(JobNotFound) as caught:
            await client.request(GetJob(id=job))
        failures.append(caught.value.message)

    async with (
        RequestServer(endpoint, slow_for_jobs),
        RequestClient(endpoint) as client,
        anyio.create_task_group() as tasks,
    ):
        for job in ("one", "two"):
            tasks.start_soon(ask_slowly, client, job)
        assert await client.request(ListActors()) == NO_ACTORS
        release.set()
    assert sorted(failures) == ["one", "two"]


@pytest.mark.asyncio
async def test_requests_beyond_the_limit_are_answered_busy_with_a_time_to_retry(endpoint: str) -> None:
    release, entered = anyio.Event(), anyio.Event()

    async def hold(client: bytes, message: Message) -> Reply | None:
        entered.set()
        await release.wait()
        return None

    async with (
        RequestServer(endpoint, hold, max_in_flight=1) as server,
        RequestClient(endpoint) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(client.request, ListActors())
        await entered.wait()
        with pytest.raises(Busy) as caught:
            await client.request(ListActors())
        assert caught.value.fields["retry_after_s"] == 0.5
        assert server.statistics().refused == 1
        release.set()


@pytest.mark.asyncio
@pytest.mark.parametrize("frames", [[b""], [b"", b""], [b"\xc1garbage", b"\x00"], [b"one frame"], [b"1", b"2", b"3"]], ids=repr)
async def test_a_malformed_frame_is_answered_and_the_server_lives(endpoint: str, frames: list[bytes]) -> None:
    async with RequestServer(endpoint, answer) as server, RequestClient(endpoint) as client:
        with raw_dealer(endpoint) as dealer, anyio.fail_after(5):
            await dealer.send_multipart(frames)
            _, reply = Codec().decode(await dealer.recv_multipart())
        assert isinstance(reply, ErrorReply)
        assert reply.code == "malformed_message"
        assert await client.request(ListActors()) == NO_ACTORS
        assert server.statistics().malformed == 1


@pytest.mark.asyncio
async def test_a_readable_head_with_an_unreadable_body_is_answered_under_its_own_id(endpoint: str) -> None:
    codec = Codec()
    head, _ = codec.encode(codec.head(Kind.ASK, 41, to="daemon", sender="x"), ListActors())
    async with RequestServer(endpoint, answer):
        with raw_dealer(endpoint) as dealer, anyio.fail_after(5):
            await dealer.send_multipart([head, b"\xff\xff"])
            answered, reply = codec.decode(await dealer.recv_multipart())
    assert answered.id == 41
    assert isinstance(reply, ErrorReply)


@pytest.mark.asyncio
async def test_a_client_may_not_tell(endpoint: str) -> None:
    codec = Codec()
    async with RequestServer(endpoint, answer):
        with raw_dealer(endpoint) as dealer, anyio.fail_after(5):
            await dealer.send_multipart(codec.encode(codec.head(Kind.TELL, 3, to="daemon", sender="x"), ListActors()))
            _, reply = codec.decode(await dealer.recv_multipart())
    assert isinstance(reply, ErrorReply)
    assert "may only ask" in reply.message


@pytest.mark.asyncio
async def test_a_server_answers_another_protocol_version_under_its_id_naming_both(endpoint: str) -> None:
    newer = msgspec.msgpack.encode([PROTOCOL_VERSION + 1, 7, 99, {"anything": 1}])
    async with RequestServer(endpoint, answer):
        with raw_dealer(endpoint) as dealer, anyio.fail_after(5):
            await dealer.send_multipart([newer, b"unknowable"])
            head, reply = Codec().decode(await dealer.recv_multipart())
    assert head.id == 99
    assert isinstance(reply, ErrorReply)
    assert reply.code == "protocol_mismatch"
    assert reply.fields == {"peer": PROTOCOL_VERSION + 1, "own": PROTOCOL_VERSION}


@pytest.mark.asyncio
async def test_a_client_of_another_protocol_version_says_so(endpoint: str) -> None:
    async with RequestServer(endpoint, answer), RequestClient(endpoint, codec=Codec(protocol=PROTOCOL_VERSION + 1)) as client:
        with pytest.raises(ProtocolMismatch, match="upgrade"):
            await client.request(ListActors())


@pytest.mark.asyncio
async def test_without_a_socket_the_daemon_is_unreachable_at_once(endpoint: str) -> None:
    with pytest.raises(DaemonUnreachable, match="esperd run") as caught:
        async with RequestClient(endpoint):
            pass
    assert caught.value.fields["endpoint"] == endpoint


@pytest.mark.asyncio
async def test_a_socket_left_behind_by_a_dead_daemon_is_unreachable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "requests.sock"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
        dead.bind(str(path))
    with pytest.raises(DaemonUnreachable, match="refused"):
        async with RequestClient(f"ipc://{path}"):
            pass


@pytest.mark.asyncio
async def test_a_daemon_that_never_answers_is_unreachable(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/mute.sock"
    router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    router.bind(endpoint)
    with contextlib.closing(router):
        async with RequestClient(endpoint, timeout_s=0.05) as client:
            with pytest.raises(DaemonUnreachable, match="no answer within"):
                await client.request(ListActors())


@pytest.mark.asyncio
async def test_one_late_answer_is_a_timeout_not_an_absent_daemon_and_does_not_confuse_the_next(endpoint: str) -> None:
    release = anyio.Event()

    async def hold_jobs(client: bytes, message: Message) -> Reply | None:
        if isinstance(message, GetJob):
            await release.wait()
        return NO_ACTORS

    async with RequestServer(endpoint, hold_jobs), RequestClient(endpoint) as client:
        await client.request(ListActors())
        with pytest.raises(AskTimeout, match="GetJob"):
            await client.request(GetJob(id="x"), timeout_s=0.05)
        release.set()
        assert await client.request(ListActors()) == NO_ACTORS


@pytest.mark.asyncio
async def test_a_closed_client_fails_open_requests_and_later_ones(endpoint: str) -> None:
    entered = anyio.Event()

    async def hold(client: bytes, message: Message) -> Reply | None:
        entered.set()
        await anyio.sleep_forever()
        return None

    client = RequestClient(endpoint)

    async def ask() -> None:
        with pytest.raises(DaemonUnreachable, match="closed"):
            await client.request(ListActors())

    async with RequestServer(endpoint, hold, drain_s=0.01), anyio.create_task_group() as tasks:
        await client.open()
        tasks.start_soon(ask)
        await entered.wait()
        await client.close()
        await client.close()
    with pytest.raises(DaemonUnreachable, match="not open"):
        await client.request(ListActors())


@pytest.mark.asyncio
async def test_a_client_that_left_costs_the_server_one_undeliverable_answer(endpoint: str) -> None:
    release, entered = anyio.Event(), anyio.Event()

    async def hold(client: bytes, message: Message) -> Reply | None:
        entered.set()
        await release.wait()
        return None

    async with RequestServer(endpoint, hold) as server:
        async with RequestClient(endpoint) as gone:
            with anyio.move_on_after(5):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(gone.request, ListActors())
                    await entered.wait()
                    tasks.cancel_scope.cancel()
        release.set()
        async with RequestClient(endpoint) as client:
            assert await client.request(ListActors()) == Done()
        statistics = server.statistics()
    assert statistics.answered + statistics.undeliverable == 2


@pytest.mark.asyncio
async def test_a_request_in_hand_is_still_answered_when_the_server_closes(endpoint: str) -> None:
    entered, closing = anyio.Event(), anyio.Event()
    replies: list[Reply] = []

    async def work(client: bytes, message: Message) -> Reply | None:
        entered.set()
        await closing.wait()
        return NO_ACTORS

    client = RequestClient(endpoint)

    async def ask() -> None:
        replies.append(await client.request(ListActors()))

    async with anyio.create_task_group() as tasks, RequestServer(endpoint, work):
        await client.open()
        tasks.start_soon(ask)
        await entered.wait()
        asyncio.get_running_loop().call_soon(closing.set)
    await client.close()
    assert replies == [NO_ACTORS]


@pytest.mark.asyncio
async def test_an_endpoint_that_is_neither_ipc_nor_tcp_is_refused() -> None:
    with pytest.raises(ConfigError, match="ipc://"):
        async with RequestClient("udp://10.0.0.1:5555"):
            pass


@pytest.mark.asyncio
async def test_an_answer_that_cannot_be_encoded_becomes_an_error(endpoint: str) -> None:
    async def unsendable(client: bytes, message: Message) -> Reply | None:
        return ErrorReply(code="x", message="y", fields={"n": 2**80})

    async with RequestServer(endpoint, unsendable), RequestClient(endpoint) as client:
        with pytest.raises(MalformedMessage, match="cannot be sent"):
            await client.request(ListActors())


@pytest.mark.asyncio
async def test_who_sends_more_than_a_server_takes_is_cut_off_with_a_typed_error_and_nobody_else_is(endpoint: str) -> None:
    limits = ClientLimits(request_bytes=10_000, requests_per_s=1e6, burst=1_000, open_requests=10)
    async with (
        RequestServer(endpoint, answer, turnstile=Turnstile(limits)) as server,
        RequestClient(endpoint) as other,
        RequestClient(endpoint) as client,
    ):
        assert await client.request(ListPlugins()) == Done()
        with pytest.raises(MalformedMessage, match=r"limits\.request_bytes = 10000"):
            await client.request(GetJob(id="x" * 20_000))
        # Beyond what ZeroMQ lets in, nobody can answer: the connection ends, and the client says so when its time is up.
        with pytest.raises(AskTimeout, match="did not answer GetJob"):
            await client.request(GetJob(id="x" * 1_000_000), timeout_s=0.5)
        assert await other.request(ListActors()) == NO_ACTORS
        assert await client.request(ListActors(), timeout_s=5) == NO_ACTORS, "it is connected again"
        client.largest_request_bytes = 10_000  # as a daemon tells its clients
        with pytest.raises(MalformedMessage, match=r"limits\.request_bytes = 10000"):
            await client.request(GetJob(id="x" * 1_000_000))
        assert server.statistics().malformed == 1
