"""What most seeds are: their input plus what their layers make of it, the last layer zero at birth.

So a seed returns its input, to the bit, until the first optimiser step, and has a gradient at that step. The order of layers is
what makes both possible: the zero-initialised layer stands last, behind norm and activation. Before a norm and a ReLU it would
have a gradient of exactly zero, for ever.
"""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """``x + delta(x)``.

    Args:
        layers: run in order; the last outputs exactly zero at birth and keeps the shape of ``x``.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.delta = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, ...)."""
        delta: Tensor = self.delta(x)
        return x + delta


def zero_conv(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    """Shape-keeping convolution that outputs exactly zero at birth."""
    conv = nn.Conv2d(channels_in, channels_out, size, padding=size // 2, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


def zero_linear(features_in: int, features_out: int, *, bias: bool = False) -> nn.Linear:
    """Linear layer that outputs exactly zero at birth."""
    linear = nn.Linear(features_in, features_out, bias=bias)
    nn.init.zeros_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
