"""Runs a kernel: a module that interprets an op list, equal to the eager module it was exported from to the bit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from esperd.errors import KernelRejected
from esperd.execution.graph import TRAINING, Graph, Step, decode_graph
from esperd.execution.operations import OPERATIONS

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}

_Instruction = tuple[Callable[..., Tensor], Callable[[list[Any]], Any], tuple[int, ...], int]
"""What to call, how to pick its arguments from the registers, which registers those are, and the one its result goes to."""


class _Container(nn.Module):
    """A node of the module tree; it only holds parameters, buffers and other nodes under the eager module's names."""

    def forward(self) -> None:
        """A container computes nothing; the kernel does."""
        raise NotImplementedError("this module only holds the kernel's tensors; call the kernel")


class Program:
    """An op list bound to functions and registers; immutable, so copies of a kernel share it.

    Registers hold, in this order: literals, the mode, the input, parameters and buffers, results. A result's register is
    used again once nothing reads it any more: a forward without gradients holds no more memory than the eager module's.
    """

    def __init__(self, graph: Graph) -> None:
        self._literals: list[Any] = []
        self.tensors = (*graph.parameters, *graph.buffers)
        literals: dict[str, int] = {}
        for step in graph.ops:
            for argument in step.arguments:
                if not isinstance(argument, str) and repr(argument) not in literals:
                    literals[repr(argument)] = len(self._literals)
                    self._literals.append(tuple(argument) if isinstance(argument, list) else argument)
        registers = {TRAINING: len(self._literals), graph.inputs[0]: len(self._literals) + 1}
        for name in self.tensors:
            registers[name] = len(self._literals) + len(registers)
        last_read = _last_reads(graph)
        free: list[int] = []
        size = len(self._literals) + len(registers)
        instructions: list[_Instruction] = []
        for index, step in enumerate(graph.ops):
            read = [registers[argument] if isinstance(argument, str) else literals[repr(argument)] for argument in step.arguments]
            free.extend(registers[name] for name in last_read.get(index, ()))
            if free:
                registers[step.name] = free.pop()
            else:
                registers[step.name] = size
                size += 1
            if step.name not in last_read[None]:
                free.append(registers[step.name])
            instructions.append((_bind(step), _picker(read), tuple(read), registers[step.name]))
        self._instructions = tuple(instructions)
        self._output = registers[graph.output]
        self._results = size - len(self._literals) - 2 - len(self.tensors)

    def run(self, x: Tensor, tensors: list[Tensor | None], *, training: bool) -> Tensor:
        """Interpret the program.

        Args:
            x: (B, ...) the input.
            tensors: parameters and buffers in the order of :attr:`tensors`.
            training: mode of batch norm and dropout.
        """
        registers: list[Any] = [*self._literals, training, x, *tensors, *([None] * self._results)]
        if torch.compiler.is_compiling():  # a compiler that traces Python cannot look into an itemgetter
            for function, _, read, result in self._instructions:
                registers[result] = function(*[registers[index] for index in read])
        else:
            for function, pick, _, result in self._instructions:
                registers[result] = function(*pick(registers))
        output: Tensor = registers[self._output]
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self


def _last_reads(graph: Graph) -> dict[int | None, set[str]]:
    """Results by the index of the step that reads them last; under None, all that are read at all."""
    results = {step.name for step in graph.ops}
    last: dict[str, int] = {}
    for index, step in enumerate(graph.ops):
        for argument in step.arguments:
            if isinstance(argument, str) and argument in results:
                last[argument] = index
    grouped: dict[int | None, set[str]] = {None: {*last, graph.output}}
    for name, index in last.items():
        if name != graph.output:
            grouped.setdefault(index, set()).add(name)
    return grouped


def _bind(step: Step) -> Callable[..., Tensor]:
    function = OPERATIONS[step.operation].function
    return functools.partial(function, **step.keywords) if step.keywords else function


