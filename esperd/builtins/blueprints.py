"""The built-in blueprints: what can be grown, what it costs, where the structure comes from.

Formulas are written out here from the papers' structure, not asked from the modules: the contract check
(:mod:`esperd.growth.contract`) holds them against the true counts. H·W is the number of positions a convolution visits; T the
length of a sequence, whose causal attention is counted in full, as torch computes it.
"""

from __future__ import annotations

from esperd.declarations import Blueprint, Shape
from esperd.hookspecs import hookimpl

_CNN = "esperd.builtins.seeds.cnn"
_MLP = "esperd.builtins.seeds.mlp"
_TRANSFORMER = "esperd.builtins.seeds.transformer"


def _narrow(channels: int) -> int:
    """Hidden channels of the bottleneck and of squeeze-and-excite: a quarter, at least 8."""
    return max(8, channels // 4)


def _wide(features: int) -> int:
    """Hidden units of the residual block: twice the features, at least 8."""
    return max(8, 2 * features)


def _rank(features: int, largest: int = 8) -> int:
    """Rank of a low-rank seed: the largest, or half the features where that is less."""
    return max(1, min(largest, features // 2))


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


def _pointwise_parameters(shape: Shape) -> int:
    return shape[0] ** 2 + 2 * shape[0]


def _pointwise_flops(shape: Shape) -> float:
    return 2.0 * _positions(shape) * shape[0] ** 2


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


def _inverted_residual_parameters(shape: Shape) -> int:
    channels, hidden = shape[0], 6 * shape[0]
    return 2 * channels * hidden + 9 * hidden + 4 * hidden


def _inverted_residual_flops(shape: Shape) -> float:
    channels, hidden = shape[0], 6 * shape[0]
    return 2.0 * _positions(shape) * (2 * channels * hidden + 9 * hidden)


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


def _token_norm_parameters(shape: Shape) -> int:
    return 2 * shape[1] + 1


def _token_norm_flops(shape: Shape) -> float:  # noqa: ARG001 - no matrix product, whatever the shape
    return 0.0


def _lora_r8_parameters(shape: Shape) -> int:
    return 2 * shape[1] * _rank(shape[1], 8)


def _lora_r8_flops(shape: Shape) -> float:
    return 2.0 * shape[0] * _lora_r8_parameters(shape)


def _lora_r32_parameters(shape: Shape) -> int:
    return 2 * shape[1] * _rank(shape[1], 32)


def _lora_r32_flops(shape: Shape) -> float:
    return 2.0 * shape[0] * _lora_r32_parameters(shape)


def _attention_parameters(shape: Shape) -> int:
    return 4 * shape[1] ** 2 + 2 * shape[1]


def _attention_flops(shape: Shape) -> float:
    length, features = shape
    return 2.0 * (4 * length * features**2 + 2 * length**2 * features)


def _token_mlp_parameters(features: int, expansion: int) -> int:
    return 2 * expansion * features**2 + expansion * features + features + 2 * features


def _token_mlp_x2_parameters(shape: Shape) -> int:
    return _token_mlp_parameters(shape[1], 2)


def _token_mlp_x2_flops(shape: Shape) -> float:
    return 2.0 * shape[0] * 2 * 2 * shape[1] ** 2


def _token_mlp_x4_parameters(shape: Shape) -> int:
    return _token_mlp_parameters(shape[1], 4)


def _token_mlp_x4_flops(shape: Shape) -> float:
    return 2.0 * shape[0] * 2 * 4 * shape[1] ** 2


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
        name="pointwise",
        topology="cnn",
        factory=f"{_CNN}:pointwise",
        parameters=_pointwise_parameters,
        flops=_pointwise_flops,
        description="a pre-activated mix of channels at each position",
        source="Lin et al. 2013, Network in Network (arXiv:1312.4400); pre-activated as in He et al. 2016 (arXiv:1603.05027)",
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
        name="inverted_residual",
        topology="cnn",
        factory=f"{_CNN}:inverted_residual",
        parameters=_inverted_residual_parameters,
        flops=_inverted_residual_flops,
        description="widens to six times the channels, 3x3 within each, narrows again",
        source="Sandler et al. 2018, MobileNetV2 (arXiv:1801.04381); no norm behind the narrowing layer, which starts at zero",
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
    Blueprint(
        name="token_norm",
        topology="transformer",
        factory=f"{_TRANSFORMER}:token_norm",
        parameters=_token_norm_parameters,
        flops=_token_norm_flops,
        description="a learned share of layer normalisation; the cheapest seed for tokens",
        source="Ba et al. 2016 (arXiv:1607.06450); gated as in ReZero, Bachlechner et al. 2020 (arXiv:2003.04887)",
    ),
    Blueprint(
        name="lora_r8",
        topology="transformer",
        factory=f"{_TRANSFORMER}:lora_r8",
        parameters=_lora_r8_parameters,
        flops=_lora_r8_flops,
        description="a linear change of each token of rank at most 8",
        source="Hu et al. 2021, LoRA (arXiv:2106.09685)",
    ),
    Blueprint(
        name="lora_r32",
        topology="transformer",
        factory=f"{_TRANSFORMER}:lora_r32",
        parameters=_lora_r32_parameters,
        flops=_lora_r32_flops,
        description="a linear change of each token of rank at most 32",
        source="Hu et al. 2021, LoRA (arXiv:2106.09685)",
    ),
    Blueprint(
        name="causal_attention",
        topology="transformer",
        factory=f"{_TRANSFORMER}:causal_attention",
        parameters=_attention_parameters,
        flops=_attention_flops,
        description="each token reads itself and all before it",
        source="Vaswani et al. 2017 (arXiv:1706.03762); norm first as in Xiong et al. 2020 (arXiv:2002.04745)",
    ),
    Blueprint(
        name="window_attention",
        topology="transformer",
        factory=f"{_TRANSFORMER}:window_attention",
        parameters=_attention_parameters,
        flops=_attention_flops,
        description="each token reads itself and those just before it, a quarter of the sequence; at the cost of all of it",
        source="Jiang et al. 2023, Mistral 7B (arXiv:2310.06825), after Child et al. 2019 (arXiv:1904.10509)",
    ),
    Blueprint(
        name="token_mlp_x2",
        topology="transformer",
        factory=f"{_TRANSFORMER}:token_mlp_x2",
        parameters=_token_mlp_x2_parameters,
        flops=_token_mlp_x2_flops,
        description="norm, twice the features, GELU, back again, within each token",
        source="Vaswani et al. 2017 (arXiv:1706.03762) with GELU (arXiv:1606.08415), norm first (arXiv:2002.04745)",
    ),
    Blueprint(
        name="token_mlp_x4",
        topology="transformer",
        factory=f"{_TRANSFORMER}:token_mlp_x4",
        parameters=_token_mlp_x4_parameters,
        flops=_token_mlp_x4_flops,
        description="norm, four times the features, GELU, back again, within each token",
        source="Vaswani et al. 2017 (arXiv:1706.03762) with GELU (arXiv:1606.08415), norm first (arXiv:2002.04745)",
    ),
)


@hookimpl
def esperd_blueprints() -> tuple[Blueprint, ...]:
    """Kinds of seeds that come with esperd."""
    return BLUEPRINTS
