"""Passes that leave no trace: what measures a network, or trains a seed behind it, must not move anything else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esperd.growth.streams import Streams, device_of, forked


class Buffers:
    """The buffers of a network as they stand now, to be put back after passes.

    Kept once, they serve every second pass of a training step: walking a ResNet-18 and copying its buffers took a third of a
    small second pass.

    Args:
        network: whose buffers.
        but: parts of it whose buffers may move.
    """

    def __init__(self, network: nn.Module, *, but: Iterable[nn.Module] = ()) -> None:
        free = {module for part in but for module in part.modules()}
        tables = [module._buffers for module in network.modules() if module not in free]
        self._places = [(table, name, buffer) for table in tables for name, buffer in table.items()]
        self._held = list({id(buffer): buffer.detach() for _, _, buffer in self._places if buffer is not None}.values())
        self._values = [buffer.clone() for buffer in self._held]

    def put_back(self) -> None:
        """Let every buffer be the tensor it was, with the values it had."""
        for table, name, buffer in self._places:
            table[name] = buffer
        if not self._held:
            return
        with torch.no_grad():
            torch._foreach_copy_(self._held, self._values)


@contextmanager
def untouched(
    network: nn.Module, *, but: nn.Module | None = None, streams: Streams | None = None, buffers: Buffers | None = None
) -> Iterator[None]:
    """Run passes through ``network`` and leave its buffers and the RNG streams as they were, to the bit.

    BatchNorm moves its running statistics in every training pass and dropout draws from the global stream; a second pass
    per step that did either would change what the host learns. A buffer that a pass replaces by another tensor, instead of
    writing into it, is put back as well.

    Args:
        network: what is left as it was.
        but: a part of it whose buffers may move: a seed with BatchNorm must learn its statistics behind the host.
        streams: where the passes draw from; None: from where the streams stand.
        buffers: what to put back, where that is known; None: all but ``but``'s, as they stand.
    """
    kept = buffers or Buffers(network, but=() if but is None else (but,))
    with forked(device_of(network), streams):
        try:
            yield
        finally:
            kept.put_back()
