"""The closed table of operations a kernel may use: ATen name → fast C entry point and what its arguments may be.

A kernel's file can name nothing that is not a key of this table, so it can run nothing else. Every operation here is a pure
function of tensors that returns one tensor, except batch normalisation in training, which updates its two running buffers.
The C bindings are called directly: the Python layers of ``torch.nn.functional`` cost more than small kernels compute.

A signature lists the positional arguments as words; those after ``|`` may be left out. ``?`` admits None.

=========  =====================================================================
tensor     a value, a parameter or a buffer
operand    a tensor or a number
buffer     a buffer, and nothing else: the operation may write to it
int        an integer
number     an integer or a finite float
zero       0 or 0.0, and nothing else: a number that would switch on what no kernel may do
bool       true or false
mode       true, false, or ``%training``: whether the module is in training mode
ints       a list of integers
=========  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from esperd.errors import KernelRejected

_nn: Any = torch._C._nn


@dataclass(frozen=True)
class Operation:
    """One allowed operation.

    Args:
        function: what runs, called with the arguments in order.
        signature: kinds of the positional arguments, see the module's docstring.
        required: how many of them must be there.
        keywords: kinds of the keyword arguments, all optional.
    """

    function: Callable[..., torch.Tensor]
    signature: tuple[str, ...]
    required: int
    keywords: Mapping[str, str] = field(default_factory=dict)


def _operation(function: Callable[..., Any], signature: str, **keywords: str) -> Operation:
    required, _, optional = signature.partition("|")
    return Operation(
        function=function,
        signature=(*required.split(), *optional.split()),
        required=len(required.split()),
        keywords=MappingProxyType(keywords),
    )


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any, **named: Any) -> torch.Tensor:  # noqa: ANN401 - as torch takes them
    """Scaled dot-product attention between tensors that belong together.

    Torch's fused form on a CPU does not compare the lengths of keys and values: it reads beyond the shorter one, and the
    process dies (torch 2.13).

    Raises:
        KernelRejected: when keys and values differ in more than the size of a vector.
    """
    if key.shape[:-1] != value.shape[:-1]:
        raise KernelRejected(f"attention over keys {tuple(key.shape)} that have values {tuple(value.shape)}")
    attended: torch.Tensor = _nn.scaled_dot_product_attention(query, key, value, *options, **named)
    return attended


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        # layers
        "aten.conv1d.default": _operation(torch.conv1d, "tensor tensor | tensor? ints ints ints int"),
        "aten.conv2d.default": _operation(torch.conv2d, "tensor tensor | tensor? ints ints ints int"),
        "aten.linear.default": _operation(_nn.linear, "tensor tensor | tensor?"),
        "aten.matmul.default": _operation(torch.matmul, "tensor tensor"),
        # no dropout of weights: it is drawn also in evaluation, unless its rate differs between the modes
        "aten.scaled_dot_product_attention.default": _operation(
            _attention, "tensor tensor tensor | tensor? zero bool", scale="number?", enable_gqa="bool"
        ),
        # norms; the last flag of batch and group norm asks for cuDNN and changes no result beyond rounding
        "aten.batch_norm.default": _operation(torch.batch_norm, "tensor tensor? tensor? buffer? buffer? mode number number bool"),
        "aten.group_norm.default": _operation(torch.group_norm, "tensor int | tensor? tensor? number bool"),
        "aten.layer_norm.default": _operation(torch.layer_norm, "tensor ints | tensor? tensor? number bool"),
        "aten.rms_norm.default": _operation(torch.rms_norm, "tensor ints | tensor? number?"),
        # activations
        "aten.relu.default": _operation(torch.relu, "tensor"),
        "aten.relu6.default": _operation(_nn.relu6, "tensor"),
        "aten.leaky_relu.default": _operation(_nn.leaky_relu, "tensor | number"),
        "aten.prelu.default": _operation(torch.prelu, "tensor tensor"),
        "aten.elu.default": _operation(_nn.elu, "tensor | number number number"),
        "aten.gelu.default": _operation(_nn.gelu, "tensor"),
        "aten.silu.default": _operation(_nn.silu, "tensor"),
        "aten.mish.default": _operation(_nn.mish, "tensor"),
        "aten.hardswish.default": _operation(_nn.hardswish, "tensor"),
        "aten.hardsigmoid.default": _operation(_nn.hardsigmoid, "tensor"),
        "aten.hardtanh.default": _operation(_nn.hardtanh, "tensor | number number"),
        "aten.softplus.default": _operation(_nn.softplus, "tensor | number number"),
        "aten.sigmoid.default": _operation(torch.sigmoid, "tensor"),
        "aten.tanh.default": _operation(torch.tanh, "tensor"),
        "aten.softmax.int": _operation(torch.softmax, "tensor int"),
        "aten.dropout.default": _operation(torch.dropout, "tensor number mode"),
        # pooling and reductions
        "aten.max_pool2d.default": _operation(torch.max_pool2d, "tensor ints | ints ints ints bool"),
        "aten.avg_pool2d.default": _operation(_nn.avg_pool2d, "tensor ints | ints ints bool bool int?"),
        "aten.adaptive_avg_pool2d.default": _operation(_nn.adaptive_avg_pool2d, "tensor ints"),
        "aten.mean.dim": _operation(torch.mean, "tensor ints | bool"),
        "aten.sum.dim_IntList": _operation(torch.sum, "tensor ints | bool"),
        "aten.amax.default": _operation(torch.amax, "tensor | ints bool"),
        # arithmetic
        "aten.add.Tensor": _operation(torch.add, "tensor operand", alpha="number"),
        "aten.sub.Tensor": _operation(torch.sub, "tensor operand", alpha="number"),
        "aten.rsub.Scalar": _operation(torch.rsub, "tensor number | number"),
        "aten.mul.Tensor": _operation(torch.mul, "tensor operand"),
        "aten.div.Tensor": _operation(torch.div, "tensor operand"),
        "aten.pow.Tensor_Scalar": _operation(torch.pow, "tensor number"),
        "aten.neg.default": _operation(torch.neg, "tensor"),
        "aten.abs.default": _operation(torch.abs, "tensor"),
        "aten.exp.default": _operation(torch.exp, "tensor"),
        "aten.sqrt.default": _operation(torch.sqrt, "tensor"),
        "aten.rsqrt.default": _operation(torch.rsqrt, "tensor"),
        # masks
        "aten.ones_like.default": _operation(torch.ones_like, "tensor"),
        "aten.tril.default": _operation(torch.tril, "tensor | int"),
        "aten.triu.default": _operation(torch.triu, "tensor | int"),
        "aten.gt.Scalar": _operation(torch.gt, "tensor number"),
        # shape
        "aten.view.default": _operation(torch.Tensor.view, "tensor ints"),
        "aten.reshape.default": _operation(torch.reshape, "tensor ints"),
        "aten.flatten.using_ints": _operation(torch.flatten, "tensor | int int"),
        "aten.unflatten.int": _operation(torch.unflatten, "tensor int ints"),
        "aten.select.int": _operation(torch.select, "tensor int int"),
        "aten.unsqueeze.default": _operation(torch.unsqueeze, "tensor int"),
        "aten.squeeze.dim": _operation(torch.squeeze, "tensor int"),
        "aten.permute.default": _operation(torch.permute, "tensor ints"),
        "aten.transpose.int": _operation(torch.transpose, "tensor int int"),
        "aten.expand.default": _operation(torch.Tensor.expand, "tensor ints"),
        "aten.contiguous.default": _operation(torch.Tensor.contiguous, "tensor"),
        "aten.clone.default": _operation(torch.clone, "tensor"),
    }
)

VIEWS = frozenset(
    {
        "aten.view.default",
        "aten.reshape.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.select.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.permute.default",
        "aten.transpose.int",
        "aten.expand.default",
        "aten.contiguous.default",
        # in evaluation it returns its input itself
        "aten.dropout.default",
    }
)
"""Operations whose result may share memory with their input."""

IN_PLACE: Mapping[str, str] = MappingProxyType(
    {
        "aten.relu_.default": "aten.relu.default",
        "aten.leaky_relu_.default": "aten.leaky_relu.default",
        "aten.elu_.default": "aten.elu.default",
        "aten.silu_.default": "aten.silu.default",
        "aten.mish_.default": "aten.mish.default",
        "aten.hardswish_.default": "aten.hardswish.default",
        "aten.hardsigmoid_.default": "aten.hardsigmoid.default",
        "aten.hardtanh_.default": "aten.hardtanh.default",
        "aten.sigmoid_.default": "aten.sigmoid.default",
        "aten.tanh_.default": "aten.tanh.default",
        "aten.add_.Tensor": "aten.add.Tensor",
        "aten.sub_.Tensor": "aten.sub.Tensor",
        "aten.mul_.Tensor": "aten.mul.Tensor",
        "aten.div_.Tensor": "aten.div.Tensor",
    }
)
"""In-place operations and the pure ones that compute the same; the exporter replaces one by the other."""
