"""Out again as an ordinary ``nn.Module``: no hooks, no slots, no lifecycle.

A forward hook is invisible to what looks at modules: symbolic tracing, quantisation, a pickle. Here every layer that carries
seeds is replaced, in a deep copy of the host, by a :class:`~esperd.growth.grown_layer.GrownLayer` that runs the layer and then
its seeds. Everything else of the host is as it was, and what the host does with its layer (``self.layer.weight``) still finds it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from esperd.declarations import Blueprint, resolve
from esperd.errors import ExportRejected
from esperd.growth.grown_layer import GrownContainer, GrownLayer, GrownSeed
from esperd.growth.network import GrowingNetwork, Seed, SlotPort, seed_key
from esperd.growth.outputs import prediction
from esperd.growth.parity import Sample, answers, compare, inputs_of
from esperd.messages.growth import Stage

REBUILT_BATCH = 3
"""Samples on which a seed rebuilt from its blueprint is compared with its kernel."""


class _Gone:
    """What the hooks of a copied host are bound to instead of its slots, until they are taken off."""


def require_fossilized(network: GrowingNetwork) -> None:
    """A seed that may still be culled does not leave.

    Raises:
        ExportRejected: a seed is still on trial.
    """
    for seed in network.seeds():
        if seed.stage is not Stage.FOSSILIZED:
            raise ExportRejected(f"seed {seed.name} is {seed.stage}; only fossilized seeds are exported", seed=seed.name)


def plain_module(
    network: GrowingNetwork, sample: Sample | None = None, *, blueprints: Mapping[str, Blueprint] | None = None
) -> nn.Module:
    """The grown network as an ordinary module: a deep copy, on the same device, in the same mode.

    Outputs, gradients and buffers are those of the network to the bit, training or evaluating. Parameters keep the host's names,
    but for layers that carry seeds: ``layer.weight`` becomes ``layer.base_layer.weight``, and a seed's parameters are named
    ``layer.seeds.<number>.module.…`` (a gate's ``….operator.…``). A seed at alpha 0 does nothing and is left out. Hooks of
    your own stay.

    Its classes are the host's, torch's, those of :mod:`esperd.growth.grown_layer`, and for seeds either
    :class:`~esperd.execution.oplist.KernelModule` or, with ``blueprints``, what the blueprints build. A pickle of it needs them
    all; what needs nothing of esperd is a ``torch.export`` program or an ONNX file.

    Args:
        network: its seeds must be fossilized.
        sample: (B, ...) inputs to compare on, evaluating without gradients. None: not compared. Worth giving when the host does
            more with its layers than calling them: torch's fused transformer layers read weights and step around what was grown.
        blueprints: by name; seeds are rebuilt as the modules these build, with the same names of parameters, and compared with
            the kernels they ran on. Tools that look for ``nn.Conv2d`` or ``nn.Linear`` find them in these only.

    Raises:
        ExportRejected: a seed is on trial, the host cannot be copied, a seed's blueprint is missing or computes something else,
            or outputs on ``sample`` differ.
    """
    require_fossilized(network)
    try:
        model = _copied(network, blueprints)
    except ExportRejected:
        raise
    except Exception as error:
        raise ExportRejected(f"the host cannot be copied: {type(error).__name__}: {error}") from error
    for module in list(model.modules()):
        _take_off_hooks(module.base_layer if isinstance(module, GrownLayer) else module, module)
    if sample is not None:
        _require_equal(network, model, sample)
    return model


def _copied(network: GrowingNetwork, blueprints: Mapping[str, Blueprint] | None) -> nn.Module:
    """A copy of the host in which a :class:`~esperd.growth.grown_layer.GrownLayer` stands for each layer that carries seeds.

    ``deepcopy`` looks into its memo first. What is entered there beforehand is what the copy refers to, wherever the host refers
    to a layer: under two names, in a list, from a layer within it.
    """
    ports: dict[nn.Module, list[SlotPort]] = {}
    memo: dict[int, Any] = {}
    for record in network.slots:
        port = network.port(record.slot)
        ports.setdefault(network.host.get_submodule(record.slot), []).append(port)
        memo[id(port)] = _Gone()
    grown = {layer: [seed for port in at for seed in port if seed.alpha > 0.0] for layer, at in ports.items()}
    places = {layer: _place_of(layer) for layer, seeds in grown.items() if seeds}
    memo.update({id(layer): place for layer, place in places.items()})
    for layer, place in places.items():
        del memo[id(layer)]
        copied = copy.deepcopy(layer, memo)
        memo[id(layer)] = place
        place.fill(copied, {seed_key(seed.name): _finished(seed, blueprints, memo) for seed in grown[layer]})
        place.seeds.training = place.training = layer.training
    model: nn.Module = copy.deepcopy(network.host, memo)
    return model


def _place_of(layer: nn.Module) -> GrownLayer:
    """An empty place for a layer; torch's containers and everything else that can be counted and indexed stay so."""
    is_sequence = all(hasattr(type(layer), name) for name in ("__len__", "__iter__", "__getitem__"))
    return GrownContainer() if is_sequence else GrownLayer()


def _finished(seed: Seed, blueprints: Mapping[str, Blueprint] | None, memo: dict[int, Any]) -> GrownSeed:
    module = copy.deepcopy(seed.module, memo) if blueprints is None else _rebuilt(seed, blueprints)
    operator = copy.deepcopy(seed.operator, memo)
    finished = GrownSeed(module, operator, seed.alpha_now.clone(), whole=seed.presence == "whole")
    finished.training = seed.training
    return finished


def _rebuilt(seed: Seed, blueprints: Mapping[str, Blueprint]) -> nn.Module:
    """The eager module a seed's kernel was compiled from, with the seed's weights."""
    if seed.blueprint not in blueprints:
        known = ", ".join(blueprints) or "none"
        raise ExportRejected(
            f"seed {seed.name} was grown from blueprint {seed.blueprint!r}, which is not among those given ({known})",
            seed=seed.name,
        )
    state = {name: tensor.detach().clone() for name, tensor in seed.module.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in seed.module.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            module: nn.Module = resolve(blueprints[seed.blueprint].factory)(seed.record.shape)
        module.load_state_dict(state, assign=True)
    except Exception as error:
        told = f"seed {seed.name} cannot be rebuilt from blueprint {seed.blueprint!r}: {type(error).__name__}: {error}"
        raise ExportRejected(told, seed=seed.name) from error
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains[name])
    module.train(seed.module.training)
    example = torch.rand(REBUILT_BATCH, *seed.record.shape, generator=torch.Generator().manual_seed(0))
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), example)
    batch = (example.to(like.device, like.dtype),)
    expected = answers(_evaluating(seed.module), batch, (REBUILT_BATCH,))
    compare(
        expected,
        _evaluating(module),
        batch,
        tolerance=_exactness(like.device),
        what=f"the module that blueprint {seed.blueprint!r} builds now for seed {seed.name}",
    )
    return module


