"""Gradient statistics of seeds against their host, gathered without waiting for the device.

Norms stay on the device until an epoch ends; only then are they read, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

STRIDE = 4
"""Norms are taken at the fourth step of a seed, the eighth, and so on; chosen, not measured."""

DECAY = 0.9
"""Decay of the moving average over sampled steps."""

VANISHING = 1e-7
"""Norm of a parameter tensor's gradient below which it counts as vanished."""

EXPLODING = 100.0
"""A tensor's gradient counts as exploded when its root mean square is so many times the host's, or when it is not finite.
Relative, because losses have scales; chosen, not measured."""

RATIO_CEILING = 10.0
"""A ratio is clamped here: beyond it, how much larger carries no information."""

HOST_FLOOR = 1e-12
"""Host norm below which there is nothing to compare with, and the sample says nothing."""


def gradient_norms(parameters: Iterable[nn.Parameter]) -> torch.Tensor | None:
    """L2 norms of the gradients, one per parameter tensor (P,), in float32; 0 for a tensor without one, None when none has
    one.
    """
    held = list(parameters)
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    if not gradients:
        return None
    norms = iter(torch._foreach_norm(gradients))
    zero = torch.zeros((), dtype=gradients[0].dtype, device=gradients[0].device)
    return torch.stack([zero if parameter.grad is None else next(norms) for parameter in held]).float()


@dataclass(frozen=True, kw_only=True)
class GradientHealth:
    """What the samples of an incubation say; None for what was never measured."""

    ratio: float | None = None
    vanished_share: float | None = None
    exploded_share: float | None = None


class GradientRatio:
    """Moving average of a seed's parameter-normalised gradient norm over its host's, and how healthy its gradients are.

    ratio = (|g_seed| / |g_host|) · sqrt(n_host / n_seed): one means a seed parameter moves as much as a host parameter.
    The average is bias-corrected by the weight that its samples have, so that the first ones count as what they are; a sample
    whose host norm vanished, or that is no number, has no weight.

    Args:
        host_parameters: parameters that the host's norm is a norm over.
        sizes: elements of each parameter tensor of the seed, in the order of its norms.
    """

    SUMS = ("average", "weight", "vanished", "exploded", "samples")
    """Names of the running sums, in order."""

    def __init__(self, host_parameters: int, sizes: Iterable[int]) -> None:
        self.host_parameters = host_parameters
        self.sizes = tuple(sizes)
        self._root_sizes = torch.tensor(self.sizes, dtype=torch.float32).sqrt()
        self.sums: torch.Tensor | None = None
        """(5,) the running sums by :attr:`SUMS`, float32, on the device; None before the first sample."""

    def observe(self, host: torch.Tensor | None, seed: torch.Tensor | None) -> None:
        """Take in one step's norms, as from :func:`gradient_norms`, one for each of the seed's tensors. Without the host's,
        the step says nothing of the ratio, and of what exploded only what is not finite.
        """
        if seed is None:
            return
        host_norm = torch.zeros((), device=seed.device) if host is None else host.norm()
        scale = (self.host_parameters / max(sum(self.sizes), 1)) ** 0.5
        ratio = (seed.norm() / host_norm.clamp_min(HOST_FLOOR) * scale).clamp_max(RATIO_CEILING)
        usable = (host_norm > HOST_FLOOR) & torch.isfinite(host_norm) & torch.isfinite(ratio)
        self._root_sizes = self._root_sizes.to(seed.device, non_blocking=True)  # a blocking copy waits for the device
        host_rms = host_norm / self.host_parameters**0.5
        exploded = ~torch.isfinite(seed) | ((seed / self._root_sizes > EXPLODING * host_rms) & (host_norm > HOST_FLOOR))
        if self.sums is None:
            self.sums = torch.zeros(len(self.SUMS), device=seed.device)
        kept = torch.where(usable, DECAY, 1.0)
        taken = torch.stack(
            [
                torch.where(usable, (1 - DECAY) * ratio, 0.0),
                torch.where(usable, 1.0 - DECAY, 0.0),
                (seed < VANISHING).float().mean(),
                exploded.float().mean(),
                torch.ones((), device=seed.device),
            ]
        )
        decays = torch.ones(len(self.SUMS), device=seed.device)
        decays[:2] = kept
        self.sums = decays * self.sums + taken

    def read(self) -> GradientHealth:
        """What is known so far; waits for the device."""
        if self.sums is None:
            return GradientHealth()
        average, weight, vanished, exploded, samples = self.sums.tolist()
        return GradientHealth(
            ratio=average / weight if weight > 0 else None,
            vanished_share=vanished / samples,
            exploded_share=exploded / samples,
        )
