"""What a peer that nobody let in may have the daemon keep: little, and not for long."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc
import pytest
from test_keys_and_gate import NO_ACTORS, free_endpoint

from esperd.actors import handshake, sockets
from esperd.actors.curve import Gate, ServerSecurity, secure_client
from esperd.actors.handshake import Handshake
from esperd.actors.keys import AllowList, ClientSecurity, new_pair
from esperd.actors.limits import ClientLimits, Turnstile
from esperd.actors.publication import LARGEST_TOPIC_BYTES, Publisher
from esperd.actors.requests import RequestServer
from esperd.actors.sockets import open_dealer
from esperd.errors import AuthenticationFailed, DaemonUnreachable
from esperd.messages import Message, Reply

GREETING = b"\xff" + b"\0" * 8 + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" * 32
"""Of ZMTP 3.0, as a client that speaks CURVE (RFC 23)."""
LARGE_COMMAND = 6
REQUEST_BYTES = 1_000_000
FOR_EVER_MS = 600_000


async def answer(_client: bytes, _message: Message) -> Reply:
    return NO_ACTORS


async def greeted(endpoint: str) -> anyio.abc.SocketStream:
    """A peer that has said and heard the greeting."""
    stream = await anyio.connect_tcp("127.0.0.1", int(endpoint.rpartition(":")[2]))
    await stream.send(GREETING)
    heard = b""
    while len(heard) < len(GREETING):
        heard += await stream.receive(len(GREETING) - len(heard))
    return stream


async def announced(endpoint: str, size_bytes: int) -> anyio.abc.SocketStream:
    """A peer that announces a command of so many bytes instead of showing a key."""
    stream = await greeted(endpoint)
    await stream.send(struct.pack(">BQ", LARGE_COMMAND, size_bytes))
    return stream


async def until_disconnected(stream: anyio.abc.SocketStream) -> None:
    with anyio.fail_after(10), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
        await stream.receive()


@contextlib.asynccontextmanager
async def daemon(directory: Path) -> AsyncIterator[tuple[str, str]]:
    """Where requests and events are served, to nobody."""
    requests, events = free_endpoint(), free_endpoint()
    security = ServerSecurity(new_pair(), AllowList(directory / "allowed"), lambda *_: None)
    limits = ClientLimits(request_bytes=REQUEST_BYTES, requests_per_s=1e6, burst=1_000_000, open_requests=2)
    async with (
        Gate(security),
        RequestServer(requests, answer, security=security, turnstile=Turnstile(limits)),
        Publisher(events, security=security),
    ):
        yield requests, events


@pytest.mark.asyncio
async def test_who_announces_more_than_a_client_may_send_is_disconnected_before_a_byte_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", FOR_EVER_MS)
    async with daemon(tmp_path) as (requests, events):
        for endpoint, most in ((requests, REQUEST_BYTES), (events, LARGEST_TOPIC_BYTES)):
            async with await announced(endpoint, most + 1_000) as stranger:
                await until_disconnected(stranger)


@pytest.mark.asyncio
async def test_who_does_not_show_a_key_in_time_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "HANDSHAKE_MS", 100)
    async with daemon(tmp_path) as endpoints:
        for endpoint in endpoints:
            async with await announced(endpoint, LARGEST_TOPIC_BYTES) as stranger:  # allowed as such, and never finished
                await until_disconnected(stranger)


@pytest.mark.asyncio
async def test_a_handshake_that_ran_out_of_time_is_told_from_one_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang_up(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(GREETING[:-32].ljust(64, b"\0"))
            await stream.receive()

    security = ClientSecurity(new_pair(), new_pair().public)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, hang_up)
        endpoint = f"tcp://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        for stalled_s, error in ((0.0, DaemonUnreachable), (60.0, AuthenticationFailed)):
            monkeypatch.setattr(handshake, "STALLED_S", stalled_s)
            with contextlib.closing(open_dealer()) as dealer:
                secure_client(dealer, security)
                with contextlib.closing(Handshake(dealer, endpoint, security)) as watched:
                    dealer.connect(endpoint)
                    with pytest.raises(error):
                        await watched.settled(10.0)
        tasks.cancel_scope.cancel()
