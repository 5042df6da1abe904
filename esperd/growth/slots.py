"""Slots: the places of a host where a tensor flows whose shape a seed can keep. Found by tracing one batch, or named."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from esperd.errors import InvalidSlot, UnknownName
from esperd.growth.untouched import untouched
from esperd.messages.growth import SlotRecord

CNN_DIMENSIONS = 4  # (B, C, H, W)
MLP_DIMENSIONS = 2  # (B, F)


@dataclass
class _Seen:
    """What one module returned while the host ran."""

    module: str
    calls: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    problem: str = ""
    order: int = 0


def trace(host: nn.Module, batch: torch.Tensor) -> dict[str, _Seen]:
    """Run the host once and note what each of its modules returns, in order of first completion.

    The host is left as it was: mode, buffers and RNG stream are restored.
    """
    seen: dict[str, _Seen] = {}
    handles = []
    for name, module in host.named_modules():
        if not name:
            continue

        def note(module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            entry = seen.setdefault(name, _Seen(module=type(module).__name__, order=len(seen)))
            entry.calls += 1
            _describe(entry, output, batch.shape[0])

        handles.append(module.register_forward_hook(note))
    try:
        with untouched(host), torch.no_grad():
            host(batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _describe(entry: _Seen, output: object, batch_size: int) -> None:
    if not isinstance(output, torch.Tensor):
        entry.problem = f"it returns {type(output).__name__}, and a seed needs a single tensor"
        return
    shape = tuple(output.shape)
    if not output.is_floating_point():
        entry.problem = f"its output is {output.dtype}, not floating point"
    elif not shape or shape[0] != batch_size:
        entry.problem = f"its output {shape} does not start with the batch of {batch_size}"
    elif len(shape) not in (CNN_DIMENSIONS, MLP_DIMENSIONS):
        entry.problem = f"its output {shape} is neither (B, C, H, W) nor (B, F)"
    elif entry.shape not in (None, shape[1:]):
        entry.problem = f"its output changes shape from call to call: {entry.shape} and {shape[1:]}"
    entry.shape, entry.dtype = shape[1:], str(output.dtype).removeprefix("torch.")


def find_slots(host: nn.Module, batch: torch.Tensor, *, patterns: Sequence[str] = (), limit: int = 4) -> tuple[SlotRecord, ...]:
    """Find the slots of a host.

    Without patterns: one slot for each distinct place where the shape is about to change or the network to end, that is the
    last module that returns each shape in a run of equal shapes; at most ``limit``, spread evenly over the depth. The host's
    own output is no slot (a seed there could only re-weigh the classes), nor is a map pooled to 1×1.

    Args:
        host: any module that takes ``batch``.
        batch: (B, ...) a few real samples, B ≥ 2.
        patterns: shell patterns over module paths; all that match become slots, in order of execution.
        limit: most slots taken from tracing.

    Returns:
        Slots in order of execution.

    Raises:
        UnknownName: a pattern matches no module; lists the modules that could be slots.
        InvalidSlot: a named module cannot be a slot (the reason is in the message), or tracing found none.
    """
    seen = trace(host, batch)
    usable = {name: entry for name, entry in seen.items() if not _why_not(entry)}
    if patterns:
        return _named(seen, usable, patterns)
    found = _last_of_each_run(host, batch, usable)
    if not found:
        reasons = "; ".join(f"{name}: {_why_not(entry)}" for name, entry in list(seen.items())[:6] if _why_not(entry))
        otherwise = "what its modules return has the shape of its own output" if seen else "it has no submodules"
        raise InvalidSlot(f"no module of {type(host).__name__} can carry a seed ({reasons or otherwise})")
    chosen = found
    if len(found) > limit:
        chosen = [found[round(index * (len(found) - 1) / max(limit - 1, 1))] for index in range(limit)]
    return tuple(_record(name, usable[name]) for name in dict.fromkeys(chosen))


def _why_not(entry: _Seen) -> str:
    if entry.problem:
        return entry.problem
    if entry.calls != 1:
        return f"it runs {entry.calls} times in one forward pass"
    return ""


def _named(seen: Mapping[str, _Seen], usable: Mapping[str, _Seen], patterns: Sequence[str]) -> tuple[SlotRecord, ...]:
    chosen: dict[str, _Seen] = {}
    for pattern in patterns:
        matching = {name: entry for name, entry in seen.items() if fnmatch.fnmatchcase(name, pattern)}
        if not matching:
            raise UnknownName(
                f"slot pattern {pattern!r} matches no module that runs; slots could be: {', '.join(usable)}",
                kind="slots",
                name=pattern,
                available=list(usable),
            )
        for name, entry in matching.items():
            why_not = _why_not(entry)
            if why_not:
                raise InvalidSlot(f"module {name!r} ({entry.module}) cannot be a slot: {why_not}", slot=name)
            chosen[name] = entry
    return tuple(_record(name, entry) for name, entry in sorted(chosen.items(), key=lambda item: item[1].order))


def _last_of_each_run(host: nn.Module, batch: torch.Tensor, usable: Mapping[str, _Seen]) -> list[str]:
    """Leaf and container names, one per run of equal shapes, without the host's output."""
    with untouched(host), torch.no_grad():
        output = host(batch)
    names = [name for name, _ in sorted(usable.items(), key=lambda item: item[1].order)]
    last_shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else None
    while names and usable[names[-1]].shape == last_shape:
        names.pop()
    runs: list[str] = []
    for name in names:
        if runs and usable[runs[-1]].shape == usable[name].shape:
            runs[-1] = name
        else:
            runs.append(name)
    return [name for name in runs if not _is_pooled_away(usable[name])]


def _is_pooled_away(entry: _Seen) -> bool:
    """A (C, 1, 1) map has no space left for a convolution to work on; the (C,) that follows it is the better slot."""
    return entry.shape is not None and len(entry.shape) + 1 == CNN_DIMENSIONS and entry.shape[1:] == (1, 1)


def _record(name: str, entry: _Seen) -> SlotRecord:
    shape = entry.shape or ()
    topology = "cnn" if len(shape) + 1 == CNN_DIMENSIONS else "mlp"
    return SlotRecord(slot=name, topology=topology, shape=shape, dtype=entry.dtype, module=entry.module)
