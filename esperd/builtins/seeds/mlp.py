"""Seeds for vector slots: ``(B, F)`` in, the same shape out; the input itself until the first optimiser step."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from esperd.builtins.seeds.residual import Residual, zero_linear

EXPANSION = 2
"""Hidden units per feature of the residual block; transformers use 4, a seed starts smaller. Chosen, not measured."""

NARROWEST = 8
"""Hidden units at least, so that a slot of one feature still gets a block with something inside; chosen, not measured."""

RANK = 8
"""Rank of the low-rank seed, as in Hu et al. 2021, section 7.2, or half the features where that is less."""


class MlpGated(nn.Module):
    """``x + out(silu(gate(x)) * value(x))``: products of features, out = 0 at birth."""

    def __init__(self, features: int) -> None:
        super().__init__()
        hidden = max(NARROWEST, features)
        self.gate = nn.Linear(features, hidden, bias=False)
        self.value = nn.Linear(features, hidden, bias=False)
        self.out = zero_linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) → (B, F)."""
        delta: Tensor = self.out(functional.silu(self.gate(x)) * self.value(x))
        return x + delta


def mlp_residual(shape: tuple[int, ...]) -> Residual:
    """``x + contract(gelu(expand(x)))`` for a slot of shape (F,), contract = 0 at birth."""
    features, hidden = shape[0], max(NARROWEST, EXPANSION * shape[0])
    return Residual(nn.Linear(features, hidden), nn.GELU(), zero_linear(hidden, features, bias=True))


def mlp_low_rank(shape: tuple[int, ...]) -> Residual:
    """``x + up(down(x))`` for a slot of shape (F,): a low-rank change of basis, up = 0 at birth."""
    features, rank = shape[0], max(1, min(RANK, shape[0] // 2))
    return Residual(nn.Linear(features, rank, bias=False), zero_linear(rank, features))


def mlp_gated(shape: tuple[int, ...]) -> MlpGated:
    """Build :class:`MlpGated` for a slot of shape (F,)."""
    return MlpGated(shape[0])
