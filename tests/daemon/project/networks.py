"""Networks of a user: some that train, some with a mistake."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

FEATURES = 12
CLASSES = 3


class Small(nn.Module):
    """Two hidden layers. Takes its time when ``delay_s`` says so, and stands still while the file ``stuck``
    exists, leaving the file ``standing`` as a sign.
    """

    def __init__(self, delay_s: float, width: int, classes: int) -> None:
        super().__init__()
        self.delay_s = delay_s
        self.first = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 12) → (B, classes)."""
        while Path("stuck").exists():
            Path("standing").touch()
            time.sleep(0.01)
        time.sleep(self.delay_s)
        result: torch.Tensor = self.head(self.second(self.first(x)))
        return result


def small(delay_s: float = 0.0, width: int = 16, classes: int = CLASSES) -> Small:
    """A network that fits the data of :mod:`samples`."""
    return Small(delay_s, width, classes)


def leaves() -> nn.Module:
    """A program that was written to be run by hand."""
    sys.exit("usage: networks.py DIRECTORY")


def sequence_output() -> nn.Module:
    """(B, 12) → (B, 12, 1), which cross entropy cannot compare with (B,) labels."""
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Unflatten(1, (FEATURES, 1)))
