"""What each module of a host returns, found by running it on a few samples, and which of it a seed could keep.

The host runs three times: on the samples, on one sample more (the axis that grows with it is the batch, whatever else happens
to have its size), and in its other mode (what does not run in evaluation would be a seed nobody measures).
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from esperd.errors import EsperError, InvalidData, InvalidModel
from esperd.growth.host import require_plain
from esperd.growth.outputs import parts, predicted, told
from esperd.growth.untouched import untouched
from esperd.messages.growth import Topology

TOPOLOGIES: Mapping[int, Topology] = {4: "cnn", 3: "transformer", 2: "mlp"}
"""By the number of a tensor's dimensions, batch included: (B, C, H, W), (B, T, D), (B, F)."""

CHANNELS_FIRST = (
    nn.Conv1d,
    nn.ConvTranspose1d,
    nn.BatchNorm1d,
    nn.InstanceNorm1d,
    nn.GroupNorm,
    nn.MaxPool1d,
    nn.AvgPool1d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveAvgPool1d,
)
"""Modules that take a tensor of three dimensions as (B, C, L). Compared by exact type: a subclass may do as it likes."""

CHANNELS_LAST = (nn.Linear, nn.LayerNorm)
"""Modules that take a tensor of four dimensions as (B, H, W, C). By exact type: the LayerNorm2d of others permutes inside."""

_IMAGE, _SEQUENCE = 4, 3


@dataclass(eq=False)
class _Call:
    """One call of one module."""

    came: str
    shape: tuple[int, ...] | None = None
    """Of the tensor it returned, batch included; None when it returned something else."""
    dtype: torch.dtype | None = None
    given: tuple[int, ...] | None = None
    """Of the first tensor it was given."""
    first: tuple[int, ...] | None = None
    """Of the first tensor in a tuple, mapping or object that it returned."""
    axes: str = ""
    """Why its axes are not those of a slot."""


@dataclass
class Traced:
    """What one module did while the host ran."""

    name: str
    module: nn.Module
    order: int
    """Of its first completion among the host's modules."""
    shape: tuple[int, ...] = ()
    """Of one sample's tensor; () where it returns none."""
    first: tuple[int, ...] = ()
    """Of one sample's first tensor where it returns several things; () where there is none."""
    given: tuple[int, ...] = ()
    """Of one sample's tensor as the module was given it; () where it was given none."""
    dtype: str = ""
    problem: str = ""
    """Why a seed cannot stand behind it; empty when one can."""
    is_output: bool = False
    """It returned the very tensor that the host predicts with."""

    @property
    def topology(self) -> Topology | None:
        """Which seeds fit the tensor it returns; None: none do."""
        return None if self.problem else TOPOLOGIES.get(len(self.shape) + 1)


@dataclass
class _Pass:
    """One forward pass: every call by module, in order of completion, and what the host returned."""

    samples: int
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    output: object = None
    last: list[_Call] = field(default_factory=list)
    """Calls that returned the very tensor that the host predicts with."""


class _Flow:
    """Which calls returned a tensor: who reads it says how its axes are meant. Tensors are not kept alive."""

    def __init__(self) -> None:
        self._returned: dict[int, tuple[weakref.ref[torch.Tensor], list[_Call]]] = {}

    def of(self, tensor: torch.Tensor) -> list[_Call]:
        reference, calls = self._returned.get(id(tensor), (None, []))
        return calls if reference is not None and reference() is tensor else []

    def returned(self, tensor: torch.Tensor, call: _Call) -> None:
        before = self.of(tensor)
        if before:  # a container hands on what its last module returned, and one that works in place what it was given
            call.axes = before[0].axes
            before.append(call)
        else:
            self._returned[id(tensor)] = (weakref.ref(tensor), [call])


@dataclass(frozen=True)
class Trace:
    """A host, run."""

    modules: dict[str, Traced]
    """Those that ran, in order of first completion. A module under two names stands under the first."""
    output: object
    """What the host returned for the samples."""


