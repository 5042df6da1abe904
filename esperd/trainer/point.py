"""The point the governor takes a run back to, as data: so that a job killed in mid-epoch has it when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from esperd.growth.optimizer_state import Place, place_of
from esperd.trainer.checkpoint import RunState, rng_streams

TENSORS = "point."
"""What the names of a point's tensors begin with, among those of a checkpoint."""

STREAMS = "point.rng."
"""Its random streams, by name behind this."""


@dataclass(frozen=True)
class Point:
    """A run where a snapshot of it was taken.

    Args:
        state: without tensors.
        tensors: by name, on the CPU; those that the snapshot copied are its copies, so a point takes no second copy of a network.
        streams: as they stood.
    """

    state: RunState
    tensors: dict[str, torch.Tensor]
    streams: dict[str, torch.Tensor]

    @classmethod
    def of(cls, state: RunState, tensors: Mapping[str, torch.Tensor], copies: Mapping[Place, torch.Tensor]) -> Self:
        """Describe a run of which a snapshot was just taken.

        Args:
            state: of the run.
            tensors: the live ones.
            copies: of the snapshot, see :meth:`esperd.growth.rollback.Snapshot.copies`.
        """
        kept = {}
        for name, tensor in tensors.items():
            copy = copies.get(place_of(tensor))
            kept[name] = tensor.detach().to("cpu", copy=True) if copy is None else copy
        return cls(state=state, tensors=kept, streams=rng_streams())

    @classmethod
    def among(cls, state: RunState, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The point that a checkpoint holds beside the run.

        Args:
            state: of the point.
            tensors: of the checkpoint.
        """
        own = {name.removeprefix(TENSORS): tensor for name, tensor in tensors.items() if name.startswith(TENSORS)}
        streams = {name.removeprefix("rng."): tensor for name, tensor in own.items() if name.startswith("rng.")}
        return cls(state=state, tensors={n: t for n, t in own.items() if not n.startswith("rng.")}, streams=streams)

    def named(self) -> dict[str, torch.Tensor]:
        """Its tensors and streams, as a checkpoint names them."""
        return {f"{TENSORS}{name}": tensor for name, tensor in self.tensors.items()} | {
            f"{STREAMS}{name}": stream for name, stream in self.streams.items()
        }
