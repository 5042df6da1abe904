"""A configuration written as the TOML file that would produce it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from esperd.config import Config


def as_toml(config: Config, origins: Mapping[str, str] | None = None) -> str:
    """Every section and key; directories that follow from others are added as comments.

    Args:
        config: in force.
        origins: where each value came from by ``section.key``, added as comments; None: not said.
    """
    lines = [
        f"# state directory: {config.state_directory}",
        f"# runtime directory: {config.runtime_directory}",
    ]
    for section, values in msgspec.to_builtins(config).items():
        lines += ["", f"[{section}]"]
        for key, value in values.items():
            line = f"{key} = {toml_value(value)}"
            lines.append(f"{line}  # {origins[f'{section}.{key}']}" if origins is not None else line)
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """A value as TOML. Every one is a string, number, boolean or list of strings, which JSON writes as TOML does, or a table of
    such.
    """
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)