def _picker(registers: list[int]) -> Callable[[list[Any]], Any]:
    """From the registers to the arguments, in C. One argument is picked as a slice: a bare item would be unpacked."""
    if len(registers) == 1:
        return operator.itemgetter(slice(registers[0], registers[0] + 1))
    return operator.itemgetter(*registers)


class KernelModule(nn.Module):
    """A kernel as a module: same ``state_dict`` keys and order of ``parameters()`` as the eager module, any batch size.

    It trains and evaluates: batch norm and dropout follow ``self.training`` at each call, running statistics are updated as
    the eager module would. Fresh weights are loaded with ``load_state_dict``.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._program = Program(graph)
        self._holders: list[tuple[dict[str, Any], str]] = []
        """Where each tensor of the program is found. The dictionaries are the modules' own: ``to``, ``load_state_dict``
        and ``functional_call`` change what they hold, and a deep copy keeps them one."""
        self._counters: list[tuple[dict[str, Any], str, int]] = []
        for name in self._program.tensors:
            path, _, leaf = name.rpartition(".")
            owner = self._container(path)
            if leaf in _TAKEN:
                raise KernelRejected(f"a tensor may not be called {leaf!r}: torch.nn.Module has something of this name")
            held: dict[str, Any]
            if name in graph.parameters:
                held = owner._parameters  # filled directly: no attribute is ever looked up by a name from a file
                held[leaf] = nn.Parameter(tensors[name])
            else:
                held = owner._buffers
                held[leaf] = tensors[name]
            self._holders.append((held, leaf))
            if name in graph.mutations:
                self._counters.append((held, leaf, graph.mutations[name]))

    def _container(self, path: str) -> nn.Module:
        node: nn.Module = self
        for part in path.split(".") if path else ():
            if part in _TAKEN:
                raise KernelRejected(f"a module may not be called {part!r}: torch.nn.Module has something of this name")
            children = node._modules
            child = children.get(part)
            if child is None:
                child = children[part] = _Container()
            node = child
        return node

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) → (B, ...), as the eager module."""
        if self.training:
            for held, leaf, increment in self._counters:
                held[leaf].add_(increment)
        return self._program.run(x, [held[leaf] for held, leaf in self._holders], training=self.training)


_TAKEN = frozenset(dir(nn.Module())) | {"_program", "_holders", "_counters", "_container"}
"""Attributes of a module. A tensor or container of such a name would hide or be hidden by it."""


def load_kernel(graph: bytes, weights: bytes | None) -> KernelModule:
    """Build a kernel from its portable form. Nothing is executed, whatever the bytes hold.

    Args:
        graph: the op list.
        weights: safetensors with exactly the graph's parameters and buffers; None: every floating-point tensor is filled
            with NaN and every other with 0, to be replaced through ``load_state_dict`` before use.

    Raises:
        KernelRejected: when graph or weights are malformed or do not fit each other.
    """
    parsed = decode_graph(graph)
    specs = {**parsed.parameters, **parsed.buffers}
    if weights is not None:
        return KernelModule(parsed, _read_weights(weights, specs))
    return KernelModule(
        parsed,
        {
            name: torch.full(shape, float("nan") if TORCH_DTYPES[dtype].is_floating_point else 0, dtype=TORCH_DTYPES[dtype])
            for name, (shape, dtype) in specs.items()
        },
    )


def _read_weights(weights: bytes, specs: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
    try:
        found = safetensors.torch.load(weights)
    # what the library raises on damaged headers, unknown dtypes and impossible shapes
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise KernelRejected(f"the weights are not safetensors: {error}") from error
    if found.keys() != specs.keys():
        missing, unknown = sorted(specs.keys() - found.keys()), sorted(found.keys() - specs.keys())
        raise KernelRejected(
            f"the weights do not fit the graph: missing {missing}, unknown {unknown}", missing=missing, unknown=unknown
        )
    for name, (shape, dtype) in specs.items():
        tensor = found[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != TORCH_DTYPES[dtype]:
            raise KernelRejected(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the weights, {tuple(shape)} {dtype} in the graph"
            )
    return found
