"""FLOPs as they are executed: counted once for each structure on the real model, then multiplied by samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ResultT = TypeVar("ResultT")

LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
"""Modules whose matrices are tables: no products, no FLOPs."""


def _recurrent_layer(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - shapes, then numbers
    """One layer and direction over a sequence: x (T, B, I), weights (G·H, I) and (G·H, H)."""
    x, input_weight, hidden_weight = shapes[:3]
    return int(2 * math.prod(x[:-1]) * (math.prod(input_weight) + math.prod(hidden_weight)))


def _recurrent_layer_backward(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - as above
    """Gradients of inputs and of weights: twice the forward pass."""
    return 2 * _recurrent_layer(*shapes)


def _trilinear(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - three shapes, then the axes of size 1 each of them gets
    """``nn.Bilinear`` and its gradients: a sum of products of three tensors over the axes of all of them."""
    expanded = []
    for shape, axes in zip(shapes[:3], shapes[3:6], strict=True):
        sizes = list(shape)
        for axis in sorted(axes):
            sizes.insert(axis, 1)
        expanded.append(sizes)
    return int(2 * math.prod(max(sizes) for sizes in zip(*expanded, strict=True)))


def _attention(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - shapes, then numbers
    """Attention's fused form on a CPU: query (B, H, S, E), key (B, H, T, E), value (B, H, T, V)."""
    query, key, value = shapes[:3]
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _attention_backward(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - the output's gradient first
    """The scores again, then the gradients of value, of the scores, of query and of key: five products for two."""
    return _attention(*shapes[1:4]) * 5 // 2


def _convolution_backward(*shapes: Any, **_: object) -> int:  # noqa: ANN401 - shapes, then numbers, as aten has them
    """Gradients of inputs and of weights, each as much as the forward pass. torch's own formula charges the weights' gradient of a
    convolution in groups as if it had none: a depthwise one with 72 channels 72 times too much.
    """
    outputs, inputs, weights, transposed, wanted = shapes[0], shapes[1], shapes[2], shapes[7], shapes[10]
    forward = 2 * math.prod(inputs if transposed else outputs) * math.prod(weights[1:])
    return int(forward * (bool(wanted[0]) + bool(wanted[1])))


UNKNOWN_TO_TORCH: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_layer,
    torch.ops.aten.mkldnn_rnn_layer_backward: _recurrent_layer_backward,
    torch.ops.aten._trilinear: _trilinear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.convolution_backward: _convolution_backward,
}
"""Operations with matrix products for which torch's counter has no formula, and would count them as free, or a wrong one."""


def _nothing(*_shapes: object, **_: object) -> int:
    return 0


for _name in ("silu_backward", "mish_backward"):
    # torch's counter takes apart what it has no formula for, and the parts round otherwise than the whole
    UNKNOWN_TO_TORCH[getattr(torch.ops.aten, _name)] = _nothing


def count_flops(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """Run ``work`` and count what it executes: convolutions and matrix products, forward and backward.

    A multiply-add counts as two. The numbers computed are those of an uncounted run, but for attention in eval mode: its fused
    form hides its products from the counter, so it is switched off while counting.

    Returns:
        What ``work`` returned, and the FLOPs of its convolutions, matrix products and attention.
    """
    with unfused_attention(), FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        result = work()
    return result, float(counter.get_total_flops())


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` from its fused inference path, which computes the same to rounding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def uncounted_modules(network: nn.Module, inputs: torch.Tensor) -> list[str]:
    """Modules with weight matrices that ran and for which no FLOPs were counted: their cost is unknown.

    Args:
        network: runs once, in the mode it is in; wrap the call in :func:`~esperd.growth.untouched.untouched`.
        inputs: (B, ...).

    Returns:
        Paths as in ``network.named_modules()``.
    """
    spent: dict[str, float] = {}
    handles = []
    with unfused_attention(), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        for name, module in network.named_modules():
            matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
            if not matrices or isinstance(module, LOOKUPS):
                continue

            def enter(_module: nn.Module, _inputs: object, name: str = name) -> None:
                spent[name] = spent.get(name, 0.0) - counter.get_total_flops()

            def leave(_module: nn.Module, _inputs: object, _output: object, name: str = name) -> None:
                spent[name] += counter.get_total_flops()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            network(inputs)
        finally:
            for handle in handles:
                handle.remove()
    return [name for name, flops in spent.items() if flops == 0.0]
