"""Blocks: the modules a network repeats. A slot found by tracing stands behind one, not inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from esperd.growth.tracing import Traced

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Hold modules without being one thing; by exact type."""


def block_ends(traced: Mapping[str, Traced]) -> dict[str, str]:
    """Blocks of a host and where each of them ends.

    A block is a module with parts, not a plain container, of a kind that the host runs at least twice, one not inside the
    other: a residual block, a transformer's layer. The outermost count. Where none of them returns tokens, the outermost
    modules that return the (B, T, D) they were given count too: the layer of a transformer that has one.

    A block ends with its own output. Where that is no single tensor (attention weights beside it, say) it ends with the last
    module inside that returns the shape of the first tensor it returns: a sub-layer, whose output is about to be added to the
    residual stream.

    Args:
        traced: the modules of a host that ran, as :func:`esperd.growth.tracing.trace` gives them.

    Returns:
        Path of a block → path of the module it ends with; without blocks that end with no usable tensor.
    """
    candidates = sorted(name for name, entry in traced.items() if _has_parts(entry.module))  # parents before their parts
    kinds: dict[type, list[str]] = {}
    for name in candidates:
        same = kinds.setdefault(type(traced[name].module), [])
        if not any(inside(name, other) for other in same):
            same.append(name)
    several = {name for same in kinds.values() if len(same) > 1 for name in same}
    repeated = (name for name in candidates if name in several)
    ends = _ends(traced, _outermost(repeated))
    if not any(traced[end].topology == "transformer" for end in ends.values()):
        apart = (name for name in candidates if not any(inside(name, block) or inside(block, name) for block in ends))
        alone = (name for name in apart if name not in ends and _keeps_tokens(traced[name]))
        ends.update(_ends(traced, _outermost(alone)))
    return ends


def inside(name: str, other: str) -> bool:
    """Whether a module's path lies below another's."""
    return name.startswith(f"{other}.")


def _outermost(names: Iterable[str]) -> list[str]:
    chosen: list[str] = []
    for name in names:  # parents come first
        if not any(inside(name, other) for other in chosen):
            chosen.append(name)
    return chosen


def _ends(traced: Mapping[str, Traced], blocks: Iterable[str]) -> dict[str, str]:
    ends = {block: _end(traced, block) for block in blocks}
    return {block: end for block, end in ends.items() if end is not None}


def _end(traced: Mapping[str, Traced], block: str) -> str | None:
    if not traced[block].problem:
        return block
    usable = [entry for entry in traced.values() if inside(entry.name, block) and not entry.problem]  # in order of execution
    return next((entry.name for entry in reversed(usable) if entry.shape == traced[block].first), None)


def _keeps_tokens(entry: Traced) -> bool:
    return entry.topology == "transformer" and entry.given == entry.shape


def _has_parts(module: nn.Module) -> bool:
    """Whether a module is made of modules of its own. A parametrized layer is a layer."""
    return type(module) not in CONTAINERS and any(name != "parametrizations" for name, _ in module.named_children())
