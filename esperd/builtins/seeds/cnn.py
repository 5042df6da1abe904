"""Seeds for convolutional slots: ``(B, C, H, W)`` in, the same shape out; the input itself until the first optimiser step.

Norms are over groups of channels, not over the batch, so that a seed computes the same at every batch size and keeps no running
statistics. None stands behind a seed's last layer: that is zero at birth, and the norm of nothing has a gradient without bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esperd.builtins.seeds.residual import Residual, zero_conv

SMALLEST_GROUP = 16
"""Channels of a normalised group at least, so that its statistics mean something at 1x1 resolution; chosen, not measured."""

REDUCTION = 4
"""Input channels per hidden channel in the narrow layers (He et al. 2015, section 4.1)."""

NARROWEST = 8
"""Hidden channels of a narrow layer at least: a single dead unit must not silence a whole seed; chosen, not measured."""

EXPANSION = 6
"""Hidden channels per input channel of the inverted residual (Sandler et al. 2018, section 4)."""


def _norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with as many groups (a power of two, up to 32) as leave each one large enough."""
    fitting = [groups for groups in (32, 16, 8, 4, 2) if channels % groups == 0 and channels // groups >= SMALLEST_GROUP]
    return nn.GroupNorm(fitting[0] if fitting else 1, channels)


def _depthwise_conv(channels: int) -> nn.Conv2d:
    """A 3×3 convolution within each channel."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


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


def norm(shape: tuple[int, ...]) -> Norm:
    """Build :class:`Norm` for a slot of shape (C, H, W)."""
    return Norm(shape[0])


def squeeze_excite(shape: tuple[int, ...]) -> SqueezeExcite:
    """Build :class:`SqueezeExcite` for a slot of shape (C, H, W)."""
    return SqueezeExcite(shape[0])


def pointwise(shape: tuple[int, ...]) -> Residual:
    """A pre-activated mix of channels: ``x + conv1x1(relu(GN(x)))``, the convolution zero at birth.

    Args:
        shape: (C, H, W), as for all of these.
    """
    channels = shape[0]
    return Residual(_norm(channels), nn.ReLU(), zero_conv(channels, channels, 1))


def bottleneck(shape: tuple[int, ...]) -> Residual:
    """Narrows, looks around, widens: ``x + up(relu(GN(conv3x3(relu(GN(down(x)))))))``, up = 0 at birth."""
    channels, hidden = shape[0], max(NARROWEST, shape[0] // REDUCTION)
    return Residual(
        nn.Conv2d(channels, hidden, 1, bias=False),
        _norm(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
        _norm(hidden),
        nn.ReLU(),
        zero_conv(hidden, channels, 1),
    )


def depthwise(shape: tuple[int, ...]) -> Residual:
    """A separable convolution: each channel looks around, then channels mix; the mixing layer is zero at birth."""
    channels = shape[0]
    return Residual(_depthwise_conv(channels), _norm(channels), nn.ReLU(), zero_conv(channels, channels, 1))


def inverted_residual(shape: tuple[int, ...]) -> Residual:
    """Widens, looks around within each channel, narrows without an activation; the narrowing layer is zero at birth."""
    channels, hidden = shape[0], EXPANSION * shape[0]
    return Residual(
        nn.Conv2d(channels, hidden, 1, bias=False),
        _norm(hidden),
        nn.ReLU6(),
        _depthwise_conv(hidden),
        _norm(hidden),
        nn.ReLU6(),
        zero_conv(hidden, channels, 1),
    )


def conv_light(shape: tuple[int, ...]) -> Residual:
    """One pre-activated 3×3 convolution: ``x + conv3x3(relu(GN(x)))``, the convolution zero at birth."""
    channels = shape[0]
    return Residual(_norm(channels), nn.ReLU(), zero_conv(channels, channels, 3))


def conv_heavy(shape: tuple[int, ...]) -> Residual:
    """Two pre-activated 3×3 convolutions, the second zero at birth: the residual block of He et al. 2016."""
    channels = shape[0]
    return Residual(
        _norm(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        _norm(channels),
        nn.ReLU(),
        zero_conv(channels, channels, 3),
    )
