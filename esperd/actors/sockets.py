"""ZeroMQ sockets as this house opens them: ipc or tcp, bounded queues, bounded messages, bounded farewell, heartbeats."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from esperd.actors.channel import Channel
from esperd.actors.codec import LARGEST_FRAME_BYTES
from esperd.errors import ConfigError, DaemonUnreachable

if TYPE_CHECKING:
    from esperd.actors.curve import ServerSecurity

HIGH_WATER_MARK = 1_000
"""Messages queued per peer and direction."""
LINGER_MS = 1_000
"""How long a closed socket may still try to deliver its last words."""
HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 6_000
"""ZMTP heartbeats notice a peer that vanished; a hung Python loop still answers them, hence our own Heartbeat message."""

HANDSHAKE_MS = 5_000
"""How long whoever connects over tcp may take until it is let in. libzmq keeps what a peer sends of a command until it is whole,
before it is known who the peer is, and would for 30 s. Some round trips over a slow line fit. Chosen, not measured."""
CURVE_BYTES = 64
"""At least what CURVE adds to a frame, whose encrypted size is what libzmq compares: 33 bytes (RFC 26)."""

IPC = "ipc://"
TCP = "tcp://"


def socket_path(endpoint: str) -> Path:
    """The file behind an ipc endpoint.

    Raises:
        ConfigError: when the endpoint is not ``ipc://PATH``.
    """
    path = endpoint.removeprefix(IPC)
    if not endpoint.startswith(IPC) or not path:
        raise ConfigError(f"endpoint {endpoint!r} is not of the form ipc:///path/to/name.sock", endpoint=endpoint)
    return Path(path)


def is_remote(endpoint: str) -> bool:
    """True for ``tcp://HOST:PORT``: whoever connects there may be on another machine, or another user of this one."""
    return endpoint.startswith(TCP)


def unreachable(endpoint: str, why: str) -> DaemonUnreachable:
    """The error that says that nobody answers here, and how to change that."""
    return DaemonUnreachable(
        f"no daemon answers at {endpoint}: {why}; start one with `esperd run`", endpoint=endpoint, reason=why
    )


def require_listener(endpoint: str) -> None:
    """Check that some process listens behind an ipc endpoint; ZeroMQ itself would retry in silence.

    Raises:
        DaemonUnreachable: when the socket file is missing, or was left behind by a dead process.
        ConfigError: when the endpoint is not ipc.
    """
    path = socket_path(endpoint)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            raise unreachable(endpoint, "there is no such socket") from None
        except BlockingIOError:
            return  # the listener's backlog is full: it is there, and busy
        except OSError as error:
            raise unreachable(endpoint, error.strerror or str(error)) from error


def open_socket(kind: int, *, high_water_mark: int = HIGH_WATER_MARK) -> zmq.asyncio.Socket:
    """A socket of ``zmq.asyncio`` with every bound set, neither bound nor connected."""
    opened: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(kind)
    _set_bounds(opened, high_water_mark)
    return opened


def open_plain_socket(kind: int) -> zmq.Socket[bytes]:
    """A socket with every bound set, neither bound nor connected, to become a :class:`~esperd.actors.channel.Channel`."""
    opened: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    _set_bounds(opened, HIGH_WATER_MARK)
    return opened


def _set_bounds(opened: zmq.Socket[Any], high_water_mark: int) -> None:
    opened.setsockopt(zmq.LINGER, LINGER_MS)
    opened.setsockopt(zmq.SNDHWM, high_water_mark)
    opened.setsockopt(zmq.RCVHWM, high_water_mark)
    opened.setsockopt(zmq.MAXMSGSIZE, LARGEST_FRAME_BYTES)
    opened.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    opened.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def bind_router(endpoint: str, *, security: ServerSecurity | None = None, largest_bytes: int = LARGEST_FRAME_BYTES) -> Channel:
    """A bound ROUTER that refuses to drop: an unknown peer or a full queue is an error for the sender.

    The caller holds the lock of the directory: a second bind to a live ipc path would succeed and steal it.

    Args:
        endpoint: where.
        security: keys and allow-list; None: whoever can connect may.
        largest_bytes: a peer that sends a larger frame is disconnected by ZeroMQ before the bytes reach us; over tcp also before
            it is known who the peer is.
    """
    require_known_transport(endpoint)
    router = open_plain_socket(zmq.ROUTER)
    bound_what_comes(router, endpoint, largest_bytes)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 0)
    if security is not None:
        security.secure(router)
    try:
        router.bind(endpoint)
    except zmq.ZMQError:
        router.close(linger=0)
        raise
    return Channel(router, names_senders=security is not None)


def bound_what_comes(socket: zmq.Socket[Any], endpoint: str, largest_bytes: int) -> None:
    """Bound what peers of a socket may have it keep, before it binds. What it sends is not bounded by this.

    Args:
        socket: which will bind.
        endpoint: where. Over tcp a peer that is not let in within :data:`HANDSHAKE_MS` is disconnected.
        largest_bytes: of a frame.
    """
    socket.setsockopt(zmq.MAXMSGSIZE, largest_bytes + CURVE_BYTES)
    if is_remote(endpoint):
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def require_known_transport(endpoint: str) -> None:
    """Refuse what is neither ``ipc://PATH`` nor ``tcp://HOST:PORT``.

    Raises:
        ConfigError: it is neither.
    """
    if not is_remote(endpoint):
        socket_path(endpoint)


def connect_dealer(endpoint: str, identity: bytes | None = None) -> Channel:
    """A connecting DEALER that queues nothing for a peer that is not there.

    Raises:
        DaemonUnreachable: when nobody listens at the endpoint.
    """
    require_listener(endpoint)
    dealer = open_dealer(identity)
    dealer.connect(endpoint)
    return Channel(dealer)


def open_dealer(identity: bytes | None = None) -> zmq.Socket[bytes]:
    """A DEALER that queues nothing for a peer that is not there, not connected yet."""
    dealer = open_plain_socket(zmq.DEALER)
    dealer.setsockopt(zmq.IMMEDIATE, 1)
    if identity is not None:
        dealer.setsockopt(zmq.IDENTITY, identity)
    return dealer
