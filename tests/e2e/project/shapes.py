"""A user's own network and data, in a folder of their own. Knows nothing of esperd."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

SIDE = 6
CLASSES = 4


class Reader(nn.Module):
    """Reads a small picture with dropout and batch normalisation: both hold state that a resumed run must get right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, width), nn.BatchNorm1d(width), nn.ReLU())
        self.think = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.1))
        self.answer = nn.Linear(width, CLASSES)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        """(B, 1, 6, 6) → (B, 4)."""
        scores: torch.Tensor = self.answer(self.think(self.enter(picture)))
        return scores


def reader(width: int = 12) -> Reader:
    """Build the network."""
    return Reader(width)


def pictures(count: int = 900, seed: int = 3) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Noisy pictures of four shapes, with the splits the user chose."""
    rng = np.random.default_rng(seed)
    shapes = np.zeros((CLASSES, SIDE, SIDE), dtype=np.float32)
    shapes[0, 1:5, 2:4] = 1  # a bar
    shapes[1, 2:4, 1:5] = 1  # a beam
    shapes[2, range(SIDE), range(SIDE)] = 1  # one diagonal
    shapes[3, range(SIDE), range(SIDE - 1, -1, -1)] = 1  # the other
    y = rng.integers(0, CLASSES, size=count)
    x = shapes[y][:, None] + rng.normal(scale=0.9, size=(count, 1, SIDE, SIDE)).astype(np.float32)
    first, second = int(count * 0.6), int(count * 0.8)
    return {"train": (x[:first], y[:first]), "gate": (x[first:second], y[first:second]), "audit": (x[second:], y[second:])}
