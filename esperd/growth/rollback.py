"""A grower as it stood at a decision point, kept in memory. Training on after a rollback is training on from there, to the bit.

A checkpoint describes a grower so that another process can rebuild it. This keeps the objects themselves: modules, seeds and the
optimiser by reference, and copies of what training changes in them. So it also holds for seeds that run as plain modules, which
no checkpoint can rebuild.

Not rolled back, on purpose: what the ledger says was spent stays spent; and numbers of seeds go on, because a name that stands in
events and outcomes is not given to another seed. Known limit, as of checkpoints: numbers and tensors
that a model keeps as plain attributes and changes while it trains. Register them as buffers.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import msgspec
import numpy as np
import torch
from torch import nn

from esperd.errors import CheckpointRejected
from esperd.growth.grower import Grower
from esperd.growth.lifecycle import CullRequested
from esperd.growth.network import GrowingNetwork, Seed, SlotPort
from esperd.growth.optimizer_state import Kept, Place, place_of
from esperd.messages.growth import Stage
from esperd.messages.reports import SeedOutcome

CursorT = TypeVar("CursorT")

STANDING_FIELDS = frozenset(
    {
        "network",
        "optimizer",
        "loss",
        "metric",
        "growth",
        "settings",
        "gates",
        "operations",
        "curve",
        "source",
        "ledger",
        "emit",
        "steps_per_epoch",
        "sample",
        "precision",
        "max_gradient_norm",
        "runner",
        "batches",
        "ranks",
        "pieces",
    }
)
"""Fields of a grower that are what it works with, not how far it has come. Every other field is rolled back."""

GATHERED = {"incubator": ("gathered", "sharing", "settled"), "gate_pass": ("fused", "tried")}
"""What the parts of a grower have found out, by part."""

_MODULE_INTERNALS = frozenset(vars(nn.Module()))
"""What torch keeps in every module; the rest of a seed's attributes is what is known about it."""


@dataclass(frozen=True)
class Restored(Generic[CursorT]):
    """What a rollback brought back.

    Args:
        cursor: what the caller gave when the snapshot was taken.
        epoch: epochs completed now.
        gone: seeds that germinated after the snapshot; they are out of the network, and have an outcome.
        returned: seeds that were culled or fossilized after it; they live again, in the stage they were in.
    """

    cursor: CursorT
    epoch: int
    gone: tuple[str, ...]
    returned: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor that training writes into, and what was in it."""

    place: torch.Tensor
    value: torch.Tensor
    """On the CPU, whatever the device of its place."""
    trains: bool

    @classmethod
    def of(cls, place: torch.Tensor) -> Self:
        return cls(place, place.detach().to("cpu", copy=True), place.requires_grad)

    def put_back(self) -> None:
        with torch.no_grad():
            self.place.copy_(self.value)
        self.place.grad = None
        if self.place.is_leaf:
            self.place.requires_grad_(self.trains)


@dataclass(frozen=True)
class _Module:
    """What hangs on one module, by reference: a pass may have replaced a buffer, surgery a module."""

    place: nn.Module
    modules: dict[str, nn.Module | None]
    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, torch.Tensor | None]
    training: bool
    known: dict[str, Any]
    """Attributes of seeds, slots and the network itself; of a user's modules, none."""

    def put_back(self, references: dict[int, Any]) -> None:
        # In place: a kernel's module reads from these very tables.
        tables: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (self.place._modules, dict(self.modules)),
            (self.place._parameters, dict(self.parameters)),
            (self.place._buffers, dict(self.buffers)),
        )
        for table, before in tables:
            table.clear()
            table.update(before)
        self.place.training = self.training
        vars(self.place).update(copy.deepcopy(self.known, dict(references)))


