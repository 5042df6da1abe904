"""esperd's own actor and server in ``messaging.py``; run as a program, a server: ``messaging_esperd.py ENDPOINT [ALLOWED]``."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import uvloop

from esperd.actors.actor import Actor, handles
from esperd.actors.codec import Codec
from esperd.actors.curve import Gate, ServerSecurity
from esperd.actors.keys import AllowList, ClientSecurity, KeyPair, new_pair
from esperd.actors.requests import RequestClient, RequestServer
from esperd.messages import Done, ErrorReply, Message


class Request(Message, frozen=True, kw_only=True):
    """Bytes."""

    body: bytes


CODEC = Codec((Request, Done, ErrorReply))


class Echo(Actor):
    """Takes bytes, gives ``Done``."""

    @handles(Request)
    async def take(self, request: Request) -> None:
        """Take them."""


def free_tcp_endpoint() -> str:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def client(endpoint: str, keys: KeyPair | None, server_key: str) -> RequestClient:
    """A client for a server of :func:`serve`, whose first line was ``server_key``; with keys of its own, over CURVE."""
    security = None if keys is None else ClientSecurity(keys, bytes.fromhex(server_key))
    return RequestClient(endpoint, codec=CODEC, security=security)


async def serve(endpoint: str, allowed: Path | None) -> None:
    """Serve until killed; the first line says so, and is the public key. With a directory of allowed keys, over CURVE."""

    async def handle(_client: bytes, _message: Message) -> None:
        return None

    pair = new_pair()
    security = None if allowed is None else ServerSecurity(pair, AllowList(allowed), lambda _reason, _facts: None)
    async with contextlib.AsyncExitStack() as stack:
        if security is not None:
            await stack.enter_async_context(Gate(security))
        await stack.enter_async_context(RequestServer(endpoint, handle, codec=CODEC, security=security))
        print(pair.public.hex(), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], Path(sys.argv[2]) if sys.argv[2:] else None))
