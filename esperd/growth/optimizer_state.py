"""What an optimiser remembers: as plain data and tensors for a checkpoint, and as copies for a rollback.

Torch keeps it in two places: in the parameter groups, and by parameter. What a subclass keeps elsewhere is seen by neither; see
:func:`esperd.growth.optimizer.require_carriable`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import torch

from esperd.errors import CheckpointRejected, InvalidOptimizer

SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**64 - 1
"""What MessagePack holds."""

Packed = Any
"""A plain value as MessagePack holds it. Numbers, texts, truth values and None are themselves; the others are a mapping with one
of these keys: ``tuple``, ``list``, ``dict``, or ``tensor`` (its name) beside ``on_cpu``."""


class GroupState(msgspec.Struct, frozen=True, kw_only=True):
    """One group of an optimiser, without its tensors."""

    name: str
    values: dict[str, Packed]
    """All that stands in the group but its name and its parameters: rates, and what the optimiser counts there."""
    state: tuple[dict[str, Packed] | None, ...]
    """What is remembered of each parameter, in order; None: nothing was written yet."""


# --- into a checkpoint and back ----------------------------------------------------------------------------------------------


def describe(optimizer: torch.optim.Optimizer) -> tuple[tuple[GroupState, ...], dict[str, torch.Tensor]]:
    """An optimiser's groups and state.

    Returns:
        Its groups in order, and its tensors by name: ``optimizer.<group>.<index>.<key>`` of a parameter's state,
        ``optimizer.<group>.<key>`` of a group. They are the live ones.

    Raises:
        InvalidOptimizer: it keeps something that is neither a tensor nor a plain value, or by no parameter of its groups.
    """
    kind = type(optimizer).__name__
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if any(not isinstance(held, dict) or key not in known for key, held in optimizer.state.items()):
        raise InvalidOptimizer(
            f"{kind} keeps state that belongs to no parameter; it could not be carried through growth and resume", optimizer=kind
        )
    tensors: dict[str, torch.Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        place = f"optimizer.{group['name']}"
        parameters: list[torch.Tensor] = group["params"]
        values = {key: value for key, value in group.items() if key not in {"params", "name"}}
        beside = parameters[0].device if parameters else torch.device("cpu")
        packer = _Packer(kind, group, tensors)
        groups.append(
            GroupState(
                name=group["name"],
                values=packer.pack_all(values, place, beside),
                state=tuple(
                    packer.pack_all(optimizer.state[parameter], f"{place}.{index}", parameter.device)
                    if parameter in optimizer.state
                    else None
                    for index, parameter in enumerate(parameters)
                ),
            )
        )
    return tuple(groups), tensors


def put(optimizer: torch.optim.Optimizer, groups: Sequence[GroupState], tensors: Mapping[str, torch.Tensor]) -> None:
    """Let an optimiser remember what was described.

    Args:
        optimizer: with the same groups, over the same parameters.
        groups: as from :func:`describe`.
        tensors: on any device; each is brought to where it belongs. One that is there already becomes the optimiser's own.

    Raises:
        CheckpointRejected: the groups do not fit, or a tensor is missing.
    """
    before, now = [_shape(group.name, len(group.state)) for group in groups], _shapes(optimizer)
    if before != now:
        raise CheckpointRejected(
            f"the checkpoint does not fit the optimiser: it has {', '.join(before)}; this one {', '.join(now)}: are other "
            "parameters of the host frozen?"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        parameters: list[torch.Tensor] = group["params"]
        beside = parameters[0].device if parameters else torch.device("cpu")
        group.clear()  # in place: schedulers hold on to it
        group["params"], group["name"] = parameters, saved.name
        group.update({key: _unpack(value, tensors, beside) for key, value in saved.values.items()})
        for parameter, held in zip(parameters, saved.state, strict=True):
            if held is not None:
                optimizer.state[parameter] = {key: _unpack(value, tensors, parameter.device) for key, value in held.items()}


def stays_on_cpu(key: str, tensor: torch.device, parameter: torch.device, group: Mapping[str, Any]) -> bool:
    """Whether a tensor of an optimiser's state belongs on the CPU wherever its parameter lives.

    Where the two lay apart, that tells. On a CPU everything lies together, and torch's own rule tells: it counts steps on the
    CPU, unless the step is fused or captured in a CUDA graph.

    Args:
        key: of the state.
        tensor: where it lies.
        parameter: where the parameter lies.
        group: the parameter's.
    """
    if tensor.type != "cpu":
        return False
    if parameter.type != "cpu":
        return True
    return key == "step" and not (group.get("fused") or group.get("capturable"))


@dataclass(frozen=True)
class _Packer:
    """Makes plain data of what stands in one group, and puts tensors aside."""

    kind: str
    group: Mapping[str, Any]
    tensors: dict[str, torch.Tensor]

    def pack_all(self, held: Mapping[str, Any], place: str, beside: torch.device) -> dict[str, Packed]:
        packed = {}
        for key, value in held.items():
            if isinstance(value, torch.Tensor):
                self.tensors[f"{place}.{key}"] = value
                on_cpu = stays_on_cpu(key, value.device, beside, self.group)
                packed[key] = {"tensor": f"{place}.{key}", "on_cpu": on_cpu}
            else:
                packed[key] = self._pack(key, value)
        return packed

    def _pack(self, key: str, value: object) -> Packed:
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int) and SMALLEST_INTEGER <= value <= LARGEST_INTEGER:
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, tuple | list):
            return {type(value).__name__: [self._pack(key, part) for part in value]}
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {"dict": {name: self._pack(key, part) for name, part in value.items()}}
        raise InvalidOptimizer(
            f"{self.kind} keeps {key!r} that is no tensor or number, nor a list or mapping of numbers, but a "
            f"{type(value).__name__}; it could not be carried through growth and resume",
            optimizer=self.kind,
            key=key,
        )


def _unpack(packed: Packed, tensors: Mapping[str, torch.Tensor], beside: torch.device) -> object:
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        name = packed["tensor"]
        if name not in tensors:
            raise CheckpointRejected(f"the checkpoint lacks the optimiser's tensor {name}", tensor=name)
        return tensors[name].to("cpu" if packed["on_cpu"] else beside)
    if "dict" in packed:
        return {name: _unpack(part, tensors, beside) for name, part in packed["dict"].items()}
    if "tuple" in packed:
        return tuple(_unpack(part, tensors, beside) for part in packed["tuple"])
    return [_unpack(part, tensors, beside) for part in packed["list"]]


def _shapes(optimizer: torch.optim.Optimizer) -> list[str]:
    return [_shape(group["name"], len(group["params"])) for group in optimizer.param_groups]


def _shape(name: str, parameters: int) -> str:
    return f"{name} of {parameters} tensors"


# --- aside, and back into the same optimiser -----------------------------------------------------------------------------------


Place = tuple[torch.device, int, torch.Size, torch.dtype]
"""Where a tensor lies and how it is read: two of the same place are one, whatever objects they are."""


def place_of(tensor: torch.Tensor) -> Place:
    """The memory of a tensor."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype


