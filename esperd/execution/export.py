"""From an eager module to an op list, through ``torch.export``.

The exported graph is brought into a form that has one meaning: in-place operations become pure ones, the one symbolic size that
a shape may hold becomes ``-1``, counters of batch norm become mutations. A module is exported twice, training and evaluating;
where the two graphs differ only in the mode of a batch norm or dropout, the mode is left to the moment of the call. Whatever
else they differ in cannot be one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from esperd.errors import BlueprintRejected, KernelRejected
from esperd.execution.graph import TRAINING, Argument, Graph, Step, check_graph
from esperd.execution.operations import IN_PLACE, OPERATIONS, VIEWS

INPUT = "%x"
_RESHAPING = frozenset({"aten.view.default", "aten.reshape.default", "aten.expand.default"})
_NO_EFFECT: dict[str, object] = {"pin_memory": False}
"""Keywords that exporting adds to operations that make tensors, with the value at which they say nothing."""


def export_graph(blueprint: str, module: nn.Module, example: torch.Tensor, open_dimensions: Sequence[int] = (0,)) -> Graph:
    """Export a module.

    Args:
        blueprint: name, for messages.
        module: takes and returns one tensor; it is not changed.
        example: (B, ...) an input.
        open_dimensions: dimensions of the input whose sizes the kernel leaves open; the others are fixed as they are. See
            :data:`esperd.declarations.OPEN_DIMENSIONS`.

    Raises:
        BlueprintRejected: when the module cannot be exported, uses an operation that kernels may not use, or computes different
            things in training and in evaluation. Names operation and blueprint.
    """
    _check_tensors(blueprint, module)
    module, example = copy.deepcopy(module).cpu(), example.cpu()  # on a GPU, torch guards on what its kernels prefer
    for dimension in open_dimensions:
        if example.shape[dimension] == 1:  # torch takes a size of 1 as one that stays
            example = torch.cat([example, example], dim=dimension)
    programs = [_export(blueprint, module, example, open_dimensions, training=mode) for mode in (True, False)]
    graphs = [_Exported(blueprint, program) for program in programs]
    trained, evaluated = graphs
    if evaluated.counters:
        raise BlueprintRejected(
            f"blueprint {blueprint!r} counts in {sorted(evaluated.counters)} also when evaluating; a kernel counts only when"
            " training",
            blueprint=blueprint,
        )
    graph = Graph(
        format=1,
        inputs=[INPUT],
        parameters={name: (tuple(tensor.shape), _dtype(tensor)) for name, tensor in module.named_parameters()},
        buffers={name: (tuple(tensor.shape), _dtype(tensor)) for name, tensor in module.named_buffers()},
        ops=_merge(blueprint, trained.steps, evaluated.steps),
        output=trained.output,
        mutations=trained.counters,
    )
    try:
        check_graph(graph)
    except KernelRejected as error:
        raise BlueprintRejected(f"blueprint {blueprint!r} has no portable form: {error}", blueprint=blueprint) from error
    return graph


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_tensors(blueprint: str, module: nn.Module) -> None:
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)} - {name for name, _ in module.named_parameters()}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    hidden = {name for name, _ in module.named_buffers()} - module.state_dict().keys()
    problems = (
        (tied, "shares parameters under the names"),
        (frozen, "has parameters that do not train (use buffers):"),
        (hidden, "has buffers that are not persistent and would be lost:"),
    )
    for names, problem in problems:
        if names:
            raise BlueprintRejected(
                f"blueprint {blueprint!r} {problem} {', '.join(sorted(names))}", blueprint=blueprint, names=sorted(names)
            )


def _export(
    blueprint: str, module: nn.Module, example: torch.Tensor, open_dimensions: Sequence[int], *, training: bool
) -> torch.export.ExportedProgram:
    sizes = {dimension: torch.export.Dim(f"dimension_{dimension}") for dimension in open_dimensions}
    try:
        return torch.export.export(copy.deepcopy(module).train(training), (example,), dynamic_shapes=(sizes,))
    except Exception as error:
        raise BlueprintRejected(
            f"blueprint {blueprint!r} cannot be exported for any size of the dimensions {', '.join(map(str, open_dimensions))}:"
            f" {type(error).__name__}: {error}",
            blueprint=blueprint,
        ) from error


def _merge(blueprint: str, trained: list[Step], evaluated: list[Step]) -> list[Step]:
    """One list of steps for both modes.

    Raises:
        BlueprintRejected: when they differ in more than a mode that follows the module's.
    """
    if [step.operation for step in trained] != [step.operation for step in evaluated]:
        differing = sorted({step.operation for step in trained} ^ {step.operation for step in evaluated})
        raise BlueprintRejected(
            f"blueprint {blueprint!r} runs other operations in training than in evaluation: {', '.join(differing) or 'order'}",
            blueprint=blueprint,
        )
    merged: list[Step] = []
    for train_step, eval_step in zip(trained, evaluated, strict=True):
        arguments = [
            TRAINING if kind == "mode" and in_train is True and in_eval is False else in_train
            for kind, in_train, in_eval in zip(
                OPERATIONS[train_step.operation].signature, train_step.arguments, eval_step.arguments, strict=False
            )
        ]
        expected = [
            in_eval if argument == TRAINING else argument
            for argument, in_eval in zip(arguments, eval_step.arguments, strict=False)
        ]
        if expected != eval_step.arguments or train_step.keywords != eval_step.keywords:
            raise BlueprintRejected(
                f"blueprint {blueprint!r} gives {train_step.operation} other arguments in training than in evaluation",
                blueprint=blueprint,
                operation=train_step.operation,
            )
        merged.append(
            Step(
                name=train_step.name,
                operation=train_step.operation,
                arguments=arguments,
                keywords=train_step.keywords,
            )
        )
    return merged


class _Exported:
    """One exported graph as steps.

    Nodes that share memory through an in-place operation share a root; a reference to any of them is a reference to what was
    last written there.
    """

    def __init__(self, blueprint: str, program: torch.export.ExportedProgram) -> None:
        self.steps: list[Step] = []
        self.counters: dict[str, int] = {}
        self.output = INPUT
        self._blueprint = blueprint
        self._roots: dict[fx.Node, fx.Node] = {}
        self._references: dict[fx.Node, str] = {}
        self._viewed: set[fx.Node] = set()
        self._inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self._place(node)
            elif node.op == "output":
                self._finish(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                raise self._rejected(f"contains a node of kind {node.op!r}, which no kernel has")

    def _rejected(self, problem: str, operation: str | None = None) -> BlueprintRejected:
        return BlueprintRejected(f"blueprint {self._blueprint!r} {problem}", blueprint=self._blueprint, operation=operation)

    def _place(self, node: fx.Node) -> None:
        spec = self._inputs[node.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            reference = spec.target
        elif spec.kind is InputKind.USER_INPUT:
            reference = INPUT
        else:
            raise self._rejected(f"holds a constant tensor ({spec.target or node.name}); register it as a buffer")
        self._roots[node] = node
        self._references[node] = reference

    def _finish(self, node: fx.Node) -> None:
        results = node.args[0]
        if not isinstance(results, (list, tuple)) or len(results) != 1 or not isinstance(results[0], fx.Node):
            raise self._rejected("must return exactly one tensor")
        self.output = self._reference(results[0])

    def _reference(self, node: fx.Node) -> str:
        return self._references[self._roots[node]]

    def _call(self, node: fx.Node) -> None:
        operation = str(node.target)
        if operation == "aten.sym_size.int":
            return  # resolved where a shape is built from it
        if self._is_counter(operation, node):
            buffer, increment = node.args
            assert isinstance(buffer, fx.Node) and isinstance(increment, int)  # noqa: S101, PT018 - what _is_counter found
            self.counters[self._reference(buffer)] = increment
            self._roots[node] = self._roots[buffer]
            return
        pure = IN_PLACE.get(operation, operation)
        if pure not in OPERATIONS:
            raise self._rejected(f"uses {operation}, which is not an operation a kernel may use", operation)
        step = Step(
            name=f"%{len(self.steps)}",
            operation=pure,
            arguments=self._arguments(node, pure),
            keywords={
                name: self._keyword(operation, name, value)
                for name, value in node.kwargs.items()
                if name not in _NO_EFFECT or value != _NO_EFFECT[name]
            },
        )
        root = node
        if operation in IN_PLACE:
            root = self._written(operation, node.args[0])
        elif operation in VIEWS:
            self._viewed.update({node, *(self._roots[source] for source in node.all_input_nodes if source in self._roots)})
        self.steps.append(step)
        self._roots[node] = root
        self._references[root] = step.name

    def _is_counter(self, operation: str, node: fx.Node) -> bool:
        """Whether this is ``buffer += constant`` on an integer buffer, as batch norm counts its batches."""
        return (
            operation == "aten.add_.Tensor"
            and isinstance(node.args[0], fx.Node)
            and node.args[0].op == "placeholder"
            and self._inputs[node.args[0].name].kind is InputKind.BUFFER
            and type(node.args[1]) is int
            and not node.kwargs
        )

    def _written(self, operation: str, target: Any) -> fx.Node:  # noqa: ANN401 - an argument of an fx node
        """The memory an in-place operation writes to.

        Raises:
            BlueprintRejected: when it is the input, a parameter, a buffer, or seen under a second name: the pure operation
                would then compute something else.
        """
        root = self._roots[target]
        if root.op == "placeholder":
            raise self._rejected(f"writes to {self._references[root]} in place with {operation}", operation)
        if root in self._viewed:
            raise self._rejected(f"writes in place with {operation} to a tensor that has a view", operation)
        return root

    def _arguments(self, node: fx.Node, operation: str) -> list[Argument]:
        arguments: list[Argument] = []
        for position, value in enumerate(node.args):
            if operation in _RESHAPING and position == 1:
                shape: Iterable[Any] = node.meta["val"].shape if _is_symbolic(value) else value  # type: ignore[assignment]
                arguments.append(self._sizes(operation, list(shape)))
            else:
                arguments.append(self._argument(operation, position, value))
        return arguments

    def _sizes(self, operation: str, shape: list[Any]) -> list[int]:
        """A shape with -1 for its symbolic size. ``expand`` takes -1 for every size that stays, other operations only once.

        Raises:
            BlueprintRejected: when more sizes than one are left open.
        """
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1 and operation != "aten.expand.default":
            raise self._rejected(
                f"gives {operation} a shape with several open sizes, {[*map(str, shape)]}, which no kernel can hold;"
                " split and join dimensions with unflatten and flatten",
                operation,
            )
        return sizes

    def _argument(self, operation: str, position: int, value: Any) -> Argument:  # noqa: ANN401 - an argument of an fx node
        if isinstance(value, fx.Node) and value in self._roots:
            return self._reference(value)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, list | tuple) and all(type(item) is int for item in value):
            return list(value)
        raise self._rejected(f"gives {operation} the argument {value!r} at {position}, which no kernel can hold", operation)

    def _keyword(self, operation: str, name: str, value: Any) -> int | float | bool | None:  # noqa: ANN401 - as above
        if name in OPERATIONS[IN_PLACE.get(operation, operation)].keywords and (
            value is None or isinstance(value, bool | int | float)
        ):
            return value
        raise self._rejected(f"gives {operation} the keyword {name}={value!r}, which no kernel can hold", operation)


def _is_symbolic(sizes: Any) -> bool:  # noqa: ANN401 - an argument of an fx node
    return any(isinstance(size, fx.Node) for size in sizes)
