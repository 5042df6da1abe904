"""What became of a client's handshake. ZeroMQ raises nothing when a server refuses a client: it tries again for ever, in silence.
Its monitor socket knows, and here that becomes a typed error.
"""

from __future__ import annotations

import time
from typing import Any

import anyio
import zmq
from zmq.utils.monitor import parse_monitor_message

from esperd.actors.channel import monitor_of
from esperd.actors.keys import ClientSecurity, fingerprint
from esperd.actors.sockets import HANDSHAKE_MS, unreachable
from esperd.errors import AuthenticationFailed, EsperError

WATCHED = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
)


STALLED_S = 0.9 * HANDSHAKE_MS / 1_000
"""A daemon that ends a handshake after so long did not refuse it: it ran out of time, the line's or its own."""


class Handshake:
    """Watches one connecting socket.

    Args:
        socket: not connected yet.
        endpoint: what it will connect to.
        security: its keys; None: it speaks without CURVE.
    """

    def __init__(self, socket: zmq.Socket[Any], endpoint: str, security: ClientSecurity | None) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._security = security
        self._monitor = monitor_of(socket, WATCHED)
        self._watching = True
        self._connected = False
        self._connected_s = 0.0

    def close(self) -> None:
        """Watch no more; before the socket itself is closed. Safe to call twice."""
        if self._watching:
            self._watching = False
            self._socket.monitor(None, 0)
            self._monitor.close()

    async def settled(self, timeout_s: float) -> None:
        """Return once the server let this client in.

        Raises:
            AuthenticationFailed: when it refused, or is another server than the one whose key was given.
            DaemonUnreachable: when nobody listens, or says anything in time.
        """
        with anyio.move_on_after(timeout_s):
            while True:
                error = await self.next()
                if error is None:
                    return
                raise error
        raise unreachable(self._endpoint, f"no handshake within {timeout_s:g} s")

    async def next(self) -> EsperError | None:
        """What the next handshake, the first one or one after a lost connection, comes to: None when the client is let in."""
        while True:
            told = parse_monitor_message(await self._monitor.receive())
            match told["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return None
                case zmq.EVENT_CONNECTED:
                    self._connected = True
                    self._connected_s = time.monotonic()
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    return self._not_allowed()
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if time.monotonic() - self._connected_s >= STALLED_S:
                    return unreachable(self._endpoint, "the handshake took too long: the line is slow, or the daemon busy")
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    return self._other_keys()
                case zmq.EVENT_DISCONNECTED if self._security is None:
                    return self._other_keys()
                case zmq.EVENT_CLOSED if not self._connected:
                    return unreachable(self._endpoint, "the connection was refused")

    def _not_allowed(self) -> AuthenticationFailed:
        assert self._security is not None  # noqa: S101 - without keys nobody gets as far as the gate
        mine = fingerprint(self._security.keys.public)
        return AuthenticationFailed(
            f"the daemon at {self._endpoint} does not allow the key {mine}; on its machine: "
            f"esper keys allow NAME {self._security.keys.public.hex()}",
            endpoint=self._endpoint,
            fingerprint=mine,
        )

    def _other_keys(self) -> AuthenticationFailed:
        if self._security is None:
            what = (
                "wants a key, or is no daemon of esperd; give --server-key and --client-key, or set ESPERD_SERVER_KEY and "
                "ESPERD_CLIENT_KEY"
            )
        else:
            given = fingerprint(self._security.server_public)
            what = f"does not have the key {given} given as --server-key; `esper keys list` on its machine shows the right one"
        return AuthenticationFailed(f"the daemon at {self._endpoint} {what}", endpoint=self._endpoint)
