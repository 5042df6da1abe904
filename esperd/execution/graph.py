"""The portable form of a kernel: a list of operations as canonical JSON. It is data; reading it runs nothing.

A document of format 1::

    {"format":1,
     "inputs":["%x"],
     "parameters":{"conv.weight":[[8,8,3,3],"float32"]},
     "buffers":{"norm.running_mean":[[8],"float32"]},
     "ops":[["%0","aten.conv2d.default",["%x","conv.weight",null,[1,1],[1,1]],{}],...],
     "output":"%3",
     "mutations":{"norm.num_batches_tracked":1}}

Strings among the arguments are references: to a parameter or buffer by its dotted name, to the input or to the result of an
earlier operation by its name with ``%``, or ``%training``. Everything else is a literal: integer, finite float, boolean,
null or a list of integers. ``mutations`` names counters: integer buffers and what is added to them at each forward in training.

Canonical means: fields in this order, parameters and buffers in module order (which fixes the order of ``parameters()``),
values numbered from 0, no spaces. Equal modules give equal bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from esperd.errors import KernelRejected
from esperd.execution.operations import OPERATIONS, Operation
from esperd.messages.kernels import KERNEL_FORMAT

LARGEST_DOCUMENT_BYTES = 1024 * 1024
LARGEST_ELEMENTS = 2**28
"""Elements all parameters and buffers may have together: 1 GiB of float32."""
MAX_OPERATIONS = 512
MAX_TENSORS = 1024
"""Parameters and buffers together."""
MAX_DIMENSIONS = 8
LARGEST_INTEGER = 2**31 - 1

TRAINING = "%training"
"""Reference to the module's mode: true in training."""

_VALUE_NAME = re.compile(r"%[a-z0-9_]{1,32}", re.ASCII)
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64}){0,15}", re.ASCII)

Argument = int | float | bool | None | str | list[int]
TensorSpec = tuple[tuple[int, ...], str]
"""Shape and dtype."""

FLOATING = ("float32", "float64", "float16", "bfloat16")
DTYPES = (*FLOATING, "int64", "int32", "bool")


