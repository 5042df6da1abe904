"""A host with seeds in its slots, as one ``nn.Module``. The host's code and parameter names stay as they are.

Each slot is a forward hook on the module whose output it is. The hook is a bound method of a :class:`SlotPort`, so a deep
copy of the network carries working slots of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from esperd.errors import InvalidSlot
from esperd.growth.alpha import Ramp
from esperd.growth.blend import blend
from esperd.growth.lifecycle import Life
from esperd.growth.outputs import prediction
from esperd.messages.growth import LIVE_STAGES, Contribution, SlotRecord, Stage, Verdict

MODULE_SEPARATOR = "/"
"""Replaces the dot of a module path in a slot's key: ``ModuleDict`` keys may hold no dots."""


class Seed(nn.Module):
    """A grown module and everything known about it.

    Args:
        name: ``<slot>#<number>``, unique in the network.
        blueprint: what it was grown from.
        module: keeps the slot's shape; residual inside.
        record: the slot.
        parameters_added: number of its parameters.
        flops_per_sample: forward FLOPs.
        epoch: epoch of germination.
        kernel: manifest id of the kernel it runs on; None for a plain module.
        graph: the kernel's portable form; None for a plain module, which can then not be checkpointed or exported.
    """

    def __init__(
        self,
        *,
        name: str,
        blueprint: str,
        module: nn.Module,
        record: SlotRecord,
        parameters_added: int,
        flops_per_sample: float,
        epoch: int,
        kernel: str | None = None,
        graph: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.blueprint = blueprint
        self.module = module
        self.record = record
        self.parameters_added = parameters_added
        self.flops_per_sample = flops_per_sample
        self.epoch = epoch
        self.kernel = kernel
        self.graph = graph
        self.life = Life()
        self.ramp = Ramp()
        self.alpha = 0.0
        self.contribution: Contribution | None = None
        self.verdict: Verdict | None = None
        self.gradient_ratio: float | None = None
        self.incubation_loss: float | None = None
        """Mean loss of the last epoch's lookahead passes; None when none ran."""

    @property
    def stage(self) -> Stage:
        """Where it stands."""
        return self.life.stage

    @property
    def lives(self) -> bool:
        """True while it may still be culled."""
        return self.life.stage in LIVE_STAGES

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) → (B, ...), the module alone, without alpha."""
        # torch 2.13 on a CPU crashes the process in GroupNorm's backward when its input is channels-last and needs no
        # gradient: what a lookahead pass, or a frozen host, hands to a seed.
        output: torch.Tensor = self.module(x if x.requires_grad else x.contiguous())
        return output


class SlotPort(nn.Module):
    """What happens at one slot: its seeds, oldest first, each blended into what flows by.

    ``overrides`` sets alpha for one pass: a number, or one alpha per sample (B,) for stacked ablations. ``detached`` names
    a seed whose input is cut from the graph, so that a lookahead pass stops there instead of running back through the host.
    """

    def __init__(self, record: SlotRecord) -> None:
        super().__init__()
        self.record = record
        self.seeds = nn.ModuleDict()
        self.overrides: dict[str, float | torch.Tensor] = {}
        self.detached: str | None = None

    def __iter__(self) -> Iterator[Seed]:
        for seed in self.seeds.values():
            yield cast("Seed", seed)

    def on_output(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        """Blend every seed with alpha above 0 into the slot's tensor (B, ...)."""
        for seed in self:
            alpha = self.overrides.get(seed.name, seed.alpha)
            if isinstance(alpha, torch.Tensor):
                shape = (-1, *[1] * (output.dim() - 1))
                output = torch.lerp(output, seed(output), alpha.to(output.dtype).view(shape))
            elif alpha > 0.0:
                if seed.name == self.detached:
                    output = output.detach()
                output = blend(output, seed(output), alpha)
        return output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The slot alone: (B, ...) → (B, ...)."""
        return self.on_output(self, x, x)


class GrowingNetwork(nn.Module):
    """A host whose slots can carry seeds. Calling it is calling the host.

    Args:
        host: any module; it is used as it is, and its parameters keep their names under ``host.``.
        slots: where seeds may be placed; see :func:`esperd.growth.slots.find_slots`.

    Raises:
        InvalidSlot: a slot names a module the host does not have, or the host carries slots of another network already: the
            seeds of both would be blended in.
    """

    def __init__(self, host: nn.Module, slots: Sequence[SlotRecord]) -> None:
        super().__init__()
        self.host = host
        self.ports = nn.ModuleDict()
        self.germinated = 0
        """Seeds ever germinated; numbers the next one."""
        for name, module in host.named_modules():
            if any(isinstance(getattr(hook, "__self__", None), SlotPort) for hook in module._forward_hooks.values()):
                raise InvalidSlot(
                    f"module {name!r} already carries the slot of another network; give this one a host of its own", slot=name
                )
        for record in slots:
            try:
                module = host.get_submodule(record.slot)
            except AttributeError as error:
                raise InvalidSlot(f"the host has no module {record.slot!r}", slot=record.slot) from error
            port = SlotPort(record)
            self.ports[port_key(record.slot)] = port
            module.register_forward_hook(port.on_output)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the host predicts: the tensor it returns, or the ``logits`` of what it returns."""
        return prediction(self.host(*inputs))

    @property
    def slots(self) -> tuple[SlotRecord, ...]:
        """The slots in order of execution."""
        return tuple(port.record for port in self._all_ports())

    def port(self, slot: str) -> SlotPort:
        """The port of a slot.

        Raises:
            InvalidSlot: no such slot; lists what exists.
        """
        key = port_key(slot)
        if key not in self.ports:
            names = [record.slot for record in self.slots]
            raise InvalidSlot(f"there is no slot {slot!r}; slots are: {', '.join(names)}", slot=slot)
        return cast("SlotPort", self.ports[key])

    def _all_ports(self) -> Iterator[SlotPort]:
        for port in self.ports.values():
            yield cast("SlotPort", port)

    def seeds(self) -> Iterator[Seed]:
        """Every seed in the network, by slot, oldest first."""
        for port in self._all_ports():
            yield from port

    def seed(self, name: str) -> Seed:
        """The seed of this name.

        Raises:
            InvalidSlot: no such seed in the network.
        """
        for seed in self.seeds():
            if seed.name == name:
                return seed
        raise InvalidSlot(f"there is no seed {name!r} in the network; there are: {[s.name for s in self.seeds()]}", seed=name)

    def insert(self, seed: Seed) -> None:
        """Place a seed behind those that its slot already carries. It does nothing until its alpha rises."""
        self.port(seed.record.slot).seeds[seed_key(seed.name)] = seed

    def remove(self, name: str) -> Seed:
        """Take a seed out.

        Raises:
            InvalidSlot: no such seed.
        """
        seed = self.seed(name)
        del self.port(seed.record.slot).seeds[seed_key(name)]
        return seed

    @property
    def effective_parameters(self) -> int:
        """Parameters of the host and of every seed in it."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def alphas(self, overrides: dict[str, float | torch.Tensor], *, detached: str | None = None) -> Iterator[None]:
        """Run passes with other alphas than the seeds' own, by seed name."""
        touched: list[SlotPort] = []
        for seed in self.seeds():
            if seed.name in overrides:
                port = self.port(seed.record.slot)
                port.overrides[seed.name] = overrides[seed.name]
                if seed.name == detached:
                    port.detached = seed.name
                touched.append(port)
        try:
            yield
        finally:
            for port in touched:
                port.overrides.clear()
                port.detached = None


def port_key(slot: str) -> str:
    """Key of a slot among the ports; a name that ``ModuleDict`` itself uses (a host may well have ``keys``) gets a separator."""
    key = slot.replace(".", MODULE_SEPARATOR)
    return key + MODULE_SEPARATOR if hasattr(nn.ModuleDict, key) else key


def seed_key(name: str) -> str:
    """Key of a seed in its port: its number."""
    return name.rpartition("#")[2]
