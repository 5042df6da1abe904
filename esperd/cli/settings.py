"""A configuration written as the TOML file that would produce it."""

from __future__ import annotations

import json

import msgspec

from esperd.config import Config


def as_toml(config: Config) -> str:
    """Every section and key; directories that follow from others are added as comments."""
    lines = [
        f"# state directory: {config.state_directory}",
        f"# runtime directory: {config.runtime_directory}",
    ]
    for section, values in msgspec.to_builtins(config).items():
        lines += ["", f"[{section}]"]
        # Every value is a string, number, boolean or list of strings, which JSON writes as TOML does.
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(lines)
