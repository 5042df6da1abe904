"""One life of a process actor: who it is, where its daemon listens, and how both learn that the other is gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from esperd.errors import ConfigError

SUPERVISOR = "supervisor"
"""Address of the actor system itself: Ready and Heartbeat go there. No actor may take this name."""

HUB = "ESPERD_HUB"
ACTOR = "ESPERD_ACTOR"
GENERATION = "ESPERD_GENERATION"
TOKEN = "ESPERD_TOKEN"  # noqa: S105 - the name of a variable
HEARTBEAT_INTERVAL = "ESPERD_HEARTBEAT_INTERVAL_S"
HEARTBEAT_TIMEOUT = "ESPERD_HEARTBEAT_TIMEOUT_S"
SHARED = "ESPERD_SHARED"


@dataclass(frozen=True, kw_only=True)
class Incarnation:
    """What a spawner tells the process it starts, by environment.

    Args:
        hub: endpoint of the daemon's workers socket.
        actor: the actor's name.
        generation: counted by the supervisor; a message of an older one is refused.
        token: drawn once per run of the daemon. Without it a worker of a killed daemon could reconnect to the next one
            under the identity of its own successor, and ZeroMQ would ignore the successor.
        heartbeat_interval_s: how often the process says that it lives.
        heartbeat_timeout_s: silence after which each side takes the other for dead.
        shared: inherited descriptors of the memory it shares with its daemon, what it reads and what it writes; None: none.
    """

    hub: str
    actor: str
    generation: int
    token: str
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    shared: tuple[int, int] | None = None

    @property
    def identity(self) -> bytes:
        """Identity of the process's socket: ``name@generation:token``."""
        return f"{self.actor}@{self.generation}:{self.token}".encode()

    def to_environment(self) -> dict[str, str]:
        """The variables that :meth:`from_environment` reads."""
        return {
            HUB: self.hub,
            ACTOR: self.actor,
            GENERATION: str(self.generation),
            TOKEN: self.token,
            HEARTBEAT_INTERVAL: repr(self.heartbeat_interval_s),
            HEARTBEAT_TIMEOUT: repr(self.heartbeat_timeout_s),
            SHARED: "" if self.shared is None else "{},{}".format(*self.shared),
        }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Incarnation:
        """Read who this process is.

        Args:
            environment: variables; None: ``os.environ``.

        Raises:
            ConfigError: when a variable is missing or no number; this process was not started by a daemon.
        """
        values = os.environ if environment is None else environment
        names = (HUB, ACTOR, GENERATION, TOKEN, HEARTBEAT_INTERVAL, HEARTBEAT_TIMEOUT)
        missing = [name for name in names if not values.get(name)]
        if missing:
            raise ConfigError(f"{', '.join(missing)} not set: this program is started by esperd, not by hand", missing=missing)
        try:
            reads, _, writes = values.get(SHARED, "").partition(",")
            return cls(
                hub=values[HUB],
                actor=values[ACTOR],
                generation=int(values[GENERATION]),
                token=values[TOKEN],
                heartbeat_interval_s=float(values[HEARTBEAT_INTERVAL]),
                heartbeat_timeout_s=float(values[HEARTBEAT_TIMEOUT]),
                shared=(int(reads), int(writes)) if reads else None,
            )
        except ValueError as error:
            raise ConfigError(
                f"{GENERATION}, {HEARTBEAT_INTERVAL}, {HEARTBEAT_TIMEOUT} or {SHARED} is no number: {error}"
            ) from error
