"""Seeds from kernels: the structure comes compiled from the cache, the weights fresh from the blueprint."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from esperd.compiler.keys import kernel_key
from esperd.declarations import Blueprint
from esperd.errors import BlueprintRejected, CircuitOpen, EsperError
from esperd.execution.oplist import load_kernel
from esperd.growth.operators import operator as build_operator
from esperd.growth.source import GrownModule, built, rng_seed_of, sketched, why_unfit
from esperd.messages.growth import SlotRecord
from esperd.messages.kernels import KernelKey, KernelProvided
from esperd.messages.telemetry import KernelLoaded
from esperd.plugins import Plugins
from esperd.trainer.desk import Desk
from esperd.trainer.unavailable import UNAVAILABLE

RETRY_AFTER_S = 2.0
"""How long to wait before a kernel that could not be provided is asked for once more: an actor restarts within that time.
Chosen, not measured."""


class KernelSource:
    """Grows seeds from kernels that the cache provides.

    Args:
        plugins: blueprints by name.
        desk: reaches the cache.
        device: where seeds live.
        rng_seed: the job's; a seed's weights depend on it and on the seed's name alone, never on the host's RNG stream.
        sleep: waits so many seconds.
        broken: blueprint → why it cannot be grown, see :func:`~esperd.trainer.factories.broken_factories`.
    """

    def __init__(
        self,
        plugins: Plugins,
        desk: Desk,
        device: torch.device,
        rng_seed: int,
        sleep: Callable[[float], None] = time.sleep,
        broken: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._plugins = plugins
        self._desk = desk
        self._device = device
        self._rng_seed = rng_seed
        self._sleep = sleep
        self.broken = broken
        self.loaded: list[KernelLoaded] = []
        """Kernels loaded since this list was last emptied."""

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """Why this blueprint cannot be grown at this slot; empty when it can."""
        return why_unfit(self._plugins.blueprints, blueprint, slot)

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """The blueprint's own threshold for gate G2."""
        return self._plugins.blueprints[blueprint].min_gradient_ratio if blueprint in self._plugins.blueprints else None

    def key(self, blueprint: Blueprint, slot: SlotRecord) -> KernelKey:
        """The kernel a seed of this blueprint at this slot runs on."""
        distribution = self._plugins.distribution_of("blueprints", blueprint.name)
        return kernel_key(blueprint, slot.shape, slot.dtype, self._device.type, distribution)

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:
        """A fresh seed: the kernel's structure with weights drawn under the seed's own RNG stream.

        Raises:
            EsperError: when the cache cannot provide the kernel, or the blueprint's factory fails.
        """
        declaration = self._plugins.blueprints[blueprint]
        provided = self._provide(self.key(declaration, slot))
        module = load_kernel(provided.graph, None)
        _, entering = self._drawn(declaration, slot, seed, operator, into=module)
        self.loaded.append(
            KernelLoaded(epoch=epoch, seed=seed, blueprint=blueprint, manifest_id=provided.manifest_id, source=provided.source)
        )
        return GrownModule(
            module=module.to(self._device),
            operator=entering.to(self._device),
            parameters=provided.manifest.parameters,
            flops_per_sample=provided.manifest.flops_per_sample,
            kernel=provided.manifest_id,
            graph=provided.graph.decode(),
        )

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        """The seed that :meth:`grow` would give, as a plain module; the cache is not asked.

        Raises:
            EsperError: when the blueprint's factory fails.
        """
        declaration = self._plugins.blueprints[blueprint]
        drawn, entering = self._drawn(declaration, slot, seed, operator)
        dtype = getattr(torch, slot.dtype)
        return sketched(declaration, slot, drawn.to(self._device, dtype), entering.to(self._device, dtype))

    def _drawn(
        self, declaration: Blueprint, slot: SlotRecord, seed: str, operator: str, *, into: nn.Module | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """Module and operator with the weights that a seed of this name has, drawn under its own RNG stream.

        Args:
            declaration: of the blueprint.
            slot: where it is to be.
            seed: its name.
            operator: how it enters.
            into: a kernel that gets the weights, too.
        """
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(rng_seed_of(self._rng_seed, seed))
            try:
                drawn = built(declaration, slot)
                if into is not None:
                    into.load_state_dict(drawn.state_dict())
                return drawn, build_operator(operator, slot)
            except EsperError:
                raise
            except (Exception, SystemExit) as error:
                raise BlueprintRejected(
                    f"blueprint {declaration.name!r} drew no weights for {slot.shape}: {type(error).__name__}: {error}",
                    blueprint=declaration.name,
                    traceback=traceback.format_exc(),
                ) from error

    def _provide(self, key: KernelKey) -> KernelProvided:
        """Ask the cache; once more after a short wait when the daemon is in trouble, unless the job is to stop, or it is known
        that this would be in vain.
        """
        try:
            return self._desk.kernel(key)
        except CircuitOpen:
            raise
        except UNAVAILABLE:
            if self._desk.stop_requested() is not None:
                raise
            self._sleep(RETRY_AFTER_S)
        return self._desk.kernel(key)
