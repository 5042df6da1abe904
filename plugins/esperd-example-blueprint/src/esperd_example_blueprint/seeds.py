"""The module that is grown. It imports torch: only workers and ``esper plugins check`` load it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esperd_example_blueprint import kernel_size


class EfficientChannelAttention(nn.Module):
    """Scales each channel by what its neighbours hold on average: ``x * 2·sigmoid(conv1d(mean(x)))``.

    The convolution is zero at birth and 2·sigmoid(0) = 1: the seed returns its input, to the bit. Its gradient is not zero,
    because what the convolution reads, the channels' means, is not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = kernel_size(channels)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        means = x.mean(dim=(2, 3)).unsqueeze(1)  # (B, 1, C)
        scale = 2.0 * torch.sigmoid(self.conv(means))  # (B, 1, C)
        return x * scale.transpose(1, 2).unsqueeze(-1)  # (B, C, 1, 1)


def eca(shape: tuple[int, ...]) -> EfficientChannelAttention:
    """Build :class:`EfficientChannelAttention` for a slot of shape (C, H, W)."""
    return EfficientChannelAttention(shape[0])
