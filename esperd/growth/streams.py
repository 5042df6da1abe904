"""RNG streams: what a pass may draw from, taken aside and put back.

A second pass in the middle of training must not move the stream that the host's dropout draws from, and several passes that are
to be compared should draw the same masks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Streams:
    """Where the generators stand that models draw from: torch's on the CPU, that of one CUDA device when the model lives there,
    and the global ones of Python and numpy.
    """

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: torch.device
    python: tuple[Any, ...] | None = None
    numpy: dict[str, Any] | None = None
    """As ``numpy.random.get_state(legacy=False)``; None, as ``python``, where they were left out."""

    @classmethod
    def take(cls, device: torch.device, *, everybodys: bool = True) -> Streams:
        """The streams that a pass on this device draws from.

        Args:
            device: where the model lives.
            everybodys: Python's and numpy's, too. Taking them and putting them back takes 0.12 ms, which a training step saves
                when its model is known to draw from neither.
        """
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        python, numpy = (random.getstate(), _numpys()) if everybodys else (None, None)
        return cls(torch.get_rng_state(), cuda, device, python, numpy)

    def put(self) -> None:
        """Set the generators to where they stood."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        if self.python is not None and self.numpy is not None:
            random.setstate(self.python)
            np.random.set_state(self.numpy)

    def everybodys_moved(self) -> bool:
        """Whether Python's or numpy's generator has been drawn from since."""
        if self.python is None or self.numpy is None:
            return False
        return random.getstate() != self.python or not _same(_numpys(), self.numpy)


def _numpys() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)  # noqa: S101 - what legacy=False means
    return state


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, theirs = one["state"], other["state"]
    # every second normal number is kept aside by numpy: drawing it moves nothing else
    told = mine["pos"] == theirs["pos"] and one["has_gauss"] == other["has_gauss"] and one["gauss"] == other["gauss"]
    return bool(told and np.array_equal(mine["key"], theirs["key"]))


@contextmanager
def forked(device: torch.device, start: Streams | None = None) -> Iterator[None]:
    """Draw inside from a fork of the streams, from where they stand or from ``start``; outside they have not moved.

    Python's and numpy's are forked unless ``start`` leaves them out.
    """
    before = Streams.take(device, everybodys=start is None or start.python is not None)
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
