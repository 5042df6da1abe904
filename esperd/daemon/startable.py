"""Which configurations a daemon starts with: one answer for its start, ``esperd config check`` and a reload."""

from __future__ import annotations

from esperd import tracing
from esperd.config import Config, endpoint
from esperd.daemon.remote import require_network

SOCKETS = ("control", "workers", "events")
"""In the runtime directory."""


def require_startable(config: Config) -> Config:
    """A configuration that a daemon could start with, as far as that can be told without touching anything: whether addresses
    are free and directories can be written only a start tells.

    Raises:
        ConfigError: a socket's path is too long, traces cannot be sent as configured, or ``[network]`` asks for what is refused.
        StoreFailed: when it cannot be read who may connect, or the daemon's own key.
    """
    for name in SOCKETS:
        endpoint(config.runtime_directory, name)
    tracing.require_collector(config.telemetry.otlp_endpoint)
    require_network(config)
    return config
