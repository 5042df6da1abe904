"""Seeds for vector slots: ``(B, F)`` in, the same shape out; the input itself until the first optimiser step.

As in :mod:`esperd.builtins.seeds.cnn` the zero-initialised layer stands last, so that it has a gradient from the start.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

EXPANSION = 2
"""Hidden units per feature of the residual block; transformers use 4, a seed starts smaller. Chosen, not measured."""

NARROWEST = 8
"""Hidden units at least, so that a slot of one feature still gets a block with something inside; chosen, not measured."""

RANK = 8
"""Rank of the low-rank seed, as in Hu et al. 2021, section 7.2, or half the features where that is less."""


def _zero_linear(features_in: int, features_out: int, *, bias: bool) -> nn.Linear:
    """Linear layer that outputs exactly zero at birth."""
    linear = nn.Linear(features_in, features_out, bias=bias)
    nn.init.zeros_(linear.weight)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


class MlpResidual(nn.Module):
    """``x + contract(gelu(expand(x)))``, contract = 0 at birth."""

    def __init__(self, features: int) -> None:
        super().__init__()
        hidden = max(NARROWEST, EXPANSION * features)
        self.delta = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), _zero_linear(hidden, features, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) → (B, F)."""
        delta: Tensor = self.delta(x)
        return x + delta


class MlpLowRank(nn.Module):
    """``x + up(down(x))``: a low-rank change of basis, up = 0 at birth."""

    def __init__(self, features: int) -> None:
        super().__init__()
        rank = max(1, min(RANK, features // 2))
        self.down = nn.Linear(features, rank, bias=False)
        self.up = _zero_linear(rank, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) → (B, F)."""
        delta: Tensor = self.up(self.down(x))
        return x + delta


class MlpGated(nn.Module):
    """``x + out(silu(gate(x)) * value(x))``: products of features, out = 0 at birth."""

    def __init__(self, features: int) -> None:
        super().__init__()
        hidden = max(NARROWEST, features)
        self.gate = nn.Linear(features, hidden, bias=False)
        self.value = nn.Linear(features, hidden, bias=False)
        self.out = _zero_linear(hidden, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) → (B, F)."""
        delta: Tensor = self.out(functional.silu(self.gate(x)) * self.value(x))
        return x + delta


def mlp_residual(shape: tuple[int, ...]) -> MlpResidual:
    """Build :class:`MlpResidual` for a slot of shape (F,)."""
    return MlpResidual(shape[0])


def mlp_low_rank(shape: tuple[int, ...]) -> MlpLowRank:
    """Build :class:`MlpLowRank` for a slot of shape (F,)."""
    return MlpLowRank(shape[0])


def mlp_gated(shape: tuple[int, ...]) -> MlpGated:
    """Build :class:`MlpGated` for a slot of shape (F,)."""
    return MlpGated(shape[0])
