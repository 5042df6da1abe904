"""The built-in blueprints: what can be grown, what it costs, where the structure comes from.

Formulas are written out here from the papers' structure, not asked from the modules: the contract check
(:mod:`esperd.growth.contract`) holds them against the true counts. H·W is the number of positions a convolution visits.
"""

from __future__ import annotations

from esperd.declarations import Blueprint, Shape
from esperd.hookspecs import hookimpl

_CNN = "esperd.builtins.seeds.cnn"
_MLP = "esperd.builtins.seeds.mlp"


def _narrow(channels: int) -> int:
    """Hidden channels of the bottleneck and of squeeze-and-excite: a quarter, at least 8."""
    return max(8, channels // 4)


def _wide(features: int) -> int:
    """Hidden units of the residual block: twice the features, at least 8."""
    return max(8, 2 * features)


def _rank(features: int) -> int:
    """Rank of the low-rank seed: 8, or half the features where that is less."""
    return max(1, min(8, features // 2))


def _positions(shape: Shape) -> int:
    return shape[1] * shape[2]


def _norm_parameters(shape: Shape) -> int:
    return 2 * shape[0] + 1


def _norm_flops(shape: Shape) -> float:  # noqa: ARG001 - no convolution, no matrix product, whatever the shape
    return 0.0


def _squeeze_excite_parameters(shape: Shape) -> int:
    channels, hidden = shape[0], _narrow(shape[0])
    return 2 * channels * hidden + hidden + channels


def _squeeze_excite_flops(shape: Shape) -> float:
    return 2.0 * 2 * shape[0] * _narrow(shape[0])


def _bottleneck_parameters(shape: Shape) -> int:
    channels, hidden = shape[0], _narrow(shape[0])
    return 2 * channels * hidden + 9 * hidden**2 + 4 * hidden


def _bottleneck_flops(shape: Shape) -> float:
    channels, hidden = shape[0], _narrow(shape[0])
    return 2.0 * _positions(shape) * (2 * channels * hidden + 9 * hidden**2)


def _depthwise_parameters(shape: Shape) -> int:
    return 9 * shape[0] + 2 * shape[0] + shape[0] ** 2


def _depthwise_flops(shape: Shape) -> float:
    return 2.0 * _positions(shape) * (9 * shape[0] + shape[0] ** 2)


def _conv_light_parameters(shape: Shape) -> int:
    return 9 * shape[0] ** 2 + 2 * shape[0]


def _conv_light_flops(shape: Shape) -> float:
    return 2.0 * _positions(shape) * 9 * shape[0] ** 2


def _conv_heavy_parameters(shape: Shape) -> int:
    return 2 * _conv_light_parameters(shape)


def _conv_heavy_flops(shape: Shape) -> float:
    return 2 * _conv_light_flops(shape)


def _mlp_residual_parameters(shape: Shape) -> int:
    features, hidden = shape[0], _wide(shape[0])
    return 2 * features * hidden + hidden + features


def _mlp_residual_flops(shape: Shape) -> float:
    return 2.0 * 2 * shape[0] * _wide(shape[0])


def _mlp_low_rank_parameters(shape: Shape) -> int:
    return 2 * shape[0] * _rank(shape[0])


def _mlp_low_rank_flops(shape: Shape) -> float:
    return 2.0 * _mlp_low_rank_parameters(shape)


def _mlp_gated_parameters(shape: Shape) -> int:
    return 3 * shape[0] * max(8, shape[0])


def _mlp_gated_flops(shape: Shape) -> float:
    return 2.0 * _mlp_gated_parameters(shape)


BLUEPRINTS = (
    Blueprint(
        name="norm",
        topology="cnn",
        factory=f"{_CNN}:norm",
        parameters=_norm_parameters,
        flops=_norm_flops,
        description="a learned share of group normalisation; the cheapest seed",
        source="Wu & He 2018 (arXiv:1803.08494); gated as in ReZero, Bachlechner et al. 2020 (arXiv:2003.04887)",
    ),
    Blueprint(
        name="squeeze_excite",
        topology="cnn",
        factory=f"{_CNN}:squeeze_excite",
        parameters=_squeeze_excite_parameters,
        flops=_squeeze_excite_flops,
        description="scales each channel by what all channels hold on average",
        source="Hu et al. 2018 (arXiv:1709.01507); doubled sigmoid, so that it starts at 1",
    ),
    Blueprint(
        name="bottleneck",
        topology="cnn",
        factory=f"{_CNN}:bottleneck",
        parameters=_bottleneck_parameters,
        flops=_bottleneck_flops,
        description="narrows to a quarter of the channels, a 3x3 convolution, widens again",
        source="He et al. 2015 (arXiv:1512.03385); last layer zero as in Goyal et al. 2017 (arXiv:1706.02677)",
    ),
    Blueprint(
        name="depthwise",
        topology="cnn",
        factory=f"{_CNN}:depthwise",
        parameters=_depthwise_parameters,
        flops=_depthwise_flops,
        description="separable convolution: 3x3 within each channel, then a mix of channels",
        source="Chollet 2017 (arXiv:1610.02357)",
    ),
    Blueprint(
        name="conv_light",
        topology="cnn",
        factory=f"{_CNN}:conv_light",
        parameters=_conv_light_parameters,
        flops=_conv_light_flops,
        description="one pre-activated 3x3 convolution",
        source="He et al. 2016 (arXiv:1603.05027)",
    ),
    Blueprint(
        name="conv_heavy",
        topology="cnn",
        factory=f"{_CNN}:conv_heavy",
        parameters=_conv_heavy_parameters,
        flops=_conv_heavy_flops,
        description="two pre-activated 3x3 convolutions; the dearest seed",
        source="He et al. 2016 (arXiv:1603.05027)",
    ),
    Blueprint(
        name="mlp_residual",
        topology="mlp",
        factory=f"{_MLP}:mlp_residual",
        parameters=_mlp_residual_parameters,
        flops=_mlp_residual_flops,
        description="expands to twice the features, GELU, contracts again",
        source="the feed-forward block of Vaswani et al. 2017 (arXiv:1706.03762) with GELU (arXiv:1606.08415)",
    ),
    Blueprint(
        name="mlp_low_rank",
        topology="mlp",
        factory=f"{_MLP}:mlp_low_rank",
        parameters=_mlp_low_rank_parameters,
        flops=_mlp_low_rank_flops,
        description="a linear change of rank at most 8; the cheapest seed for vectors",
        source="Hu et al. 2021, LoRA (arXiv:2106.09685)",
    ),
    Blueprint(
        name="mlp_gated",
        topology="mlp",
        factory=f"{_MLP}:mlp_gated",
        parameters=_mlp_gated_parameters,
        flops=_mlp_gated_flops,
        description="products of features: one projection gates another",
        source="Shazeer 2020, SwiGLU (arXiv:2002.05202)",
    ),
)


@hookimpl
def esperd_blueprints() -> tuple[Blueprint, ...]:
    """Kinds of seeds that come with esperd."""
    return BLUEPRINTS
