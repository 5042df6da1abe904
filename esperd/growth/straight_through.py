"""The straight-through estimator: the host's tensor flows on, and the seed receives the gradient it would have had in its place.

Bengio, Léonard & Courville 2013 (arXiv:1308.3432). It gives a seed a direction and no magnitude: the loss never sees what the
seed says, so nothing holds its output back. It is here to be compared with; see :mod:`esperd.growth.incubation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esperd.growth.streams import Streams, forked


class _StraightThrough(torch.autograd.Function):
    """``(host, entered) → host``; both receive the gradient of what left."""

    @staticmethod
    def forward(_ctx: Any, host: Tensor, _entered: Tensor) -> Tensor:  # noqa: ANN401 - autograd's context
        return host.clone()  # not host itself: what follows may write to it in place

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - autograd's context
        return gradients[0], gradients[0]


def straight_through(host: Tensor, enter: Callable[[Tensor], Tensor]) -> Tensor:
    """Pass the host's tensor on, to the bit, and teach a seed what the loss wants in its place.

    The seed draws from a fork of the RNG stream, so the host's own draws stay what they were.

    Args:
        host: (B, ...) what reaches the slot.
        enter: what would leave the slot if the seed were heard; called with ``host`` cut from the graph.

    Returns:
        (B, ...) equal to ``host``.
    """
    with forked(host.device, Streams.take(host.device, everybodys=False)):  # a seed draws from torch's streams alone
        entered = enter(host.detach())
    result: Tensor = _StraightThrough.apply(host, entered)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return result
