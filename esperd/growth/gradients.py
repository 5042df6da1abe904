"""Gradient statistics of seeds against their host, gathered without waiting for the device.

Norms stay on the device until an epoch ends; only then are they read, once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

STRIDE = 4
"""A norm is taken every so many steps; chosen, not measured."""

DECAY = 0.9
"""Decay of the moving average over sampled steps."""

VANISHING = 1e-7
"""Norm of a parameter's gradient below which it counts as vanished."""

RATIO_CEILING = 10.0
"""A ratio is clamped here: beyond it, how much larger carries no information."""

HOST_FLOOR = 1e-12
"""Host norm below which there is nothing to compare with, and the ratio is unknown."""


def gradient_norms(parameters: Iterable[nn.Parameter]) -> torch.Tensor | None:
    """L2 norms of the gradients, one per parameter tensor (P,); None when no parameter has a gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    return torch.stack(torch._foreach_norm(gradients))


@dataclass
class GradientRatio:
    """Moving average of a seed's parameter-normalised gradient norm over its host's.

    ratio = (|g_seed| / |g_host|) · sqrt(n_host / n_seed): one means a seed parameter moves as much as a host parameter.
    The average is bias-corrected, so that the first samples count as what they are.
    """

    host_parameters: int
    seed_parameters: int
    samples: int = 0
    average: torch.Tensor | None = None
    vanished: list[torch.Tensor] = field(default_factory=list)

    def observe(self, host: torch.Tensor | None, seed: torch.Tensor | None) -> None:
        """Take in one step's norms (as from :func:`gradient_norms`); a step without both says nothing."""
        if host is None or seed is None:
            return
        scale = (self.host_parameters / max(self.seed_parameters, 1)) ** 0.5
        host_norm = host.norm()
        ratio = torch.where(host_norm > HOST_FLOOR, seed.norm() / host_norm.clamp_min(HOST_FLOOR) * scale, torch.nan)
        ratio = ratio.clamp_max(RATIO_CEILING)
        self.average = (1 - DECAY) * ratio if self.average is None else DECAY * self.average + (1 - DECAY) * ratio
        self.samples += 1
        self.vanished.append((seed < VANISHING).float().mean())

    def read(self) -> tuple[float | None, float | None]:
        """The ratio and the mean share of vanished gradients so far; None for what was never measured."""
        if self.average is None:
            return None, None
        ratio = float(self.average) / (1 - DECAY**self.samples)
        vanished = float(torch.stack(self.vanished).mean())
        return (ratio if ratio == ratio else None), vanished
