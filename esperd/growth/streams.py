"""RNG streams: what a pass may draw from, taken aside and put back.

A second pass in the middle of training must not move the stream that the host's dropout draws from, and several passes that are
to be compared should draw the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Streams:
    """Where torch's generators stand: the CPU's, and one CUDA device's when the model lives there."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: torch.device

    @classmethod
    def take(cls, device: torch.device) -> Streams:
        """The streams that a pass on this device draws from."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    def put(self) -> None:
        """Set the generators to where they stood."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@contextmanager
def forked(device: torch.device, start: Streams | None = None) -> Iterator[None]:
    """Draw inside from a fork of the streams, from where they stand or from ``start``; outside they have not moved."""
    before = Streams.take(device)
    if start is not None:
        start.put()
    try:
        yield
    finally:
        before.put()


def device_of(network: nn.Module) -> torch.device:
    """Where a network lives: the device of its first parameter; the CPU when it has none."""
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