def trace(host: nn.Module, batch: torch.Tensor) -> Trace:
    """Run the host, and note what each of its modules returns.

    The host is left as it was: mode, buffers, gradients and the RNG streams.

    Args:
        host: any module that takes ``batch``.
        batch: (B, ...) a few real samples.

    Raises:
        InvalidModel: the host is no module or cannot be looked into (:mod:`esperd.growth.host`); it does not run on these
            samples, or not on one more, or not in its other mode.
        InvalidData: ``batch`` is no tensor, or holds no samples.
    """
    require_plain(host)
    _require_batch(batch)
    more = torch.cat([batch, batch[:1]])
    with untouched(host), torch.no_grad():
        try:
            first = _run(host, batch)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:  # a model that exits must not end the worker without a word
            raise does_not_run(type(host).__name__, batch, error) from error
        with _explained(f"the model runs on {len(batch)} samples, but not on {len(more)}; batches differ in size"):
            second = _run(host, more)
        other = "evaluation" if host.training else "training"
        with _explained(f"the model runs, but not in {other}"), _mode(host, training=not host.training):
            third = _run(host, more)
    modules = dict(host.named_modules())
    found = {}
    for order, (name, calls) in enumerate(first.calls.items()):
        again, elsewhere = second.calls.get(name, []), third.calls.get(name, [])
        found[name] = Traced(
            name=name,
            module=modules[name],
            order=order,
            shape=(calls[0].shape or ())[1:],
            first=(calls[0].first or ())[1:],
            given=(calls[0].given or ())[1:],
            dtype=str(calls[0].dtype).removeprefix("torch."),
            problem=_problem((first.samples, calls), (second.samples, again), elsewhere, other=other),
            is_output=any(call in first.last for call in calls),
        )
    return Trace(modules=found, output=first.output)


def _require_batch(batch: object) -> None:
    if isinstance(batch, torch.Tensor) and batch.dim() > 0 and len(batch) > 0:
        return
    shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, torch.Tensor) else ""
    raise InvalidData(
        f"a batch is a tensor (B, ...) of a few real samples, not a {type(batch).__name__}{shape}; torch.from_numpy makes one "
        "of an array"
    )


def does_not_run(host: str, batch: torch.Tensor, error: BaseException, *, of: str = "") -> InvalidModel:
    """The error of a host that does not take its own data.

    Args:
        host: what it is called.
        batch: (B, ...) what it was given.
        error: what it raised.
        of: where the batch is from.
    """
    outside = isinstance(error, IndexError) and not batch.is_floating_point()
    ids = f"; its ids go up to {int(batch.max())}: is the model's vocabulary larger?" if outside else ""
    return InvalidModel(
        f"{host} does not run on a batch{of} {tuple(batch.shape)} {batch.dtype}, the first axis of which is the batch: "
        f"{type(error).__name__}: {error}{ids}",
        traceback="".join(traceback.format_exception(error)),
    )


def _run(host: nn.Module, batch: torch.Tensor) -> _Pass:
    done, flow, handles = _Pass(samples=len(batch)), _Flow(), []
    for name, module in host.named_modules():
        if not name:
            continue

        def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: object, name: str = name) -> None:
            given = _first_tensor((*inputs, *options.values()))
            call = _call(output, given)
            done.calls.setdefault(name, []).append(call)
            if isinstance(output, torch.Tensor):
                flow.returned(output, call)
            for tensor in (given, output):
                if isinstance(tensor, torch.Tensor) and (axes := _other_axes(module, tensor)):
                    for one in flow.of(tensor):
                        one.axes = axes

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        done.output = host(batch)
    finally:
        for handle in handles:
            handle.remove()
    tensor = predicted(done.output)
    done.last = [] if tensor is None else flow.of(tensor)
    return done


def _call(output: object, given: torch.Tensor | None) -> _Call:
    shape_given = None if given is None or given.is_nested else tuple(given.shape)
    if not isinstance(output, torch.Tensor):
        first = _first_tensor(parts(output).values())
        return _Call(came=told(output), given=shape_given, first=None if first is None else tuple(first.shape))
    if output.is_nested or output.layout is not torch.strided:
        kind = "nested" if output.is_nested else str(output.layout).removeprefix("torch.")
        return _Call(came=f"a {kind} tensor", given=shape_given)
    return _Call(came="a tensor", shape=tuple(output.shape), dtype=output.dtype, given=shape_given)


