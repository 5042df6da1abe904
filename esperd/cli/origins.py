"""Where each value of the configuration came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from esperd import config as configuration
from esperd.config import Config

DEFAULT = "default"
STATE_DIRECTORY = "daemon.state_directory"
RUNTIME_DIRECTORY = "daemon.runtime_directory"


def key_origins(config: Config, config_file: Path | None, state_dir: Path | None) -> Mapping[str, str]:
    """Of every value by ``section.key``: ``default``, ``file PATH``, ``variable NAME`` or ``option --state-dir``.

    Args:
        config: in force.
        config_file: it was read from; None: none.
        state_dir: named on the command line; None: not named.

    Raises:
        ConfigError: when the file cannot be read.
    """
    found = {
        key: f"file {place}" if place == str(config_file) else f"variable {place}"
        for key, place in configuration.key_origins(config_file).items()
    }
    # Empty directories follow from what systemd says, where it does.
    for key, variable in ((STATE_DIRECTORY, "STATE_DIRECTORY"), (RUNTIME_DIRECTORY, "RUNTIME_DIRECTORY")):
        section, _, name = key.partition(".")
        if not getattr(getattr(config, section), name) and os.environ.get(variable):
            found[key] = f"{found.get(key, DEFAULT)}, so variable {variable} counts"
    if state_dir is not None:
        found[STATE_DIRECTORY] = "option --state-dir"
    return {
        f"{section}.{key}": found.get(f"{section}.{key}", DEFAULT)
        for section, values in msgspec.to_builtins(config).items()
        for key in values
    }


def config_with_origins(config: Config, origins: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{"section": {"key": {"value": …, "origin": "…"}}}``."""
    return {
        section: {key: {"value": value, "origin": origins[f"{section}.{key}"]} for key, value in values.items()}
        for section, values in msgspec.to_builtins(config).items()
    }
