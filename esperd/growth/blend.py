"""How a seed's output enters the host: a convex blend, exact at both ends."""

from __future__ import annotations

import torch


def blend(host: torch.Tensor, seed: torch.Tensor, alpha: float) -> torch.Tensor:
    """Blend a seed's output into the host's.

    ``torch.lerp`` is exact at both ends: alpha 0 gives ``host`` to the bit, alpha 1 gives ``seed`` to the bit.

    Args:
        host: (B, ...) output of the slot's module.
        seed: same shape; the seed is residual inside, so this is host plus the seed's delta.
        alpha: 0 to 1.

    Returns:
        (B, ...) ``host + alpha * (seed - host)``.
    """
    return torch.lerp(host, seed, alpha)