@dataclass(frozen=True)
class _Streams:
    """The random streams that a model or its data may draw from. Generators of a user's own are not seen."""

    torch_cpu: torch.Tensor
    torch_cuda: dict[int, torch.Tensor]
    """By index, of the devices on which the network has tensors."""
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def of(cls, network: nn.Module) -> Self:
        tensors = (*network.parameters(), *network.buffers())
        devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_cuda={index: torch.cuda.get_rng_state(index) for index in devices},
            python=random.getstate(),
            numpy=np.random.get_state(legacy=True),
        )

    def put_back(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        for index, stream in self.torch_cuda.items():
            torch.cuda.set_rng_state(stream, index)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@dataclass(frozen=True, kw_only=True)
class Snapshot(Generic[CursorT]):
    """A grower at a decision point. It can be gone back to any number of times.

    Its tensors are copies on the CPU (scalars that a running epoch gathers excepted), about as large as weights, buffers and
    optimiser state together.
    """

    network: GrowingNetwork
    cursor: CursorT
    """The caller's place in the data, and whatever else the caller goes back to. Handed out as it was given."""
    epoch: int
    live_seeds: tuple[str, ...]
    """Seeds that may be culled."""
    references: dict[int, Any]
    """A memo for ``copy.deepcopy``: modules and parameters that a copied value refers to are not copied with it."""
    modules: tuple[_Module, ...]
    tensors: tuple[_Tensor, ...]
    optimizer: Kept
    fields: dict[str, Any]
    found: dict[str, dict[str, Any]]
    """By part of the grower, see :data:`GATHERED`."""
    scaler: tuple[float, int] | None
    prices: dict[str, float]
    """What the ledger knew to cost how much. A step that is counted may differ from an uncounted one in its last bits (torch's
    counter takes some operations apart), so what was counted after the snapshot is counted again."""
    streams: _Streams

    @classmethod
    def take(cls, grower: Grower, cursor: CursorT) -> Self:
        """Keep a grower as it stands, between two steps.

        Args:
            grower: keeps running; nothing of it is changed, and no random number is drawn.
            cursor: given back by :meth:`restore_into`; do not change it afterwards.
        """
        references = _references(grower)
        modules = tuple(_keep_module(module, references) for module in _modules(grower))
        return cls(
            network=grower.network,
            cursor=cursor,
            epoch=grower.epoch,
            live_seeds=tuple(seed.name for seed in grower.network.seeds() if seed.lives),
            references=references,
            modules=modules,
            tensors=tuple(_Tensor.of(place) for place in _places(grower, modules)),
            optimizer=Kept.of(grower.optimizer, references),
            fields=copy.deepcopy(_progress(grower), dict(references)),
            found=copy.deepcopy(_found(grower), dict(references)),
            scaler=grower.precision.state(),
            prices=dict(grower.ledger.costs),
            streams=_Streams.of(grower.network),
        )

    def copies(self) -> dict[Place, torch.Tensor]:
        """What this keeps of weights, buffers and the optimiser's state, by the memory it was copied from. Valid until training
        goes on: then other tensors may lie there. Do not write into them.
        """
        held = {place_of(tensor.place): tensor.value for tensor in self.tensors}
        return held | self.optimizer.copies()

    def restore_into(self, grower: Grower) -> Restored[CursorT]:
        """Bring the grower back to where it stood. Gradients are dropped, as every step does before it computes its own.

        Seeds that germinated since are culled, with the events of any cull; those that were there stand as they stood.

        Raises:
            CheckpointRejected: the snapshot is another grower's.
        """
        if grower.network is not self.network:
            raise CheckpointRejected("the snapshot was taken of another grower; roll back the one it was taken of")
        known = {module.place.name for module in self.modules if isinstance(module.place, Seed)}
        stages = {seed.name: seed.stage for seed in grower.network.seeds()}
        gone = self._cull_younger(grower, known)
        ended = [outcome for outcome in grower.outcomes[len(self.fields["outcomes"]) :] if outcome.seed not in known]
        for module in self.modules:
            module.put_back(self.references)
        for tensor in self.tensors:
            tensor.put_back()
        self.optimizer.put_back(grower.optimizer, self.references)
        for name, value in copy.deepcopy(self.fields, dict(self.references)).items():
            setattr(grower, name, value)
        for part, values in copy.deepcopy(self.found, dict(self.references)).items():
            for name, value in values.items():
                setattr(getattr(grower, part), name, value)
        grower.precision.restore(self.scaler)
        grower.outcomes = [*grower.outcomes, *(self._undone(outcome) for outcome in ended)]
        grower.ledger.costs = dict(self.prices)
        self.streams.put_back()
        returned = tuple(name for name in self.live_seeds if stages.get(name) in (None, Stage.FOSSILIZED))
        return Restored(cursor=self.cursor, epoch=self.epoch, gone=gone, returned=returned)

    def _cull_younger(self, grower: Grower, known: set[str]) -> tuple[str, ...]:
        younger = [seed for seed in grower.network.seeds() if seed.name not in known]
        for seed in younger:
            if seed.lives:
                grower.occur(seed, CullRequested(self._why_gone()))
        return tuple(seed.name for seed in younger)

    def _undone(self, outcome: SeedOutcome) -> SeedOutcome:
        """How a younger seed ended: one that was fossilized since is gone from the network as well."""
        if outcome.stage is not Stage.FOSSILIZED:
            return outcome
        return msgspec.structs.replace(outcome, stage=Stage.CULLED, reason=self._why_gone())

    def _why_gone(self) -> str:
        return f"the network went back to epoch {self.epoch}, before it germinated"


def _modules(grower: Grower) -> list[nn.Module]:
    """Every module of the network, and the culled seeds that are no longer in it."""
    resting = [module for seed in grower.resting.values() for module in seed.modules()]
    return list(dict.fromkeys([*grower.network.modules(), *resting]))


def _keep_module(module: nn.Module, references: dict[int, Any]) -> _Module:
    known: dict[str, Any] = {}
    if isinstance(module, GrowingNetwork | SlotPort | Seed):
        known = {name: value for name, value in vars(module).items() if name not in _MODULE_INTERNALS}
        known.pop("germinated", None)  # numbers are given once
    return _Module(
        place=module,
        modules=dict(module._modules),
        parameters=dict(module._parameters),
        buffers=dict(module._buffers),
        training=module.training,
        known=copy.deepcopy(known, dict(references)),
    )


def _progress(grower: Grower) -> dict[str, Any]:
    """Fields of the grower that are rolled back."""
    names: Iterable[str] = (field.name for field in dataclasses.fields(grower))
    return {name: getattr(grower, name) for name in names if name not in STANDING_FIELDS}


def _found(grower: Grower) -> dict[str, dict[str, Any]]:
    return {part: {name: getattr(getattr(grower, part), name) for name in names} for part, names in GATHERED.items()}


def _references(grower: Grower) -> dict[int, Any]:
    kept: list[Any] = list(_modules(grower))
    kept += [parameter for module in kept for parameter in module._parameters.values() if parameter is not None]
    kept += [parameter for group in grower.optimizer.param_groups for parameter in group["params"]]
    return {id(each): each for each in kept}


def _places(grower: Grower, modules: tuple[_Module, ...]) -> list[torch.Tensor]:
    """Every tensor that training may write into, once: one that goes by two names is one tensor."""
    found = [tensor for module in modules for tensor in (*module.parameters.values(), *module.buffers.values())]
    found += [parameter for group in grower.optimizer.param_groups for parameter in group["params"]]
    return list({id(tensor): tensor for tensor in found if tensor is not None}.values())
