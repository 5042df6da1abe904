"""Passes that leave no trace: what measures a network, or trains a seed behind it, must not move anything else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from esperd.growth.streams import Streams, device_of, forked


@contextmanager
def untouched(network: nn.Module, *, but: nn.Module | None = None, streams: Streams | None = None) -> Iterator[None]:
    """Run passes through ``network`` and leave its buffers and torch's RNG streams as they were, to the bit.

    BatchNorm moves its running statistics in every training pass and dropout draws from the global stream; a second pass
    per step that did either would change what the host learns. A buffer that a pass replaces by another tensor, instead of
    writing into it, is put back as well.

    Args:
        network: what is left as it was.
        but: a part of it whose buffers may move: a seed with BatchNorm must learn its statistics behind the host.
        streams: where the passes draw from; None: from where the streams stand.
    """
    free = set() if but is None else set(but.modules())
    saved = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in network.modules()
        if module not in free
        for name, buffer in module._buffers.items()
    ]
    with forked(device_of(network), streams):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in saved:
                    module._buffers[name] = buffer
                    if buffer is not None and before is not None:
                        buffer.copy_(before)


@contextmanager
def streams_kept() -> Iterator[None]:
    """Leave the global RNG streams of Python and numpy as they were: some models draw from them.

    Takes some 0.4 ms, which is why :func:`untouched` does not do it at every training step.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
