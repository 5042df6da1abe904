"""What a network loses without a seed: paired, per sample, on the gate split, ablations fused in one pass where that is exact.

Never a before/after difference: that contains the host's own learning. Known limit: the host adapts to its seeds, so a
contribution overstates what a seed brought (up to twelve times, measured on CIFAR-10 at 16×16). It culls; it does not rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from esperd.growth.interval import mean_interval
from esperd.growth.network import GrowingNetwork
from esperd.messages.growth import Contribution

PerSample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output, target) → (B,) one value per sample."""

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]

FUSED_TOLERANCE = 1e-4
"""Stacked and separate passes agree when no per-sample loss differs by more than this, relative to 1 + |loss|.
Float32 convolutions of another batch size may take another path and differ in the last bits; a model that mixes samples
differs by far more."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One pass over a split: per-sample loss (N,) and metric (N,) of the network, and of the network without each seed."""

    loss: torch.Tensor
    metric: torch.Tensor | None
    variants: dict[str, tuple[torch.Tensor, torch.Tensor | None]]

    @property
    def mean_loss(self) -> float:
        """Mean loss of the network as it is."""
        return float(self.loss.mean())

    @property
    def mean_metric(self) -> float | None:
        """Mean metric of the network as it is; None when there is none."""
        return None if self.metric is None else float(self.metric.mean())

    def contribution(self, variant: str, *, confidence: float, epoch: int) -> Contribution:
        """The contribution of one of the seeds that were ablated, with a paired t interval."""
        loss, metric = self.variants[variant]
        mean, lower, upper = mean_interval(loss - self.loss, confidence)
        difference = None
        if metric is not None and self.metric is not None:
            difference = float((self.metric - metric).mean())
        return Contribution(
            loss=mean,
            lower=lower,
            upper=upper,
            confidence=confidence,
            samples=self.loss.numel(),
            metric=difference,
            epoch=epoch,
        )


def measure(
    network: GrowingNetwork,
    batches: Batches,
    loss: PerSample,
    metric: PerSample | None = None,
    *,
    variants: Mapping[str, Mapping[str, float]] | None = None,
    fused: bool = False,
) -> Measured:
    """Measure a network, and the network without each of some seeds, on the same samples.

    Args:
        network: left in the mode it was in, module by module.
        batches: (inputs, targets); the split.
        loss: per-sample loss.
        metric: per-sample metric, or None.
        variants: alphas by seed, by name of the variant.
        fused: stack all configurations of a batch into one pass of (K·B, ...), alpha set per sample. Only right for models
            that treat samples independently in eval mode; see :func:`fuses`.

    Returns:
        Per-sample values, on the CPU.
    """
    variants = variants or {}
    configurations: list[Mapping[str, float]] = [{}, *variants.values()]
    losses: list[list[torch.Tensor]] = [[] for _ in configurations]
    metrics: list[list[torch.Tensor]] = [[] for _ in configurations]
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            for inputs, targets in batches:
                outputs = (_stacked if fused and variants else _separate)(network, inputs, configurations)
                for index, output in enumerate(outputs):
                    losses[index].append(loss(output, targets).cpu())
                    if metric is not None:
                        metrics[index].append(metric(output, targets).cpu())
    finally:
        for module, training in modes:
            module.training = training
    values = [
        (torch.cat(losses[index]), torch.cat(metrics[index]) if metric is not None else None)
        for index in range(len(configurations))
    ]
    return Measured(loss=values[0][0], metric=values[0][1], variants={name: values[i + 1] for i, name in enumerate(variants)})


def fuses(
    network: GrowingNetwork,
    batch: tuple[torch.Tensor, torch.Tensor],
    loss: PerSample,
    variants: Mapping[str, Mapping[str, float]],
) -> bool:
    """Whether stacked and separate passes agree for this model, tried on one batch."""
    stacked = measure(network, [batch], loss, variants=variants, fused=True)
    separate = measure(network, [batch], loss, variants=variants, fused=False)
    pairs = [(stacked.loss, separate.loss)] + [(stacked.variants[name][0], separate.variants[name][0]) for name in variants]
    return all(bool(((a - b).abs() <= FUSED_TOLERANCE * (1 + b.abs())).all()) for a, b in pairs)


def _separate(network: GrowingNetwork, inputs: torch.Tensor, configurations: Sequence[Mapping[str, float]]) -> list[torch.Tensor]:
    outputs = []
    for alphas in configurations:
        with network.alphas(dict(alphas)):
            outputs.append(network(inputs))
    return outputs


def _stacked(network: GrowingNetwork, inputs: torch.Tensor, configurations: Sequence[Mapping[str, float]]) -> list[torch.Tensor]:
    batch = inputs.shape[0]
    overrides: dict[str, float | torch.Tensor] = {}
    for index, alphas in enumerate(configurations):
        for name, value in alphas.items():
            if name not in overrides:
                own = network.seed(name).alpha
                overrides[name] = torch.full((len(configurations) * batch,), own, device=inputs.device)  # (K·B,)
            overrides[name][index * batch : (index + 1) * batch] = value  # type: ignore[index]
    with network.alphas(overrides):
        stacked: torch.Tensor = network(inputs.repeat(len(configurations), *[1] * (inputs.dim() - 1)))  # (K·B, ...)
    return list(torch.split(stacked, batch))
