"""Handshakes, heartbeats and status: what keeps processes and actors together."""

from __future__ import annotations

import enum

from esperd.messages.base import Message, Reply, Value


class Hello(Message, frozen=True, kw_only=True):
    """First message of a client."""

    protocol: int
    version: str
    """The client's esperd version."""
    reached_at: str = ""
    """The endpoint through which a remote client came, so that the daemon can name others as the client sees them."""


class Welcome(Reply, frozen=True, kw_only=True):
    """The daemon's answer to :class:`Hello`; a client of another protocol gets a ``protocol_mismatch`` error instead."""

    protocol: int
    version: str
    pid: int
    events_endpoint: str
    """Where events are published, as this client can reach it."""
    largest_request_bytes: int | None = None
    """Of this daemon's ``limits.request_bytes``; None: it does not say."""


class Ready(Message, frozen=True, kw_only=True):
    """First message of a process actor to the daemon that started it."""

    actor: str
    generation: int
    pid: int
    protocol: int
    version: str
    shares_memory: bool = False
    """Whether it has the memory that the daemon meant to share with it."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """A process actor is alive. ``step`` moves when it makes progress; None when it has no steps."""

    actor: str
    generation: int
    step: int | None = None
    breakers: tuple[BreakerStatus, ...] = ()
    """Circuit breakers in its process."""


class HeartbeatReceived(Message, frozen=True, kw_only=True):
    """The daemon is alive. A process actor that hears none for its timeout checkpoints and exits."""


class Stop(Message, frozen=True, kw_only=True):
    """Finish what is in hand and exit."""


class Watch(Message, frozen=True, kw_only=True):
    """A process actor asks the supervisor to be told :class:`Terminated` whenever an incarnation of ``actor`` ends."""

    actor: str


class Terminated(Message, frozen=True, kw_only=True):
    """Told to whoever watches an actor, when an incarnation of it ended."""

    actor: str
    generation: int
    reason: str
    """``stopped`` when it was asked to, otherwise what went wrong."""
    will_restart: bool
    status: int | None = None
    """Exit status of its process, negative for a signal; None for an actor without one, or whose process never was."""


class ActorState(enum.StrEnum):
    """Where an actor stands."""

    STARTING = "starting"
    RUNNING = "running"
    WAITING = "waiting"
    """Crashed; will be started again after its backoff."""
    STOPPED = "stopped"
    FAILED = "failed"
    """Crashed more often than its restart limit allows."""


class ActorStatus(Value, frozen=True, kw_only=True):
    """One actor, as ``esper actors`` shows it."""

    name: str
    state: ActorState
    pid: int | None
    """Process it runs in; None while it has none."""
    generation: int
    restarts: int
    mailbox_depth: int
    mailbox_bytes: int
    handled: int
    """Messages handled by this incarnation; for a process actor: messages forwarded to it."""
    step: int | None = None
    last_error: str | None = None
    breakers: tuple[BreakerStatus, ...] = ()
    """Circuit breakers in its own process, as of its last heartbeat."""


class BreakerState(enum.StrEnum):
    """Where a circuit breaker stands."""

    CLOSED = "closed"
    """Requests go through."""
    OPEN = "open"
    """The service failed too often in a row and is left alone."""
    HALF_OPEN = "half_open"
    """One request tries whether it is back."""


class BreakerStatus(Value, frozen=True, kw_only=True):
    """One circuit breaker, as ``esper actors`` shows it."""

    service: str
    state: BreakerState
    failures: int
    """In a row."""
    opened: int
    """Times it opened."""
    retry_after_s: float | None = None
    """When an open one lets a request through; None when it is not open."""
    last_error: str | None = None


class ListActors(Message, frozen=True, kw_only=True):
    """Ask for every actor's status."""


class ActorList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListActors`."""

    actors: tuple[ActorStatus, ...]
    dead_letters: dict[str, int]
    """Messages that could not be delivered, by reason, since the daemon started."""
    breakers: tuple[BreakerStatus, ...] = ()
    """Circuit breakers of the daemon's own process; those of workers stand with their actors."""


class PluginRecord(Value, frozen=True, kw_only=True):
    """One plugin and what it registered, or how it failed."""

    name: str
    distribution: str | None
    """Name and version of the package it came with; None for what is built in."""
    registered: dict[str, list[str]]
    """Names by kind: ``blueprints``, ``strategies``, …"""
    error: str | None = None
    """Traceback of a failed import or hook; None when it is well."""


class ListPlugins(Message, frozen=True, kw_only=True):
    """Ask for every plugin the daemon loaded or failed to load."""


class PluginList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListPlugins`."""

    plugins: tuple[PluginRecord, ...]
