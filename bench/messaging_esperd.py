"""esperd's own actor and server in ``messaging.py``; run as a program, a server: ``messaging_esperd.py PATH ENDPOINT``.

The product's server and client bind and connect to ``ipc://``; for TCP and CURVE the bench gives them sockets of its own.
"""

from __future__ import annotations

import asyncio
import socket
import sys

import uvloop
import zmq

from esperd.actors.actor import Actor, handles
from esperd.actors.channel import Channel
from esperd.actors.codec import Codec
from esperd.actors.requests import RequestClient, RequestServer
from esperd.actors.sockets import open_plain_socket
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


class OpenServer(RequestServer):
    """A server on a socket that is bound already."""

    bound: zmq.Socket[bytes]

    def _bind(self) -> Channel:
        return Channel(self.bound)


class OpenClient(RequestClient):
    """A client on a socket that is connected already."""

    connected: zmq.Socket[bytes]

    def _connect(self) -> Channel:
        return Channel(self.connected)


def free_tcp_endpoint() -> str:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def client(path: str, endpoint: str, key: str) -> RequestClient:
    """A client for a server of :func:`serve`, whose first line was ``key``."""
    if path == "ipc":
        return RequestClient(endpoint, codec=CODEC)
    dealer = open_plain_socket(zmq.DEALER)
    if path == "curve":
        dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
        dealer.curve_serverkey = key.encode()
    dealer.connect(endpoint)
    made = OpenClient(endpoint, codec=CODEC)
    made.connected = dealer
    return made


async def serve(path: str, endpoint: str) -> None:
    """Serve until killed; the first line says so, and is the public key."""

    async def handle(_client: bytes, _message: Message) -> None:
        return None

    public, secret = zmq.curve_keypair()
    server = RequestServer(endpoint, handle, codec=CODEC)
    if path != "ipc":
        router = open_plain_socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if path == "curve":
            router.curve_secretkey, router.curve_publickey, router.curve_server = secret, public, True
        router.bind(endpoint)
        server = OpenServer(endpoint, handle, codec=CODEC)
        server.bound = router
    async with server:
        print(public.decode(), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
