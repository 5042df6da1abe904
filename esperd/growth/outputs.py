"""What models return: the one tensor a loss is taken of, wherever a model puts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from esperd.errors import InvalidModel

MOST_NAMED = 6
"""Parts of an output that a message names."""


def prediction(output: object) -> torch.Tensor:
    """The tensor a host predicts with: its output, or ``logits`` of it.

    Args:
        output: a tensor; or a mapping or an object with a tensor called ``logits``, as models of Hugging Face return.

    Returns:
        (B, ...), the very tensor that came.

    Raises:
        InvalidModel: when it is anything else; says what came.
    """
    found = predicted(output)
    if found is not None:
        return found
    hint = ""
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        hint = "; return the first part alone (recurrent layers return (output, state): take output[:, -1] of it, or all of it)"
    raise InvalidModel(
        f"the model returned {told(output)}; a job can train models that return one tensor, or an object or a mapping with a "
        f"tensor called logits{hint}",
        returned=type(output).__name__,
    )


def predicted(output: object) -> torch.Tensor | None:
    """As :func:`prediction`; None where an output holds none."""
    if isinstance(output, torch.Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else None


def parts(output: object) -> dict[str, object]:
    """What an output is made of, by name or place: its fields, entries or members; a tensor has none."""
    if isinstance(output, Mapping):
        return {str(name): part for name, part in output.items()}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", range(len(output)))  # of a named tuple
        return {str(name): part for name, part in zip(names, output, strict=True)}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {}


def told(output: object) -> str:
    """An output in words: ``tuple (Tensor, tuple)``, ``CausalLMOutput (logits: Tensor)``, ``None``."""
    if output is None:
        return "None"
    kind = type(output).__name__
    found = parts(output)
    if not found:
        return f"an empty {kind}" if isinstance(output, Mapping | tuple | list) else f"a {kind}"
    named = [
        type(part).__name__ if name.isdigit() else f"{name}: {type(part).__name__}"
        for name, part in list(found.items())[:MOST_NAMED]
    ]
    return f"a {kind} ({', '.join(named)}{', …' if len(found) > MOST_NAMED else ''})"
