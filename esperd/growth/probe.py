"""The probe of a newborn seed: three steps on real samples, of which nothing remains but what they showed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from esperd.growth.contribution import PerSample
from esperd.growth.gates import Probe
from esperd.growth.incubation import lookahead_gradients
from esperd.growth.kept import kept_for_backward
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.untouched import untouched

PROBE_STEPS = 3
PROBE_STEP_SIZE = 0.05
"""Relative length of a probe step: each parameter tensor moves by this share of the larger of its norm and 1. A zero-initialised
layer must leave zero for the layers before it to receive a gradient. Chosen, not measured."""


def probe(
    network: GrowingNetwork,
    seed: Seed,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: PerSample,
    *,
    alpha: float,
) -> Probe:
    """Try a seed that does nothing yet: three lookahead steps on real samples. Its weights are put back afterwards."""
    x = _slot_tensor(network, seed, inputs).contiguous()
    with untouched(network), torch.enable_grad():
        entering = x.detach().requires_grad_(x.is_floating_point()).clone()  # as in training: part of a graph, and no leaf of it
        with kept_for_backward(seed.module, [entering]) as kept:
            output = seed.module(entering)
    activation_bytes, output = kept.size_bytes / len(x), output.detach()
    parameters = list(seed.parameters())
    fits = output.shape == x.shape and output.dtype == x.dtype and output.device == x.device
    first, third = _learning_tensors(network, seed, inputs, targets, loss, alpha) if fits and parameters else (0, 0)
    return Probe(
        shape_kept=output.shape == x.shape,
        dtype_kept=output.dtype == x.dtype,
        device_kept=output.device == x.device,
        finite=bool(torch.isfinite(output).all()),
        identity_error=_moved(seed, x, output, 0.0) if fits else float("inf"),
        birth_error=_moved(seed, x, output, alpha) / (1 + float(x.abs().max())) if fits else float("inf"),
        tensors=len(parameters),
        tensors_with_gradient_first=first,
        tensors_with_gradient_third=third,
        activation_bytes=activation_bytes,
    )


def _moved(seed: Seed, x: torch.Tensor, output: torch.Tensor, alpha: float) -> float:
    """Largest change to what flows by when the seed is heard at ``alpha``."""
    with torch.no_grad():
        entered: torch.Tensor = seed.operator(x, output, alpha)
    return float((entered - x).abs().max())


def _slot_tensor(network: GrowingNetwork, seed: Seed, inputs: torch.Tensor) -> torch.Tensor:
    """What flows through the seed's slot for these inputs: (B, ...)."""
    captured: list[torch.Tensor] = []
    module = network.host.get_submodule(seed.record.slot)
    handle = module.register_forward_hook(lambda _module, _inputs, output: captured.append(output.detach().clone()))
    try:
        with untouched(network), torch.no_grad():
            network(inputs)
    finally:
        handle.remove()
    return captured[0]


def _learning_tensors(
    network: GrowingNetwork, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor, loss: PerSample, alpha: float
) -> tuple[int, int]:
    """How many of the seed's parameter tensors received a gradient by the first and by the third step."""
    parameters = list(seed.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    reached: set[int] = set()
    counts: list[int] = []
    try:
        with untouched(seed):
            for _ in range(PROBE_STEPS):
                second = lookahead_gradients(network, seed, inputs, targets, loss, alpha=alpha)
                for parameter, gradient in zip(parameters, second.gradients, strict=True):
                    parameter.grad = gradient
                reached.update(
                    index
                    for index, parameter in enumerate(parameters)
                    if parameter.grad is not None and bool((parameter.grad != 0).any())
                )
                counts.append(len(reached))
                move(parameters)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    return counts[0], counts[-1]


def move(parameters: Sequence[nn.Parameter]) -> None:
    """One step against the gradients, every tensor by :data:`PROBE_STEP_SIZE`, however large or small its gradient is."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is None:
                continue
            length = parameter.grad.norm()
            if length > 0:
                step = PROBE_STEP_SIZE * parameter.norm().clamp_min(1.0) / length
                parameter.sub_(parameter.grad * step)
