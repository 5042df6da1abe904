"""A host with seeds in its slots, as one ``nn.Module``. The host's code and parameter names stay as they are.

Each slot is a forward hook on the module whose output it is. The hook is a bound method of a :class:`SlotPort`, so a deep
copy of the network carries working slots of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import nn

from esperd.errors import InvalidSlot
from esperd.growth.alpha import Ramp
from esperd.growth.grown_layer import answered, settled
from esperd.growth.host import require_plain
from esperd.growth.lifecycle import Life
from esperd.growth.operators import Add, Alpha
from esperd.growth.outputs import prediction
from esperd.growth.straight_through import straight_through
from esperd.messages.growth import LIVE_STAGES, Contribution, SlotRecord, Stage, Trial, Verdict

MODULE_SEPARATOR = "/"
"""Replaces the dot of a module path in a slot's key: ``ModuleDict`` keys may hold no dots."""

Presence = Literal["silent", "taught", "blended", "whole"]
"""How a seed takes part in the host's own passes: not at all; not at all, but its gradient is taken (straight-through); at its
alpha; in place of the slot's tensor (added at alpha 1)."""


class Seed(nn.Module):
    """A grown module and everything known about it.

    Args:
        name: ``<slot>#<number>``, unique in the network.
        blueprint: what it was grown from.
        module: keeps the slot's shape; residual inside.
        record: the slot.
        parameters_added: number of its parameters, its operator's included.
        flops_per_sample: forward FLOPs, its operator's included.
        epoch: epoch of germination.
        kernel: manifest id of the kernel it runs on; None for a plain module.
        graph: the kernel's portable form; None for a plain module, which can then not be checkpointed or exported.
        operator: how its output enters the slot's tensor; None: :class:`~esperd.growth.operators.Add`.
        operator_name: the operator's name, for records.
        alpha_target: the alpha it is grown for.
    """

    alpha_now: torch.Tensor
    """() alpha as the passes read it: a tensor, so that compiled code is not compiled anew when alpha moves."""

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
        operator: nn.Module | None = None,
        operator_name: str = "add",
        alpha_target: float = 1.0,
    ) -> None:
        super().__init__()
        self.name = name
        self.blueprint = blueprint
        self.module = module
        self.operator = operator or Add()
        self.operator_name = operator_name
        self.record = record
        self.parameters_added = parameters_added
        self.flops_per_sample = flops_per_sample
        self.epoch = epoch
        self.kernel = kernel
        self.graph = graph
        self.alpha_target = alpha_target
        self.life = Life()
        self.ramp = Ramp()
        self.screening = ""
        """Name of the screening it is a candidate of; empty: of none."""
        self._presence: Presence = "silent"
        self.presence_changed: Callable[[], None] | None = None
        """Called when the seed takes part in another way than before; its port's, once it stands in one."""
        self.isolated = False
        """Whether the host's gradient is cut at this seed's input, so that the host does not adapt to it."""
        self.register_buffer("alpha_now", torch.zeros((), dtype=getattr(torch, record.dtype)), persistent=False)
        self.alpha = 0.0
        self.contribution: Contribution | None = None
        self.prospect: Contribution | None = None
        self.trial: Trial | None = None
        self.verdict: Verdict | None = None
        self.gradient_ratio: float | None = None
        self.incubation_loss: float | None = None
        """Mean loss of the last epoch's incubation passes; None when none ran."""
        self.activation_bytes: float | None = None
        """What its module keeps for the backward pass, for one sample; None: it was not probed."""

    @property
    def alpha(self) -> float:
        """Share of its output that flows."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = value
        self.alpha_now.fill_(value)
        whole = value == 1.0 and isinstance(self.operator, Add)
        self.presence = "whole" if whole else "blended" if value > 0.0 else "silent"

    @property
    def presence(self) -> Presence:
        """How it takes part in the host's own passes."""
        return self._presence

    @presence.setter
    def presence(self, value: Presence) -> None:
        before, self._presence = self._presence, value
        if value != before and self.presence_changed is not None:
            self.presence_changed()

    @property
    def stage(self) -> Stage:
        """Where it stands."""
        return self.life.stage

    @property
    def lives(self) -> bool:
        """True while it may still be culled."""
        return self.life.stage in LIVE_STAGES

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) → (B, ...), the module alone, without operator and alpha."""
        # torch 2.13 on a CPU crashes the process in GroupNorm's backward when its input is channels-last and needs no
        # gradient: what a lookahead pass, or a frozen host, hands to a seed.
        return answered(self.module(settled(x)), x)

    def enter(self, host: torch.Tensor, alpha: Alpha) -> torch.Tensor:
        """What leaves the slot when this seed is heard at ``alpha``: (B, ...) → (B, ...)."""
        if not self.isolated:
            blended: torch.Tensor = self.operator(host, self(host), alpha)
            return blended
        cut = host.detach()
        # host - cut is exactly zero and carries the host's own gradient past the seed
        return cast("torch.Tensor", self.operator(cut, self(cut), alpha)) + (host - cut)


class SlotPort(nn.Module):
    """What happens at one slot: its seeds, oldest first, each entering what flows by.

    ``overrides`` sets alpha for one pass: a number, or one alpha per sample (B,) for stacked variants. ``detached`` names
    a seed whose input is cut from the graph, so that a lookahead pass stops there instead of running back through the host.
    ``tap`` is shown what reaches the slot before any seed does.
    """

    def __init__(self, record: SlotRecord) -> None:
        super().__init__()
        self.record = record
        self.seeds = nn.ModuleDict()
        self.overrides: dict[str, float | torch.Tensor] = {}
        self.detached: str | None = None
        self.heard: tuple[Seed, ...] = ()
        """Its seeds that are not silent: all that a pass looks at, so that compiled code knows nothing of the others."""
        self.tap: Callable[[torch.Tensor], None] | None = None

    def __iter__(self) -> Iterator[Seed]:
        for seed in self.seeds.values():
            yield cast("Seed", seed)

    def settle(self) -> None:
        """Look again which seeds are heard."""
        self.heard = tuple(seed for seed in self if seed.presence != "silent")

    def on_output(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        """Let every seed that is heard enter the slot's tensor (B, ...).

        Raises:
            InvalidSlot: when a seed is heard and the tensor has another shape than it was grown for.
        """
        if self.tap is not None:
            self.tap(output)
        for seed in self if self.overrides else self.heard:
            if seed.name in self.overrides:
                output = self._overridden(seed, output, self.overrides[seed.name])
            elif seed.presence != "silent":
                self._check_shape(output)
                output = self._heard(seed, output)
        return output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The slot alone: (B, ...) → (B, ...)."""
        return self.on_output(self, x, x)

    def _heard(self, seed: Seed, output: torch.Tensor) -> torch.Tensor:
        if seed.presence == "whole" and not seed.isolated:
            return seed(output)  # type: ignore[no-any-return]  # nn.Module's call is untyped
        if seed.presence == "taught":
            return straight_through(output, lambda cut: seed.enter(cut, seed.alpha_target)) if torch.is_grad_enabled() else output
        return seed.enter(output, seed.alpha_now)

    def _overridden(self, seed: Seed, output: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        if isinstance(alpha, torch.Tensor):
            share = alpha.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
            # where a sample does not hear the seed, not even a seed gone NaN may reach it: 0 · NaN is NaN
            return torch.where(share == 0.0, output, seed.enter(output, share))
        if alpha == 0.0:
            return output
        self._check_shape(output)
        return seed.enter(output.detach() if seed.name == self.detached else output, alpha)

    def _check_shape(self, output: torch.Tensor) -> None:
        shape, grown = tuple(output.shape[1:]), self.record.shape
        # a sequence may be of any length; everything else is what the seed's kernel was compiled for
        fits = len(shape) == len(grown) and (shape[-1] == grown[-1] if self.record.topology == "transformer" else shape == grown)
        if not fits:
            raise InvalidSlot(
                f"the tensor at slot {self.record.slot!r} has shape {shape} for one sample, its seeds were grown for {grown}; "
                "bring all inputs to one size, or take a slot whose shape does not follow them",
                slot=self.record.slot,
                shape=str(shape),
                grown=str(grown),
            )


class GrowingNetwork(nn.Module):
    """A host whose slots can carry seeds. Calling it is calling the host.

    Args:
        host: any module; it is used as it is, and its parameters keep their names under ``host.``.
        slots: where seeds may be placed; see :func:`esperd.growth.slots.find_slots`.

    Raises:
        InvalidModel: the host is no module, or a scripted or compiled one.
        InvalidSlot: a slot names a module the host does not have, or the host carries slots of another network already: the
            seeds of both would be blended in.
    """

    def __init__(self, host: nn.Module, slots: Sequence[SlotRecord]) -> None:
        require_plain(host)
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
        port = self.port(seed.record.slot)
        port.seeds[seed_key(seed.name)] = seed
        seed.presence_changed = port.settle
        port.settle()

    def remove(self, name: str) -> Seed:
        """Take a seed out.

        Raises:
            InvalidSlot: no such seed.
        """
        seed = self.seed(name)
        port = self.port(seed.record.slot)
        del port.seeds[seed_key(name)]
        seed.presence_changed = None
        port.settle()
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