def _first_tensor(values: Any) -> torch.Tensor | None:  # noqa: ANN401 - whatever a module was given or returned
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _other_axes(module: nn.Module, tensor: torch.Tensor) -> str:
    """How a module takes the axes of a tensor, where it is not as seeds do."""
    kind = type(module)
    if tensor.is_nested:
        return ""
    if tensor.dim() == _SEQUENCE and kind in CHANNELS_FIRST:
        return f"is (B, C, L), channels first, as {kind.__name__} takes it, and seeds need (B, T, D)"
    if tensor.dim() == _IMAGE and kind in CHANNELS_LAST:
        return f"is (B, H, W, C), channels last, as {kind.__name__} takes it, and seeds need (B, C, H, W)"
    return ""


def _problem(first: tuple[int, list[_Call]], second: tuple[int, list[_Call]], elsewhere: list[_Call], *, other: str) -> str:
    """Why a module cannot be a slot, from its calls with B samples, with B + 1, and in the other mode; empty when it can."""
    samples, calls = first
    more, again = second
    for call in calls:
        if call.shape is None:
            return f"it returns {call.came}, and a seed needs a single tensor"
        if call.dtype is not None and not call.dtype.is_floating_point:
            return f"its output is {call.dtype}, not floating point"
    shapes = [call.shape or () for call in calls]
    for shape in shapes:
        if shape != shapes[0]:
            return f"its output changes shape from call to call: {shapes[0]} and {shape}"
    if len(calls) > 1:
        return f"it runs {len(calls)} times in one forward pass"
    if not again:
        return f"it does not run in every forward pass: it did with {samples} samples, not with {more}"
    if not elsewhere:
        return f"it does not run in {other}"
    if len(again) > 1 or len(elsewhere) > 1:
        return "it runs more often in some forward passes than in others"
    moved = _problem_of_batch((samples, shapes[0]), (more, again[0].shape or ()))
    if moved:
        return moved
    if elsewhere[0].shape != again[0].shape:
        came = elsewhere[0].shape or elsewhere[0].came
        return f"its output changes shape with the mode: {again[0].shape}, and {came} in {other}"
    if len(shapes[0]) not in TOPOLOGIES:
        return f"its output {shapes[0]} is neither (B, C, H, W) nor (B, T, D) nor (B, F)"
    axes = calls[0].axes
    return f"its output {shapes[0]} {axes}" if axes else ""


def _problem_of_batch(first: tuple[int, tuple[int, ...]], second: tuple[int, tuple[int, ...]]) -> str:
    """Whether the batch, and nothing else, stands in the first axis: told by what one sample more moves."""
    (samples, shape), (more, grown) = first, second
    if len(shape) != len(grown):
        return f"its output changes with the number of samples from {shape} to {grown}"
    moved = [axis for axis, (before, after) in enumerate(zip(shape, grown, strict=True)) if before != after]
    if moved == [0] and (shape[0], grown[0]) == (samples, more):
        return ""
    if len(moved) == 1 and moved[0] > 0 and shape[moved[0]] == samples:
        return (
            f"its output {shape} has the batch of {samples} in axis {moved[0]}, and a seed needs it in axis 0 "
            "(recurrent and transformer layers of torch take batch_first=True)"
        )
    if len(moved) > 1:
        return f"its output {shape} changes in axes {moved} with the number of samples, not in axis 0 alone"
    return f"its output {shape} does not start with the batch of {samples}"


@contextmanager
def _mode(host: nn.Module, *, training: bool) -> Iterator[None]:
    """Run passes in the other mode; every module is put back into its own."""
    modes = [(module, module.training) for module in host.modules()]
    try:
        host.train(training)
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidModel(f"{what}: {type(error).__name__}: {error}") from error
