"""What a module keeps for its backward pass: the memory that training it takes beside its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Kept:
    """Tensors that autograd was given to keep. Held until this is dropped, so that no memory is counted twice.

    Args:
        besides: addresses of memory that is there anyway.
    """

    besides: frozenset[int]
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Of the memory behind them, each piece once, however many tensors look at it."""
        pieces = {piece.data_ptr(): piece.nbytes() for piece in (tensor.untyped_storage() for tensor in self.tensors)}
        return sum(size for address, size in pieces.items() if address not in self.besides)


@contextmanager
def kept_for_backward(module: nn.Module, inputs: Iterable[torch.Tensor]) -> Iterator[Kept]:
    """Look at what a forward pass keeps, inside.

    Args:
        module: its parameters and buffers are there anyway.
        inputs: of the pass; they are kept by whoever made them.
    """
    anyway = (*module.parameters(), *module.buffers(), *inputs)
    kept = Kept(frozenset(tensor.untyped_storage().data_ptr() for tensor in anyway))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.tensors.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
