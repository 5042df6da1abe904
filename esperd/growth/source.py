"""Where seeds come from: whoever grows asks a source for a fresh module, and does not care how it was made."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from esperd.declarations import OPEN_DIMENSIONS, Blueprint, resolve
from esperd.errors import BlueprintRejected, EsperError
from esperd.execution.export import export_graph
from esperd.execution.oplist import load_kernel
from esperd.growth.operators import operator as build_operator
from esperd.messages.growth import SlotRecord


@dataclass(frozen=True, kw_only=True)
class GrownModule:
    """A seed's module, fresh, and what is known about it."""

    module: nn.Module
    operator: nn.Module
    """How its output will enter the slot; fresh too."""
    parameters: int
    """Of the module alone."""
    flops_per_sample: float
    """Of the module alone."""
    kernel: str | None = None
    """Manifest id; None when it runs as a plain module."""
    graph: str | None = None
    """The kernel's portable form; what checkpoints and exports rebuild the seed from. None for a plain module."""


class SeedSource(Protocol):
    """Makes seeds of blueprints."""

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """Why this blueprint cannot be grown at this slot; empty when it can."""
        ...

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:
        """A fresh module and operator for a seed of this name, on the device and in the dtype of the slot."""
        ...

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        """The seed that :meth:`grow` would give, with the same weights, as a plain module: to be measured and thrown away. No
        kernel is compiled for it, and it can be neither checkpointed nor exported.
        """
        ...

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """The blueprint's own threshold for gate G2, if it has one."""
        ...


def rng_seed_of(rng_seed: int, name: str) -> int:
    """RNG seed of a grown seed's weights: 32 bits of SHA-256 over the job's seed and the seed's name."""
    return int.from_bytes(hashlib.sha256(f"{rng_seed}:{name}".encode()).digest()[:4], "big")


def why_unfit(blueprints: Mapping[str, Blueprint], blueprint: str, slot: SlotRecord) -> str:
    """Why a blueprint cannot be grown at a slot; empty when it can."""
    if blueprint not in blueprints:
        return f"there is no blueprint {blueprint!r}"
    topology = blueprints[blueprint].topology
    return "" if topology == slot.topology else f"{blueprint} is for {topology} slots, {slot.slot} is {slot.topology}"


class BlueprintSource:
    """Makes seeds of blueprints in this very process; what a notebook grows with.

    Seeds run on their portable form, so what is grown can be checkpointed and exported. Nothing is compiled ahead, cached or
    profiled: the daemon's cache does that.

    Args:
        blueprints: what may be grown.
        rng_seed: a seed's weights depend on it and on the seed's name alone, never on the host's RNG stream.
        device: where seeds live.
    """

    def __init__(self, blueprints: Iterable[Blueprint], *, rng_seed: int = 0, device: torch.device | None = None) -> None:
        self.blueprints = {blueprint.name: blueprint for blueprint in blueprints}
        self._rng_seed = rng_seed
        self._device = device or torch.device("cpu")
        self._graphs: dict[tuple[str, tuple[int, ...], str], bytes] = {}

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """Why this blueprint cannot be grown at this slot; empty when it can."""
        return why_unfit(self.blueprints, blueprint, slot)

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """The blueprint's own threshold for gate G2."""
        return self.blueprints[blueprint].min_gradient_ratio if blueprint in self.blueprints else None

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:  # noqa: ARG002 - as in SeedSource
        """A fresh seed on its portable form.

        Raises:
            BlueprintRejected: it does not build, has no portable form, or its formula is not the true count.
        """
        eager, entering = self._drawn(blueprint, slot, seed, operator)
        declaration, dtype = self.blueprints[blueprint], getattr(torch, slot.dtype)
        module = load_kernel(self._graph(declaration, slot, eager, dtype), None)
        module.load_state_dict(eager.state_dict())
        parameters = sum(parameter.numel() for parameter in eager.parameters())
        claimed = declaration.parameters(slot.shape)
        if parameters != claimed:
            raise BlueprintRejected(
                f"the parameter formula of blueprint {blueprint!r} says {claimed} for {slot.shape}, it has {parameters}",
                blueprint=blueprint,
                claimed=claimed,
                counted=parameters,
            )
        return GrownModule(
            module=module.to(self._device),
            operator=entering,
            parameters=parameters,
            flops_per_sample=declaration.flops(slot.shape),
            graph=self._graph(declaration, slot, eager, dtype).decode(),
        )

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        """The seed that :meth:`grow` would give, as a plain module.

        Raises:
            BlueprintRejected: it does not build.
        """
        module, entering = self._drawn(blueprint, slot, seed, operator)
        return sketched(self.blueprints[blueprint], slot, module.to(self._device), entering)

    def _drawn(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> tuple[nn.Module, nn.Module]:
        """Module, on the CPU, and operator, with the weights that a seed of this name has."""
        dtype = getattr(torch, slot.dtype)
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(rng_seed_of(self._rng_seed, seed))
            module = built(self.blueprints[blueprint], slot).to(dtype)
            return module, build_operator(operator, slot).to(self._device, dtype)

    def _graph(self, declaration: Blueprint, slot: SlotRecord, eager: nn.Module, dtype: torch.dtype) -> bytes:
        key = (declaration.name, slot.shape, slot.dtype)
        if key not in self._graphs:
            with torch.random.fork_rng(devices=[]):
                example = torch.randn(2, *slot.shape, dtype=dtype)
            dimensions = OPEN_DIMENSIONS[declaration.topology]
            self._graphs[key] = export_graph(declaration.name, eager, example, dimensions).encode()
        return self._graphs[key]


def sketched(declaration: Blueprint, slot: SlotRecord, module: nn.Module, operator: nn.Module) -> GrownModule:
    """A plain module, and what its blueprint says about it."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    flops_per_sample = declaration.flops(slot.shape)
    return GrownModule(module=module, operator=operator, parameters=parameters, flops_per_sample=flops_per_sample)


def built(declaration: Blueprint, slot: SlotRecord) -> nn.Module:
    """A fresh module of a blueprint, drawn from where the RNG stream stands.

    Raises:
        BlueprintRejected: its factory fails, or gives something else.
    """
    try:
        module: object = resolve(declaration.factory)(slot.shape)
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        raise BlueprintRejected(
            f"blueprint {declaration.name!r} does not build for shape {slot.shape}: {type(error).__name__}: {error}",
            blueprint=declaration.name,
            traceback=traceback.format_exc(),
        ) from error
    if not isinstance(module, nn.Module):
        raise BlueprintRejected(
            f"the factory of blueprint {declaration.name!r} returned {type(module).__name__}, not a torch.nn.Module",
            blueprint=declaration.name,
        )
    return module