def _evaluating(module: nn.Module) -> nn.Module:
    """A copy in eval mode; the module's own modes, which may differ from part to part, stay."""
    return copy.deepcopy(module).eval()


def _exactness(device: torch.device) -> float:
    """To the bit on a CPU; elsewhere the same operation may be given another algorithm from call to call."""
    return 0.0 if device.type == "cpu" else 1e-4


def _take_off_hooks(layer: nn.Module, place: nn.Module) -> None:
    """Take off the slot's hooks. What was hooked on behind them sees what the seeds made, so it moves to what makes that now."""
    behind_seeds = False
    for key, hook in list(layer._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), _Gone):
            del layer._forward_hooks[key]
            behind_seeds = place is not layer
        elif behind_seeds:
            for mine, theirs in zip(_hook_tables(place), _hook_tables(layer), strict=True):
                if key in theirs:
                    mine[key] = theirs.pop(key)


def _hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called


def _require_equal(network: GrowingNetwork, model: nn.Module, sample: Sample) -> None:
    inputs = inputs_of(sample)
    sizes = (len(inputs[0]),)
    expected = answers(_evaluating(network), inputs, sizes)
    copied = _evaluating(model)

    def predicted(*rows: torch.Tensor) -> torch.Tensor:
        return prediction(copied(*rows))

    compare(expected, predicted, inputs, tolerance=_exactness(inputs[0].device), what="the plain module")
