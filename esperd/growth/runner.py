"""How the host's own training pass is run: as it is, or through whatever wraps it.

Only that pass. What measures a network, or teaches a seed behind the host, always runs the network itself: it changes alphas and
starts in the middle, which no wrapper knows of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from esperd.growth.network import GrowingNetwork, Seed

Forward = Callable[[torch.Tensor], torch.Tensor]
"""(B, ...) → the network's prediction."""


class Runner(Protocol):
    """Runs training passes of a network whose structure changes."""

    records: bool
    """Whether the host's modules are called one by one, so that what they return can be kept for second passes."""

    def forward(self, network: GrowingNetwork, structure: str, *, counted: bool) -> Forward:
        """What to call for the host's pass.

        Args:
            network: as it stands.
            structure: names of the seeds that are heard; another one is another structure.
            counted: whether the FLOPs of this pass are being counted.
        """
        ...

    def taught(self, seed: Seed) -> None:
        """A seed's gradients are set, and not by what :meth:`forward` runs through: by a second pass, or straight through."""
        ...


class Plain:
    """The network itself."""

    records = True

    def forward(self, network: GrowingNetwork, structure: str, *, counted: bool) -> Forward:  # noqa: ARG002 - as in Runner
        """The network."""
        return network

    def taught(self, seed: Seed) -> None:
        """Nothing to do."""
