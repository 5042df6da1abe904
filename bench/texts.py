"""Text for the benches of growth: windows of characters from three parts of a file, and a small transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from esperd.builtins.data.text import text
from esperd.builtins.networks.transformer import transformer
from esperd.messages.jobs import Optimizer

CONTEXT = 64
"""Characters a sample."""
EPOCH = 2048
"""Windows an epoch draws of those of the train part."""
WINDOWS = {"train": 20_000, "gate": 1024, "audit": 2048}
"""At most, of each part; spread evenly over it."""
SHARES = {"train": 0.74, "gate": 0.13, "audit": 0.13}
"""Of the file, in its order."""
GAP = 1_000
"""Characters between two parts that nobody reads: the scene that a part ends in does not go on in the next one."""
SLOTS = ("blocks.?",)


def splits(path: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], int]:
    """Windows that do not overlap: by split (N, T) characters and the (N, T) that follow each of them; how many exist."""
    tokens = torch.from_numpy(text(str(path), CONTEXT).tokens)
    parts, start = {}, 0
    for name, share in SHARES.items():
        end = start + round(share * len(tokens))
        part = tokens[start : end - GAP]
        stride = max(CONTEXT, (len(part) - 1) // WINDOWS[name])
        windows = part.unfold(0, CONTEXT + 1, stride)[: WINDOWS[name]]  # (N, T + 1)
        parts[name] = (windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
        start = end
    return parts, int(tokens.max()) + 1


def host(vocabulary: int) -> nn.Module:
    """The host of the protocol."""
    return transformer(vocabulary, CONTEXT, width=32, depth=2, heads=2)


def optimizer(learning_rate: float) -> Optimizer:
    """What the built-in transformer trains well with."""
    return Optimizer(name="adamw", learning_rate=learning_rate)
