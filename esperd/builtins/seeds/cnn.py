"""Seeds for convolutional slots: ``(B, C, H, W)`` in, the same shape out.

All of them return their input, to the bit, until the first optimiser step, and all of them have a gradient at that step.
The order of layers is what makes both possible: the zero-initialised layer stands last, behind norm and activation.
Before a norm and a ReLU it would have a gradient of exactly zero, for ever. Norms are over groups of channels, not over the
batch, so that a seed computes the same at every batch size and keeps no running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_GROUP = 16
"""Channels of a normalised group at least, so that its statistics mean something at 1x1 resolution; chosen, not measured."""

REDUCTION = 4
"""Input channels per hidden channel in the narrow layers (He et al. 2015, section 4.1)."""

NARROWEST = 8
"""Hidden channels of a narrow layer at least: a single dead unit must not silence a whole seed; chosen, not measured."""


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with as many groups (a power of two, up to 32) as leave each one large enough."""
    fitting = [groups for groups in (32, 16, 8, 4, 2) if channels % groups == 0 and channels // groups >= SMALLEST_GROUP]
    return nn.GroupNorm(fitting[0] if fitting else 1, channels)


def _zero_conv(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    """Shape-keeping convolution that outputs exactly zero at birth."""
    conv = nn.Conv2d(channels_in, channels_out, size, padding=size // 2, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


class Norm(nn.Module):
    """Lets the host take as much normalisation as helps: ``x + tanh(s) * (GN(x) - x)``, s = 0 at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        normed: Tensor = self.norm(x)
        return x + torch.tanh(self.share) * (normed - x)


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels hold on average: ``x * 2·sigmoid(fc(mean(x)))``, 2·sigmoid(0) = 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(NARROWEST, channels // REDUCTION)
        self.squeeze = nn.Linear(channels, hidden)
        # SiLU, not the paper's ReLU: with few hidden units all of them can be dead on pooled inputs, SiLU's never are.
        self.activation = nn.SiLU()
        self.excite = nn.Linear(hidden, channels)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        pooled = x.mean(dim=(2, 3))  # (B, C)
        scale = 2.0 * torch.sigmoid(self.excite(self.activation(self.squeeze(pooled))))
        return x * scale.unsqueeze(-1).unsqueeze(-1)


class Bottleneck(nn.Module):
    """Narrows, looks around, widens: ``x + up(relu(GN(conv3x3(relu(GN(down(x)))))))``, up = 0 at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(NARROWEST, channels // REDUCTION)
        self.delta = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            _norm(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            _norm(hidden),
            nn.ReLU(),
            _zero_conv(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        delta: Tensor = self.delta(x)
        return x + delta


class Depthwise(nn.Module):
    """A separable convolution: each channel looks around, then channels mix; the mixing layer is zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.delta = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            _norm(channels),
            nn.ReLU(),
            _zero_conv(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        delta: Tensor = self.delta(x)
        return x + delta


class ConvLight(nn.Module):
    """One pre-activated 3×3 convolution: ``x + conv3x3(relu(GN(x)))``, the convolution zero at birth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.delta = nn.Sequential(_norm(channels), nn.ReLU(), _zero_conv(channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        delta: Tensor = self.delta(x)
        return x + delta


class ConvHeavy(nn.Module):
    """Two pre-activated 3×3 convolutions, the second zero at birth: the residual block of He et al. 2016."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.delta = nn.Sequential(
            _norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
            nn.ReLU(),
            _zero_conv(channels, channels, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        delta: Tensor = self.delta(x)
        return x + delta


def norm(shape: tuple[int, ...]) -> Norm:
    """Build :class:`Norm` for a slot of shape (C, H, W)."""
    return Norm(shape[0])


def squeeze_excite(shape: tuple[int, ...]) -> SqueezeExcite:
    """Build :class:`SqueezeExcite` for a slot of shape (C, H, W)."""
    return SqueezeExcite(shape[0])


def bottleneck(shape: tuple[int, ...]) -> Bottleneck:
    """Build :class:`Bottleneck` for a slot of shape (C, H, W)."""
    return Bottleneck(shape[0])


def depthwise(shape: tuple[int, ...]) -> Depthwise:
    """Build :class:`Depthwise` for a slot of shape (C, H, W)."""
    return Depthwise(shape[0])


def conv_light(shape: tuple[int, ...]) -> ConvLight:
    """Build :class:`ConvLight` for a slot of shape (C, H, W)."""
    return ConvLight(shape[0])


def conv_heavy(shape: tuple[int, ...]) -> ConvHeavy:
    """Build :class:`ConvHeavy` for a slot of shape (C, H, W)."""
    return ConvHeavy(shape[0])
