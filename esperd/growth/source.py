"""Where seeds come from: whoever grows asks a source for a fresh module, and does not care how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from esperd.messages.growth import SlotRecord


@dataclass(frozen=True, kw_only=True)
class GrownModule:
    """A seed's module, fresh, and what is known about it."""

    module: nn.Module
    operator: nn.Module
    """How its output will enter the slot; fresh too."""
    parameters: int
    """Of the module alone."""
    flops_per_sample: float
    """Of the module alone."""
    kernel: str | None = None
    """Manifest id; None when it runs as a plain module."""
    graph: str | None = None
    """The kernel's portable form; what checkpoints and exports rebuild the seed from. None for a plain module."""


class SeedSource(Protocol):
    """Makes seeds of blueprints."""

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """Why this blueprint cannot be grown at this slot; empty when it can."""
        ...

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:
        """A fresh module and operator for a seed of this name, on the device and in the dtype of the slot."""
        ...

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """The blueprint's own threshold for gate G2, if it has one."""
        ...
