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
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """A value as TOML. Every one is a string, number, boolean or list of strings, which JSON writes as TOML does, or a table of
    such.
    """
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(inner)}' for key, inner in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)
