"""A small fully connected network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from esperd.builtins.networks.options import positive, widths


class DenseStage(nn.Module):
    """Linear layer and ReLU.

    Args:
        inputs: features in.
        outputs: features out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs) → (B, outputs)."""
        result: torch.Tensor = self.act(self.linear(x))
        return result


class DenseNet(nn.Module):
    """Stages named ``features.stage1``, ``features.stage2``, … on the flattened input.

    Args:
        in_features: numbers in one sample.
        hidden: output features of each stage.
        classes: outputs of the last layer.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.features = nn.Sequential()
        inputs = in_features
        for index, outputs in enumerate(hidden, start=1):
            self.features.add_module(f"stage{index}", DenseStage(inputs, outputs))
            inputs = outputs
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, …) with in_features numbers in each sample → (B, classes)."""
        result: torch.Tensor = self.head(self.features(self.flatten(x)))
        return result


def mlp(in_features: int = 64, hidden: Sequence[int] = (32, 32), classes: int = 10) -> DenseNet:
    """Build the host ``mlp``.

    Args:
        in_features: numbers in one sample; the default suits 8x8 digits.
        hidden: output features of each stage.
        classes: number of classes.

    Raises:
        InvalidModel: when an option is not a positive whole number, or ``hidden`` is empty.
    """
    return DenseNet(
        positive("mlp", "in_features", in_features),
        widths("mlp", "hidden", hidden),
        positive("mlp", "classes", classes),
    )
