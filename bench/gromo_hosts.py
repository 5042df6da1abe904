"""The networks that both sides of the comparison with gromo start from: plain torch modules, and gromo's with the same weights.

gromo grows networks that are built of its own layers, esperd grows a plain module, so each start exists twice. The plain one is
made first; its weights are copied into gromo's, and both must then answer alike.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

CLASSES = 10


def dense(features: int, hidden: int) -> nn.Module:
    """Two hidden layers with SELU, the activation of gromo's ``GrowingMLP``."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(features, hidden), nn.SELU()),
        nn.Sequential(nn.Linear(hidden, hidden), nn.SELU()),
        nn.Linear(hidden, CLASSES),
    )


def gromo_dense(features: int, hidden: int) -> Any:
    """The same start as gromo's ``GrowingMLP``."""
    from gromo.containers.growing_mlp import GrowingMLP

    return GrowingMLP(features, CLASSES, hidden_size=hidden, number_hidden_layers=2, device=torch.device("cpu"))


class PreactivationBlock(nn.Module):
    """Norm, ReLU, convolution, norm, ReLU, convolution, added to the input; He et al. 2016, "Identity Mappings".

    Args:
        inputs: channels in.
        hidden: channels between the convolutions.
        outputs: channels out; where they differ, a norm, a ReLU and a 1x1 convolution stand on the other path.
        stride: of the first convolution.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.first = nn.Conv2d(inputs, hidden, 3, stride=stride, padding=1, bias=False)
        self.between = nn.Sequential(nn.BatchNorm2d(hidden), nn.ReLU())
        self.second = nn.Conv2d(hidden, outputs, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        result: torch.Tensor = self.second(self.between(self.first(self.enter(x)))) + self.shortcut(x)
        return result


def residual(planes: int, hidden: tuple[int, int, int]) -> nn.Module:
    """Three stages of one block, ``planes``, twice and four times as wide; ``hidden`` channels inside each block."""
    blocks = nn.Sequential()
    inputs = planes
    for number, inside in enumerate(hidden):
        outputs = planes * 2**number
        blocks.append(PreactivationBlock(inputs, inside, outputs, stride=1 if number == 0 else 2))
        inputs = outputs
    return nn.Sequential(
        nn.Conv2d(3, planes, 3, padding=1, bias=False),
        blocks,
        nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)),
    )


def gromo_residual(planes: int, hidden: tuple[int, int, int]) -> Any:
    """The same start as gromo's ``ResNetBasicBlock``; its blocks know that they are to become as wide as they go out."""
    from gromo.containers.resnet import init_full_resnet_structure

    return init_full_resnet_structure(
        input_shape=(3, 16, 16),
        out_features=CLASSES,
        device=torch.device("cpu"),
        hidden_channels=hidden,
        number_of_blocks_per_stage=1,
        inplanes=planes,
        nb_stages=3,
        skip_first_downsample=False,
    )


def copy_weights(plain: nn.Module, grown: nn.Module, sample: torch.Tensor) -> None:
    """Give gromo's network the plain one's weights, and check that both answer alike.

    Args:
        plain: read.
        grown: gromo's; its parameters are registered in the same order.
        sample: (B, ...) inputs to compare on.

    Raises:
        RuntimeError: the two are not the same network.
    """
    for ours, theirs in itertools.zip_longest(plain.parameters(), grown.parameters()):
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise RuntimeError(
                f"gromo's network has other parameters: {ours if ours is None else tuple(ours.shape)} "
                f"against {theirs if theirs is None else tuple(theirs.shape)}"
            )
        with torch.no_grad():
            theirs.copy_(ours)
    plain.eval(), grown.eval()
    with torch.no_grad():
        if not torch.allclose(plain(sample), grown(sample), atol=1e-5):
            raise RuntimeError("gromo's network answers otherwise with the same weights")
    plain.train(), grown.train()
