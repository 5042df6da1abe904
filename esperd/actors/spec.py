"""How an actor is started: inside the daemon, or as a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from esperd.actors.actor import Actor
from esperd.actors.supervisor import Restart

GRACE_S = 5.0
"""How long an actor may take to stop before it is made to. OTP's default for workers."""


@dataclass(frozen=True)
class ChildSpec:
    """An actor inside this process.

    Args:
        name: its address.
        factory: makes a fresh one for every incarnation.
        restart: after which ends it is started again.
        grace_s: seconds it gets to stop before it is cancelled.
    """

    name: str
    factory: Callable[[], Actor]
    restart: Restart = "permanent"
    grace_s: float = GRACE_S


@dataclass(frozen=True)
class ProcessSpec:
    """An actor in a process of its own, which connects back through :class:`esperd.actors.link.Link`.

    Args:
        name: its address.
        command: program and arguments.
        environment: variables added to the daemon's own.
        nice: scheduling priority, 0 to 19.
        restart: after which ends it is started again.
        working_directory: None: the daemon's.
        grace_s: seconds it gets to stop before it is sent SIGTERM, and SIGKILL soon after.
        start_timeout_s: from spawn to Ready.
        heartbeat_interval_s: how often it says that it lives.
        heartbeat_timeout_s: silence after which it is killed.
        stall_timeout_s: seconds without a step and without work, however well it beats, after which it is killed; 0: never.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    restart: Restart = "permanent"
    working_directory: Path | None = None
    grace_s: float = GRACE_S
    start_timeout_s: float = 120.0
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 20.0
    stall_timeout_s: float = 0.0


Spec = ChildSpec | ProcessSpec
