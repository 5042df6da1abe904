"""Seeds for the slots of transformers: ``(B, T, D)`` in, the same shape out; the input itself until the first optimiser step.

One seed takes sequences of any length. What mixes tokens is causal, each token sees itself and tokens before it: a seed grown in
a language model must not read what the model is to predict.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from esperd.builtins.seeds.residual import Residual, zero_linear

MOST_HEADS = 8
"""Heads of an attention at most (Vaswani et al. 2017, section 3.2.2)."""

NARROWEST_HEAD = 32
"""Features of a head at least; chosen, not measured."""

WINDOW_SHARE = 4
"""The window is the slot's length divided by this: of short sequences, too, most lies outside. Chosen, not measured."""

SMALLEST_WINDOW = 2
"""Tokens that each token sees at least: itself alone would be no attention."""


class TokenNorm(nn.Module):
    """Lets the host take as much normalisation as helps: ``x + tanh(s) * (LN(x) - x)``, s = 0 at birth."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        normed: Tensor = self.norm(x)
        return x + torch.tanh(self.share) * (normed - x)


class CausalAttention(nn.Module):
    """``x + out(attention(LN(x)))``, out = 0 at birth: each token reads itself and those before it.

    Args:
        features: D.
        window: how many tokens each token sees, itself included; None: all of them.
    """

    def __init__(self, features: int, window: int | None = None) -> None:
        super().__init__()
        self.heads = heads_of(features)
        self.window = window
        self.norm = nn.LayerNorm(features)
        self.query = nn.Linear(features, features, bias=False)
        self.key = nn.Linear(features, features, bias=False)
        self.value = nn.Linear(features, features, bias=False)
        self.out = zero_linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        normed = self.norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for layer in (self.query, self.key, self.value)
        )
        if self.window is None:
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=_window_mask(x, self.window))
        delta: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return x + delta


def heads_of(features: int) -> int:
    """Heads of an attention over so many features: as many, up to 8, as divide them into parts of at least 32, else one."""
    fitting = [heads for heads in range(MOST_HEADS, 1, -1) if features % heads == 0 and features // heads >= NARROWEST_HEAD]
    return fitting[0] if fitting else 1


def _window_mask(x: Tensor, window: int) -> Tensor:
    """(T, T), true where the token of the row sees that of the column: itself and the ``window - 1`` before it.

    Built from a tensor, not from sizes: the operations of a kernel take tensors, so that one kernel serves every T.
    """
    tokens = x.select(0, 0).select(-1, 0)  # (T,), whose values do not matter
    everywhere = torch.ones_like(tokens.unsqueeze(0) + tokens.unsqueeze(1))  # (T, T)
    return everywhere.tril().triu(1 - window) > 0


def token_norm(shape: tuple[int, ...]) -> TokenNorm:
    """Build :class:`TokenNorm` for a slot of shape (T, D)."""
    return TokenNorm(shape[1])


def lora_r8(shape: tuple[int, ...]) -> Residual:
    """``x + up(down(x))`` of rank 8, or half the features where that is less; up = 0 at birth.

    Args:
        shape: (T, D), as for all of these.
    """
    return _low_rank(shape[1], 8)


def lora_r32(shape: tuple[int, ...]) -> Residual:
    """As :func:`lora_r8`, of rank 32."""
    return _low_rank(shape[1], 32)


def causal_attention(shape: tuple[int, ...]) -> CausalAttention:
    """Build :class:`CausalAttention` over everything before a token."""
    return CausalAttention(shape[1])


def window_attention(shape: tuple[int, ...]) -> CausalAttention:
    """Build :class:`CausalAttention` over a quarter of the slot's length, at least 2 tokens; the same at any other length."""
    return CausalAttention(shape[1], window=max(SMALLEST_WINDOW, shape[0] // WINDOW_SHARE))


def token_mlp_x2(shape: tuple[int, ...]) -> Residual:
    """``x + contract(gelu(expand(LN(x))))`` within each token, to twice the features; contract = 0 at birth."""
    return _token_mlp(shape[1], 2)


def token_mlp_x4(shape: tuple[int, ...]) -> Residual:
    """As :func:`token_mlp_x2`, to four times the features."""
    return _token_mlp(shape[1], 4)


def _low_rank(features: int, rank: int) -> Residual:
    rank = max(1, min(rank, features // 2))
    return Residual(nn.Linear(features, rank, bias=False), zero_linear(rank, features))


def _token_mlp(features: int, expansion: int) -> Residual:
    hidden = expansion * features
    return Residual(nn.LayerNorm(features), nn.Linear(features, hidden), nn.GELU(), zero_linear(hidden, features, bias=True))