@dataclass(frozen=True)
class Kept:
    """Groups and state of an optimiser, to be put back into it."""

    groups: list[tuple[dict[str, Any], dict[str, Any]]]
    """Each group, and a copy of what was in it."""
    state: list[tuple[torch.Tensor, dict[str, Any]]]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, references: dict[int, Any]) -> Self:
        """Keep an optimiser as it stands; copies of tensors lie on the CPU.

        Args:
            optimizer: goes on.
            references: a memo for ``copy.deepcopy``: its parameters, which are not copied.
        """
        return cls(
            groups=[(group, copy.deepcopy(group, dict(references))) for group in optimizer.param_groups],
            state=[(key, {name: _kept(value) for name, value in held.items()}) for key, held in optimizer.state.items()],
        )

    def copies(self) -> dict[Place, torch.Tensor]:
        """The kept tensors by what they are copies of; see :meth:`esperd.growth.rollback.Snapshot.copies`."""
        return {value.place: value.value for _, held in self.state for value in held.values() if isinstance(value, _OnDevice)}

    def put_back(self, optimizer: torch.optim.Optimizer, references: dict[int, Any]) -> None:
        """Let the optimiser stand as it stood; any number of times."""
        for group, before in self.groups:
            group.clear()
            group.update(copy.deepcopy(before, dict(references)))
        optimizer.param_groups[:] = [group for group, _ in self.groups]
        optimizer.state.clear()
        for key, held in self.state:
            optimizer.state[key] = {name: _given(value) for name, value in held.items()}


@dataclass(frozen=True)
class _OnDevice:
    """A tensor of an optimiser's state, on the CPU, and the device it belongs to."""

    value: torch.Tensor
    device: torch.device
    place: Place
    """Of what it is a copy of."""


def _kept(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return _OnDevice(value.detach().to("cpu", copy=True), value.device, place_of(value))
    return copy.deepcopy(value)


def _given(kept: object) -> object:
    if isinstance(kept, _OnDevice):
        return kept.value.to(kept.device, copy=True)
    return copy.deepcopy(kept)
