"""A small language model: a causal transformer with pre-norm blocks (Vaswani et al. 2017; Radford et al. 2019, GPT-2)."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional

from esperd.builtins.networks.options import positive, share
from esperd.errors import InvalidModel

EXPANSION = 4
"""Width of a block's hidden layer relative to the stream's, as in GPT-2."""
INITIAL_DEVIATION = 0.02
"""Of every weight matrix; what is added to the stream starts smaller by the root of the number of additions. GPT-2's."""


class CausalAttention(nn.Module):
    """Self-attention in which a place sees itself and what stands before it.

    Args:
        width: D of the stream.
        heads: each sees D / heads numbers.
        dropout: of attention weights, while training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, D/heads)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        result: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """Attention and a hidden layer, each normalised first and added to the stream.

    Args:
        width: D of the stream.
        heads: of the attention.
        dropout: of what is added, while training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(up=nn.Linear(width, EXPANSION * width), act=nn.GELU(), down=nn.Linear(EXPANSION * width, width))
        )
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        result: torch.Tensor = x + self.dropout2(self.mlp(self.norm2(x)))
        return result


class Transformer(nn.Module):
    """Tokens → logits of the token that follows each place.

    Blocks are named ``blocks.1``, ``blocks.2``, … Embedding and head are not tied: what a seed before the head is folded into
    must leave the embedding alone.

    Args:
        vocabulary: V, tokens that exist.
        context: the longest T.
        width: D of the stream.
        depth: blocks.
        heads: of each block's attention.
        dropout: while training.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(OrderedDict((str(index), Block(width, heads, dropout)) for index in range(1, depth + 1)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                nn.init.normal_(parameter, std=INITIAL_DEVIATION / math.sqrt(2 * depth))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 → (B, T, V).

        Raises:
            InvalidModel: ``ids`` are no whole numbers, not (B, T), or longer than the context.
        """
        if ids.dim() != 2 or ids.is_floating_point():
            raise InvalidModel(f"host 'transformer' takes (B, T) token ids, not {tuple(ids.shape)} {ids.dtype}")
        if ids.shape[1] > self.context:
            raise InvalidModel(
                f"samples of {ids.shape[1]} tokens are longer than the context {self.context} of host 'transformer'; "
                "set context in host_options and data_options to the same number",
                context=self.context,
                tokens=ids.shape[1],
            )
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.tokens(ids) + self.positions(places))  # (B, T, D)
        result: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return result


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INITIAL_DEVIATION)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def transformer(
    vocabulary: int = 256, context: int = 64, width: int = 64, depth: int = 4, heads: int = 4, dropout: float = 0.0
) -> Transformer:
    """Build the host ``transformer``, to be trained with the loss ``next_token``.

    Args:
        vocabulary: tokens that exist; the data's ids are below it.
        context: the longest sample, in tokens.
        width: numbers that stand for a token.
        depth: blocks; the defaults make 236,928 parameters.
        heads: of each block's attention; must divide ``width``.
        dropout: share that is dropped while training, from 0 to below 1.

    Raises:
        InvalidModel: when an option is out of its range, or ``heads`` does not divide ``width``.
    """
    host = "transformer"
    width, heads = positive(host, "width", width), positive(host, "heads", heads)
    if width % heads:
        raise InvalidModel(
            f"option 'heads' of host 'transformer' must divide 'width': {width} is no multiple of {heads}",
            host=host,
            option="heads",
            value=repr(heads),
        )
    return Transformer(
        positive(host, "vocabulary", vocabulary),
        positive(host, "context", context),
        width,
        positive(host, "depth", depth),
        heads,
        share(host, "dropout", dropout),
    )
