"""A small convolutional network: stages, global average pooling, one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from esperd.builtins.networks.options import positive, widths


class ConvStage(nn.Module):
    """3x3 convolution without bias, batch norm, ReLU; keeps height and width.

    Args:
        inputs: channels in.
        outputs: channels out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        result: torch.Tensor = self.act(self.norm(self.conv(x)))
        return result


class ConvNet(nn.Module):
    """Stages named ``features.stage1``, ``features.stage2``, … with 2x2 max pooling between them.

    Args:
        channels: output channels of each stage.
        in_channels: channels of the image.
        classes: outputs of the last layer.
    """

    def __init__(self, channels: Sequence[int], in_channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential()
        inputs = in_channels
        for index, outputs in enumerate(channels, start=1):
            if index > 1:
                self.features.add_module(f"pool{index - 1}", nn.MaxPool2d(2))
            self.features.add_module(f"stage{index}", ConvStage(inputs, outputs))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, H, W) → (B, classes). H and W must be at least 2 ** (stages - 1)."""
        x = self.features(x)  # (B, C, H / 2^(stages-1), W / 2^(stages-1))
        x = self.flatten(self.pool(x))  # (B, C)
        result: torch.Tensor = self.head(x)
        return result


def cnn(channels: Sequence[int] = (8, 16), in_channels: int = 1, classes: int = 10) -> ConvNet:
    """Build the host ``cnn``.

    Args:
        channels: output channels of each stage; the defaults suit 8x8 digits (1,442 parameters).
        in_channels: channels of the image.
        classes: number of classes.

    Raises:
        InvalidModel: when an option is not a positive whole number, or ``channels`` is empty.
    """
    return ConvNet(
        widths("cnn", "channels", channels),
        positive("cnn", "in_channels", in_channels),
        positive("cnn", "classes", classes),
    )
