"""A layer with seeds behind it, as an ordinary module: it knows torch and how seeds are blended in, no slots and no stages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

OWN = ("base_layer", "seeds")
"""Modules of a :class:`GrownLayer` that are not the layer's."""


@torch.fx.wrap
def settled(x: torch.Tensor) -> torch.Tensor:
    """What a seed's module is handed, as :meth:`esperd.growth.network.Seed.forward` does it: contiguous where no gradient flows.

    Wrapped: which of the two it is depends on the call, so symbolic tracing must not look inside.
    """
    return x if x.requires_grad else x.contiguous()


@torch.fx.wrap
def answered(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a seed's module gave, in the dtype of what it was handed: under autocast they may differ."""
    return output if output.dtype == x.dtype else output.to(x.dtype)


class GrownSeed(nn.Module):
    """A seed that has become a part of its network.

    Args:
        module: keeps the shape of what it takes.
        operator: how what it computes enters.
        alpha: () share of its output that flows.
        whole: whether its output takes the place of what flows by.
    """

    alpha: torch.Tensor

    def __init__(self, module: nn.Module, operator: nn.Module, alpha: torch.Tensor, *, whole: bool) -> None:
        super().__init__()
        self.module = module
        self.operator = operator
        # as in the network: a number would be rounded otherwise in the gradient
        self.register_buffer("alpha", alpha, persistent=False)
        self.whole = whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) → (B, ...), alpha applied."""
        output = answered(self.module(settled(x)), x)
        if self.whole:
            return output
        entered: torch.Tensor = self.operator(x, output, self.alpha)
        return entered

    def extra_repr(self) -> str:
        """What ``print`` shows beside the class."""
        return f"alpha={float(self.alpha):g}"


class GrownLayer(nn.Module):
    """A layer of the host and the seeds grown behind it, in the layer's place.

    Attributes that it does not have itself are the layer's, for reading and for writing: a host that looks at
    ``self.layer.weight`` finds it. ``base_layer`` and ``seeds`` are its own.

    Args:
        base_layer: the host's module.
        seeds: by number, oldest first.
    """

    base_layer: nn.Module
    seeds: nn.Sequential

    def fill(self, base_layer: nn.Module, seeds: Mapping[str, GrownSeed]) -> None:
        """Give it what it stands for. Apart from construction, so that a host may refer to a layer before it is copied."""
        self.base_layer = base_layer
        self.seeds = nn.Sequential(OrderedDict(seeds))

    def forward(self, *inputs: Any, **keywords: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the layer takes
        """(B, ...), what the layer returns, grown on."""
        output: torch.Tensor = self.seeds(self.base_layer(*inputs, **keywords))
        return output

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the layer holds under that name
        try:
            return super().__getattr__(name)
        except AttributeError:
            # a dunder names a protocol (copying, pickling), and the layer's would copy the layer without its seeds
            if name.startswith("__") or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - as above
        modules: Mapping[str, nn.Module | None] = self.__dict__.get("_modules", {})
        layer = modules.get("base_layer")
        own = name in self.__dict__ or name in OWN or hasattr(type(self), name)
        if layer is None or own or not hasattr(layer, name):
            super().__setattr__(name, value)
        else:
            setattr(layer, name, value)


class GrownContainer(GrownLayer):
    """A :class:`GrownLayer` in the place of a module that is a sequence of modules, such as ``nn.Sequential``. Apart, because
    a module with a length is false when it is empty, and one without is always true.
    """

    base_layer: nn.Sequential

    def __len__(self) -> int:
        return len(self.base_layer)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.base_layer)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an index or a slice, as the container has it
        return self.base_layer[index]
