"""CURVE on a socket, and the gate that says who may connect (RFC 27, ZAP). Nothing gets through when the gate is not there."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from esperd.actors.channel import Channel
from esperd.actors.keys import AllowList, ClientSecurity, KeyPair, fingerprint
from esperd.actors.tasks import open_task_group
from esperd.errors import AuthenticationFailed

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
"""Where libzmq asks; one gate a process."""
ZAP_VERSION = b"1.0"
DOMAIN = b"esperd"
"""Named by every socket of ours that remote clients reach. A gate that answered for other domains only would refuse everybody."""
EARLY_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
"""What a server's monitor says of peers that never got as far as the gate. A refusal by the gate itself is counted there."""

Refused = Callable[[str, dict[str, str]], None]
"""Told of every refusal: the reason (``unknown_key``, ``not_curve``, ``wrong_server_key``, ``revoked``), and what is known of
the peer."""


def secure_client(socket: zmq.Socket[Any], security: ClientSecurity) -> None:
    """Have a socket prove who it is, and ask the same of the server, before it connects."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, security.keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, security.keys.secret)
    socket.setsockopt(zmq.CURVE_SERVERKEY, security.server_public)


@dataclass
class ServerSecurity:
    """What a server needs to speak CURVE with those who are allowed, and nobody else.

    Attributes:
        keys: of the server.
        allowed: who may connect.
        refused: told of every refusal.
    """

    keys: KeyPair
    allowed: AllowList
    refused: Refused

    def secure(self, socket: zmq.Socket[Any]) -> None:
        """Set a socket up, before it binds. Without the gate of this process it lets nobody in, rather than everybody."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def client(self, user_id: bytes) -> str:
        """The name of the client that a connection belongs to.

        Args:
            user_id: what the gate gave the connection: its key, in hexadecimal.

        Raises:
            AuthenticationFailed: when that key was revoked since, or it cannot be read who is allowed.
        """
        public = bytes.fromhex(user_id.decode())
        known_as = fingerprint(public)
        try:
            name = self.allowed.names().get(public)
        except OSError as error:  # nobody can say who is allowed: nobody is
            self.refused("unknown_key", {"fingerprint": known_as, "error": str(error)})
            raise AuthenticationFailed(
                f"the daemon cannot read who is allowed ({error.strerror}), and until it can nobody is; its log names the file",
                fingerprint=known_as,
            ) from error
        if name is None:
            self.refused("revoked", {"fingerprint": known_as})
            raise AuthenticationFailed(
                f"the key {known_as} is not allowed any more; whoever runs the daemon can `esper keys allow` another",
                fingerprint=known_as,
            )
        return name


class Gate:
    """Answers libzmq, which asks for every peer that proved to have a key: is it allowed? ``async with Gate(security):``.

    Args:
        security: whose allow-list counts.
    """

    def __init__(self, security: ServerSecurity) -> None:
        self._security = security
        self._run = self._running()

    async def __aenter__(self) -> Self:
        await self._run.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._run.__aexit__(kind, error, trace)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None, None]:
        async with open_task_group() as tasks:
            with contextlib.ExitStack() as open_sockets:
                # libzmq asks within a context, and pyzmq has two: one for asyncio's sockets, one for all others.
                contexts: tuple[zmq.Context[Any], ...] = (zmq.Context.instance(), zmq.asyncio.Context.instance())
                for context in contexts:
                    socket: zmq.Socket[bytes] = zmq.Socket(zmq.Context.shadow(context.underlying), zmq.REP)
                    socket.setsockopt(zmq.LINGER, 0)
                    questions = open_sockets.enter_context(contextlib.closing(Channel(socket)))
                    socket.bind(ZAP_ENDPOINT)
                    # closing alone gives the name free some time later, on a thread of libzmq
                    open_sockets.callback(socket.unbind, ZAP_ENDPOINT)
                    tasks.start_soon(self._answer, questions)
                try:
                    yield
                finally:
                    tasks.cancel_scope.cancel()

    async def _answer(self, questions: Channel) -> None:
        while True:
            await questions.send(self.verdict(await questions.receive()))

    def verdict(self, frames: list[bytes]) -> list[bytes]:
        """The answer to a question of libzmq.

        Args:
            frames: version, request id, domain, address, routing id, mechanism, credentials.

        Returns:
            Version, request id, status code and text, the client's public key in hexadecimal as user id, no metadata.
        """
        version, request, domain, address, _, mechanism, *credentials = frames
        if version != ZAP_VERSION or domain != DOMAIN or mechanism != b"CURVE" or len(credentials) != 1:
            reason, facts = "not_curve", {"mechanism": mechanism.decode(errors="replace")}
        else:
            (public,) = credentials
            facts = {"fingerprint": fingerprint(public)}
            try:
                if public in self._security.allowed.names():
                    return [ZAP_VERSION, request, b"200", b"OK", public.hex().encode(), b""]
                reason = "unknown_key"
            except OSError as error:  # nobody can say who is allowed: nobody is
                reason, facts = "unknown_key", {**facts, "error": str(error)}
        self._security.refused(reason, {**facts, "address": address.decode(errors="replace")})
        return [ZAP_VERSION, request, b"400", b"not allowed", b"", b""]


async def watch_handshakes(monitor: Channel, security: ServerSecurity) -> None:
    """Tell of peers that failed before the gate was asked: no CURVE at all, or meant for another server. Runs until cancelled.

    Args:
        monitor: of :data:`EARLY_FAILURES`; closed at the end.
        security: told.
    """
    with contextlib.closing(monitor):
        while True:
            told = parse_monitor_message(await monitor.receive())
            meant_another = told["value"] == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
            security.refused("wrong_server_key" if meant_another else "not_curve", {"endpoint": told["endpoint"].decode()})