class Step(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One operation: the name of its result, what it is, and its arguments."""

    name: str
    operation: str
    arguments: list[Argument]
    keywords: dict[str, int | float | bool | None]


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel's graph, as in the module's docstring."""

    format: Literal[1]
    inputs: list[str]
    parameters: dict[str, TensorSpec]
    buffers: dict[str, TensorSpec]
    ops: list[Step]
    output: str
    mutations: dict[str, int]

    def encode(self) -> bytes:
        """Canonical JSON."""
        return msgspec.json.encode(self)


_decoder = msgspec.json.Decoder(Graph)


def decode_graph(data: bytes) -> Graph:
    """Read and check a graph. Nothing is executed or allocated.

    Args:
        data: JSON, at most 1 MiB.

    Raises:
        KernelRejected: when it is not a well-formed graph of this format: unknown operation, wrong arguments, a reference to
            something not yet defined, a name that is not one.
    """
    if len(data) > LARGEST_DOCUMENT_BYTES:
        raise KernelRejected(f"the graph has {len(data)} bytes; at most {LARGEST_DOCUMENT_BYTES} are read", size_bytes=len(data))
    try:
        graph = _decoder.decode(data)
    # 1 in 5 corrupt documents raises UnicodeDecodeError (a ValueError), deep nesting RecursionError
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise KernelRejected(f"the graph is not an op list of format {KERNEL_FORMAT}: {error}") from error
    check_graph(graph)
    return graph


def check_graph(graph: Graph) -> None:
    """Check everything that types do not say.

    Raises:
        KernelRejected: as :func:`decode_graph`.
    """
    if len(graph.inputs) != 1:
        raise KernelRejected(f"a kernel has one input, this one names {len(graph.inputs)}")
    if len(graph.ops) > MAX_OPERATIONS:
        raise KernelRejected(f"the graph has {len(graph.ops)} operations; at most {MAX_OPERATIONS} are allowed")
    _check_tensors(graph)
    kinds = {
        TRAINING: "mode",
        **dict.fromkeys(graph.parameters, "parameter"),
        **dict.fromkeys(graph.buffers, "buffer"),
    }
    _define(graph.inputs[0], kinds)
    for step in graph.ops:
        _check_step(step, kinds)
        _define(step.name, kinds)
    if kinds.get(graph.output) != "value":
        raise KernelRejected(f"the output {graph.output!r} is no value of the graph")
    for name, increment in graph.mutations.items():
        if name not in graph.buffers or graph.buffers[name] not in (((), "int64"), ((), "int32")):
            raise KernelRejected(f"the mutation {name!r} is not a counter: a buffer that holds one integer")
        if abs(increment) > LARGEST_INTEGER:
            raise KernelRejected(f"the mutation {name!r} adds {increment}, which is no 32-bit integer")


def _define(name: str, kinds: dict[str, str]) -> None:
    if not _VALUE_NAME.fullmatch(name):
        raise KernelRejected(f"{name!r} is not a name for a value: '%' and up to 32 of a-z, 0-9, _")
    if name in kinds:
        raise KernelRejected(f"{name!r} is defined twice")
    kinds[name] = "value"


def _check_tensors(graph: Graph) -> None:
    tensors = [*graph.parameters.items(), *graph.buffers.items()]
    if len(tensors) > MAX_TENSORS:
        raise KernelRejected(f"the graph names {len(tensors)} parameters and buffers; at most {MAX_TENSORS} are allowed")
    names: set[str] = set()
    elements = 0
    for name, (shape, dtype) in tensors:
        if not _TENSOR_NAME.fullmatch(name):
            raise KernelRejected(f"{name!r} is not a dotted name of a parameter or buffer")
        if name in names:
            raise KernelRejected(f"{name!r} is both a parameter and a buffer")
        names.add(name)
        if dtype not in (FLOATING if name in graph.parameters else DTYPES):
            raise KernelRejected(f"{name!r} has the dtype {dtype!r}, which is not allowed here")
        if len(shape) > MAX_DIMENSIONS or any(not 0 <= size <= LARGEST_INTEGER for size in shape):
            raise KernelRejected(f"{name!r} has an impossible shape: {shape}")
        elements += math.prod(shape)
    if elements > LARGEST_ELEMENTS:
        raise KernelRejected(f"parameters and buffers have {elements} elements; at most {LARGEST_ELEMENTS} are allowed")
    for name in names:
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in names:
                raise KernelRejected(f"{parent!r} is both a tensor and the module of {name!r}")


def _check_step(step: Step, kinds: Mapping[str, str]) -> None:
    operation = OPERATIONS.get(step.operation)
    if operation is None:
        raise KernelRejected(f"{step.name} uses {step.operation!r}, which is not an allowed operation", operation=step.operation)
    count = len(step.arguments)
    if not operation.required <= count <= len(operation.signature):
        raise KernelRejected(
            f"{step.name}: {step.operation} takes {operation.required} to {len(operation.signature)} arguments, got {count}"
        )
    for position, argument in enumerate(step.arguments):
        _check_argument(f"{step.name}: argument {position} of", step, operation.signature[position], argument, kinds)
    _check_keywords(step, operation, kinds)


def _check_keywords(step: Step, operation: Operation, kinds: Mapping[str, str]) -> None:
    for keyword, argument in step.keywords.items():
        if keyword not in operation.keywords:
            raise KernelRejected(f"{step.name}: {step.operation} has no keyword {keyword!r}")
        _check_argument(f"{step.name}: {keyword} of", step, operation.keywords[keyword], argument, kinds)


def _check_argument(place: str, step: Step, kind: str, argument: Argument, kinds: Mapping[str, str]) -> None:
    if not _fits(kind.removesuffix("?"), argument, kinds) and not (kind.endswith("?") and argument is None):
        shown = repr(argument)[:80]
        problem = "is not defined before it" if isinstance(argument, str) and argument not in kinds else f"is no {kind}"
        raise KernelRejected(f"{place} {step.operation}: {shown} {problem}", operation=step.operation)


def _fits(kind: str, argument: Argument, kinds: Mapping[str, str]) -> bool:
    if isinstance(argument, str):
        referred = kinds.get(argument)
        allowed = {
            "tensor": ("value", "parameter", "buffer"),
            "operand": ("value", "parameter", "buffer"),
            "buffer": ("buffer",),
            "mode": ("mode",),
        }
        return referred in allowed.get(kind, ())
    if isinstance(argument, bool):
        return kind in ("bool", "mode")
    if kind == "zero":
        return isinstance(argument, int | float) and argument == 0
    if isinstance(argument, int):
        return kind in ("int", "number", "operand") and abs(argument) <= LARGEST_INTEGER
    if isinstance(argument, float):
        return kind in ("number", "operand") and math.isfinite(argument)
    if isinstance(argument, list):
        return kind == "ints" and len(argument) <= MAX_DIMENSIONS and all(abs(number) <= LARGEST_INTEGER for number in argument)
    return False
