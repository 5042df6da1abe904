"""What a changed configuration means for a daemon that runs: which keys apply at once, and which need a restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from esperd.config import Config

LIVE = frozenset(
    {
        "daemon.log_level",
        "daemon.drain_timeout_s",
        "jobs.max_running",
        "jobs.max_queued",
        "jobs.max_attempts",
        "jobs.backoff_s",
        "jobs.backoff_max_s",
        "retention.events_days",
        "retention.events_bytes",
        "retention.jobs_days",
        "retention.jobs_bytes",
        "retention.every_s",
    }
)
"""Keys that are read whenever they are needed. Every other one was built into something when the daemon started."""


@dataclass(frozen=True)
class Reload:
    """What is to be done about a configuration that was read again."""

    config: Config
    """To be in force from now on: what was, with the live keys of what was read."""
    applied: tuple[str, ...]
    """Keys that changed, ``section.key: before -> after``, and apply."""
    needs_restart: tuple[str, ...]
    """Keys, ``section.key``, that differ from what is in force and do not apply before a restart."""

    @property
    def note(self) -> str:
        """One line for people."""
        done = f"reloaded: {', '.join(self.applied)}" if self.applied else "reloaded: nothing changed"
        return f"{done}; a restart is needed for {', '.join(self.needs_restart)}" if self.needs_restart else done


def compare(in_force: Config, wanted: Config) -> Reload:
    """What changes from one configuration to another.

    Args:
        in_force: what the daemon runs with.
        wanted: what stands in the file and the variables now.
    """
    before, after = flat(in_force), flat(wanted)
    differing = [key for key in after if before[key] != after[key]]
    merged = msgspec.to_builtins(in_force)
    for key in differing:
        if key in LIVE:
            section, _, name = key.partition(".")
            merged[section][name] = after[key]
    return Reload(
        config=msgspec.convert(merged, Config),
        applied=tuple(f"{key}: {before[key]} -> {after[key]}" for key in differing if key in LIVE),
        needs_restart=tuple(key for key in differing if key not in LIVE),
    )


def flat(config: Config) -> Mapping[str, Any]:
    """Every value by ``section.key``."""
    return {f"{section}.{key}": value for section, table in msgspec.to_builtins(config).items() for key, value in table.items()}
