"""Passes that leave no trace: what measures a network, or trains a seed behind it, must not move anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """Run passes through ``network`` and leave its buffers and the RNG streams as they were, to the bit.

    BatchNorm moves its running statistics in every training pass and dropout draws from the global stream; a second pass
    per step that did either would change what the host learns.
    """
    buffers = list(network.buffers())
    with torch.no_grad():
        saved = [buffer.clone() for buffer in buffers]
    devices = sorted({buffer.device.index or 0 for buffer in network.parameters() if buffer.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in zip(buffers, saved, strict=True):
                    buffer.copy_(before)
