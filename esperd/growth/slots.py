"""Slots: the places of a host where a tensor flows whose shape a seed can keep. Found by tracing a few samples, or named."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from esperd.errors import InvalidSlot, UnknownName
from esperd.growth.blocks import block_ends, inside
from esperd.growth.flops import LOOKUPS
from esperd.growth.outputs import prediction
from esperd.growth.tracing import Traced, trace
from esperd.messages.growth import SlotRecord, Topology

WILDCARDS = "*?["
MOST_LISTED = 40
"""Modules that a message lists."""
MOST_REASONS = 4
"""Different reasons that a message gives."""


def find_slots(host: nn.Module, batch: torch.Tensor, *, patterns: Sequence[str] = (), limit: int = 4) -> tuple[SlotRecord, ...]:
    """Find the slots of a host.

    Without patterns: one slot for each distinct place where the shape is about to change or the network to end, that is the
    last module that returns each shape in a run of equal shapes. What runs inside a block (see
    :func:`esperd.growth.blocks.block_ends`) is passed over. Tokens have their slots at the ends of blocks only, where there are
    any; and where all maps, or all vectors, are of one shape, that run gives the end of each of its blocks, or of each module
    of the kind it repeats. At most ``limit``, spread evenly over the depth. The host's own output is no slot (a seed there
    could only re-weigh the classes), nor is a map pooled to 1×1, nor the rows of an embedding where there is anything else.

    Args:
        host: any module that takes ``batch``.
        batch: (B, ...) a few real samples.
        patterns: shell patterns over module paths (``*`` matches dots, too); all that match become slots, in order of
            execution. One with wildcards passes over modules that do not run, as lists of modules do not.
        limit: most slots taken from tracing.

    Returns:
        Slots in order of execution.

    Raises:
        UnknownName: a pattern matches no module; lists the modules that could be slots.
        InvalidSlot: a named module cannot be a slot (the reason is in the message), tracing found none, ``patterns`` is one text
            instead of several, or ``limit`` is below 1.
        InvalidModel: the host cannot be looked into; it does not run on these samples, or not on one more or in its other mode;
            or, without patterns, it returns no prediction.
        InvalidData: ``batch`` is no tensor, or holds no samples.
    """
    if isinstance(patterns, str):
        raise InvalidSlot(f"patterns is the text {patterns!r}, whose letters would be patterns; give patterns=({patterns!r},)")
    if limit < 1:
        raise InvalidSlot(f"limit is {limit}, and at least one slot is needed to grow anything; give limit=1 or more")
    traced = trace(host, batch)
    if patterns:
        return _named(host, traced.modules, patterns)
    usable = {name: entry for name, entry in traced.modules.items() if not entry.problem}
    found: list[str] = []
    if usable:
        output = prediction(traced.output)
        apart_from_rows = {name: entry for name, entry in traced.modules.items() if not isinstance(entry.module, LOOKUPS)}
        found = _ends_of_runs(apart_from_rows, output) or _ends_of_runs(traced.modules, output)
    if not found:
        raise InvalidSlot(f"no module of {type(host).__name__} can carry a seed ({_why_none(host, traced.modules)})")
    chosen = found
    if len(found) > limit:
        chosen = [found[round(index * (len(found) - 1) / max(limit - 1, 1))] for index in range(limit)]
    return tuple(_record(usable[name]) for name in dict.fromkeys(chosen))


# --- by name ---------------------------------------------------------------------------------------------------------------


def _named(host: nn.Module, traced: Mapping[str, Traced], patterns: Sequence[str]) -> tuple[SlotRecord, ...]:
    problems = _problems(host, traced)
    chosen: dict[str, Traced] = {}
    for pattern in patterns:
        matching = [name for name in problems if fnmatch.fnmatchcase(name, pattern)]
        if any(sign in pattern for sign in WILDCARDS):
            matching = [name for name in matching if name in traced] or matching
        if not matching:
            available = [name for name in problems if not problems[name]]
            more = f", and {len(available) - MOST_LISTED} more" if len(available) > MOST_LISTED else ""
            raise UnknownName(
                f"slot pattern {pattern!r} matches no module; slots could be: {', '.join(available[:MOST_LISTED])}{more}",
                kind="slots",
                name=pattern,
                available=available,
            )
        for name in matching:
            if problems[name]:
                kind = type(host.get_submodule(name)).__name__
                raise InvalidSlot(f"module {name!r} ({kind}) cannot be a slot: {problems[name]}", slot=name)
            chosen[name] = traced[name]
    return tuple(_record(entry) for entry in sorted(chosen.values(), key=lambda entry: entry.order))


def _problems(host: nn.Module, traced: Mapping[str, Traced]) -> dict[str, str]:
    """Every path of the host, with why its module cannot be a slot; empty when it can."""
    problems: dict[str, str] = {}
    names: dict[nn.Module, str] = {}
    for name, module in host.named_modules(remove_duplicate=False):
        if module is host:
            continue
        original = names.setdefault(module, name)
        if original != name:
            problems[name] = f"it is the same module as {original!r}, one place under two names; name {original!r}"
        elif name not in traced:
            problems[name] = "it does not run"
        else:
            problems[name] = traced[name].problem
    return problems


# --- by tracing ------------------------------------------------------------------------------------------------------------


def _ends_of_runs(traced: Mapping[str, Traced], output: torch.Tensor) -> list[str]:
    """Names in order of execution: the end of each run of equal shapes, or the ends of its blocks."""
    ends = block_ends(traced)
    entries = [entry for entry in traced.values() if not entry.problem and _may_be_found(entry, ends)]
    if any(traced[end].topology == "transformer" for end in ends.values()):  # what embeds tokens comes before the stream
        entries = [entry for entry in entries if entry.topology != "transformer" or entry.name in ends.values()]
    last_shape = tuple(output.shape[1:])
    while entries and entries[-1].shape == last_shape and entries[-1].name not in ends.values():
        entries.pop()
    entries = [entry for entry in entries if not entry.is_output]
    runs = [list(run) for _, run in itertools.groupby(entries, key=lambda entry: entry.shape)]
    found: list[str] = []
    for run in runs:
        topology = run[0].topology
        only_run = [other[0].topology for other in runs].count(topology) == 1
        found += _ends_of_run(run, topology, set(ends.values()), only_run=only_run)
    return [name for name in found if not _is_pooled_away(traced[name])]


def _may_be_found(entry: Traced, ends: Mapping[str, str]) -> bool:
    """Outside of every block, or the end of one."""
    return entry.name in ends.values() or not any(inside(entry.name, block) for block in ends)


def _ends_of_run(run: Sequence[Traced], topology: Topology | None, ends: set[str], *, only_run: bool) -> list[str]:
    blocks = [entry.name for entry in run if entry.name in ends]
    if blocks and (topology == "transformer" or (only_run and len(blocks) > 1)):
        return blocks
    repeated = _repeated_siblings(run) if only_run else []
    return repeated or [run[-1].name]


def _repeated_siblings(run: Iterable[Traced]) -> list[str]:
    """The largest group of modules of one kind and one parent, as the ReLUs of a plain stack of equal layers."""
    groups: dict[tuple[str, type], list[str]] = {}
    for entry in run:
        parent = entry.name.rpartition(".")[0]
        groups.setdefault((parent, type(entry.module)), []).append(entry.name)
    largest = max(map(len, groups.values()))
    # of two that are equally large the later one: behind an activation rather than before it
    return [group for group in groups.values() if len(group) == largest][-1] if largest > 1 else []


def _is_pooled_away(entry: Traced) -> bool:
    """A (C, 1, 1) map has no space left for a convolution to work on; the (C,) that follows it is the better slot."""
    return entry.topology == "cnn" and entry.shape[1:] == (1, 1)


def _why_none(host: nn.Module, traced: Mapping[str, Traced]) -> str:
    if not traced:
        return "its modules do not run" if any(True for _ in host.children()) else "it has no submodules"
    reasons: dict[str, str] = {}
    for entry in traced.values():
        if entry.problem:
            reasons.setdefault(entry.problem, entry.name)
    listed = "; ".join(f"{name}: {problem}" for problem, name in list(reasons.items())[:MOST_REASONS])
    return listed or "what its modules return has the shape of its own output"


def _record(entry: Traced) -> SlotRecord:
    topology = entry.topology
    assert topology is not None  # noqa: S101 - only entries without a problem are chosen
    return SlotRecord(
        slot=entry.name, topology=topology, shape=entry.shape, dtype=entry.dtype, module=type(entry.module).__name__
    )
