"""Efficient channel attention (ECA) as a seed: scales channels as squeeze-and-excite does, for a handful of parameters.

This is the entry module: the daemon imports it, so it imports no torch. The module that is grown stands in ``seeds``.
"""

from __future__ import annotations

import math

from esperd import hookimpl
from esperd.declarations import Blueprint, Shape


def kernel_size(channels: int) -> int:
    """How many channels are heard by one: the paper's equation 12, gamma = 2 and b = 1, rounded as in the authors' code."""
    reach = int((math.log2(channels) + 1) / 2)
    return reach if reach % 2 else reach + 1


def _parameters(shape: Shape) -> int:
    return kernel_size(shape[0])


def _flops(shape: Shape) -> float:
    return 2.0 * shape[0] * kernel_size(shape[0])


@hookimpl
def esperd_blueprints() -> list[Blueprint]:
    """One blueprint: ``eca``."""
    return [
        Blueprint(
            name="eca",
            topology="cnn",
            factory="esperd_example_blueprint.seeds:eca",
            parameters=_parameters,
            flops=_flops,
            description="scales each channel by what its neighbours hold on average",
            source="Wang et al. 2020, ECA-Net (arXiv:1910.03151); doubled sigmoid, so that it starts at 1",
        )
    ]
