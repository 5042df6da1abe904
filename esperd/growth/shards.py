"""One split, measured by several processes: each takes a part, all hold everything that was found."""

from __future__ import annotations

from collections.abc import Sequence

import safetensors.torch
import torch

from esperd.errors import InvalidData
from esperd.growth.contribution import Measured
from esperd.growth.ranks import Ranks

Batch = tuple[torch.Tensor, torch.Tensor]


def shard(batches: Sequence[Batch], rank: int, size: int) -> list[Batch]:
    """One rank's part of a split: consecutive samples, as many as the others' or one more or less.

    Batches are cut where a part ends in the middle of one, and are otherwise as large as they were.

    Args:
        batches: (inputs, targets) of the whole split, each (B, ...).
        rank: whose part.
        size: number of parts.

    Raises:
        InvalidData: there are fewer samples than ranks.
    """
    samples = sum(len(inputs) for inputs, _ in batches)
    if samples < size:
        raise InvalidData(f"a split of {samples} samples cannot be measured by {size} processes; give it more samples")
    begin, end = rank * samples // size, (rank + 1) * samples // size
    part, passed = [], 0
    for inputs, targets in batches:
        cut = slice(max(begin - passed, 0), max(end - passed, 0))
        if len(inputs[cut]):
            part.append((inputs[cut], targets[cut]))
        passed += len(inputs)
    return part


def gathered(ranks: Ranks, measured: Measured) -> Measured:
    """What all ranks measured, each on its part, in the order of the split: the same to the bit on every rank."""
    if ranks.size == 1:
        return measured
    told = ranks.gather("what was measured", safetensors.torch.save(_tensors(measured)))
    parts = [safetensors.torch.load(part) for part in told]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Measured(
        loss=whole["loss"],
        metric=whole.get("metric"),
        variants={
            name: (whole[f"loss of {number}"], whole.get(f"metric of {number}")) for number, name in enumerate(measured.variants)
        },
    )


def _tensors(measured: Measured) -> dict[str, torch.Tensor]:
    """Per-sample values (N,) by name; variants by their number."""
    values = {"": (measured.loss, measured.metric)}
    values |= {f" of {number}": pair for number, pair in enumerate(measured.variants.values())}
    tensors = {f"loss{of}": loss for of, (loss, _) in values.items()}
    tensors |= {f"metric{of}": metric for of, (_, metric) in values.items() if metric is not None}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
