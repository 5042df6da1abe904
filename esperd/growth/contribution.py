"""What a network would lose were its seeds switched otherwise: paired, per sample, stacked in one pass where that is exact.

Never a before/after difference: that contains the host's own learning. Known limit: the host adapts to its seeds, so a
contribution overstates what a seed brought (up to twelve times, measured on CIFAR-10 at 16×16). It culls; it does not rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch

from esperd.errors import InvalidModel
from esperd.growth.interval import mean_interval
from esperd.growth.network import GrowingNetwork
from esperd.growth.untouched import untouched
from esperd.messages.growth import Contribution, IntervalMethod

PerSample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(output, target) → (B,) one value per sample."""

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]

Alphas = Mapping[str, float]
"""A variant of a network: alpha, 0 to 1, by seed name. A seed that it does not name keeps its own."""

CostOf = Callable[[frozenset[str]], float]
"""FLOPs of a forward pass, for one sample, in which the host and these seeds run."""

Values = tuple[torch.Tensor, torch.Tensor | None]
"""Loss (N,) and metric (N,) of each sample; None where there is no metric. On the CPU."""

NO_VARIANTS: Mapping[str, Alphas] = MappingProxyType({})

FUSED_TOLERANCE = 1e-4
"""Stacked and separate passes agree when no per-sample loss differs by more than this, relative to 1 + |loss|.
Float32 convolutions of another batch size may take another path and differ in the last bits; a model that mixes samples
differs by far more."""

LARGEST_PASS = 2048
"""Samples that go through the network at once in a stacked pass. Chosen, not measured: four times a gate batch."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One reading of a split: per-sample loss (N,) and metric (N,) of the network, and of each of its variants."""

    loss: torch.Tensor
    metric: torch.Tensor | None
    variants: dict[str, Values]

    @property
    def mean_loss(self) -> float:
        """Mean loss of the network as it is."""
        return float(self.loss.mean())

    @property
    def mean_metric(self) -> float | None:
        """Mean metric of the network as it is; None when there is none."""
        return None if self.metric is None else float(self.metric.mean())

    def contribution(
        self, variant: str, *, confidence: float, epoch: int, interval: IntervalMethod = "t", rng_seed: int = 0
    ) -> Contribution:
        """What the network as it is has over a variant: of an ablation, positive means that the seed helps.

        Args:
            variant: one of those measured.
            confidence: level of the interval, for example 0.95.
            epoch: when this was measured; kept for whoever asks how fresh it is.
            interval: how the interval is computed.
            rng_seed: of a bootstrap interval.
        """
        loss, metric = self.variants[variant]
        mean, lower, upper = mean_interval(loss - self.loss, confidence, interval, rng_seed)
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


def per_sample(function: PerSample, output: torch.Tensor, targets: torch.Tensor, *, what: str) -> torch.Tensor:
    """Ask a loss or a metric. What it returned is looked at by its shape alone, which waits for no device.

    Args:
        function: the loss or the metric.
        output: (B, ...) what the network predicted.
        targets: (B, ...).
        what: ``loss`` or ``metric``, for the message.

    Returns:
        (B,).

    Raises:
        InvalidModel: it returned anything but one floating-point value for each sample.
    """
    values: object = function(output, targets)
    samples = tuple(output.shape[:1])
    if isinstance(values, torch.Tensor) and tuple(values.shape) == samples and samples and values.is_floating_point():
        return values
    came = f"{tuple(values.shape)} {values.dtype}" if isinstance(values, torch.Tensor) else f"a {type(values).__name__}"
    hint = "metric=lambda output, target: (output.argmax(1) == target).float()"
    if what == "loss":
        hint = 'loss=lambda output, target: torch.nn.functional.cross_entropy(output, target, reduction="none")'
    raise InvalidModel(
        f"the {what} must return one floating-point value per sample, shape {samples}, not {came}, because seeds are judged "
        f"sample by sample; for example {hint}, averaged over a sample's own positions only",
        returned=came,
    )


def ablations(seeds: Iterable[str]) -> dict[str, Alphas]:
    """Variants that each switch one seed off, called like it."""
    return {name: {name: 0.0} for name in seeds}


def measure(
    network: GrowingNetwork,
    batches: Batches,
    loss: PerSample,
    metric: PerSample | None = None,
    *,
    variants: Mapping[str, Alphas] = NO_VARIANTS,
    fused: bool = False,
    largest_pass: int = LARGEST_PASS,
) -> Measured:
    """Measure a network, and variants of it, on the same samples.

    Args:
        network: left as it was: modes module by module, buffers, and the RNG streams.
        batches: (inputs, targets); the split. Read once.
        loss: per-sample loss.
        metric: per-sample metric, or None.
        variants: alphas by name of variant; :func:`ablations` makes those that leave one seed out.
        fused: see :func:`evaluate`.
        largest_pass: see :func:`evaluate`.

    Returns:
        Per-sample values, on the CPU.

    Raises:
        InvalidModel: loss or metric return anything but one value per sample.
        InvalidSlot: a variant names a seed that is not in the network.
        ValueError: an alpha is not between 0 and 1.
    """
    configurations: list[Alphas] = [{}, *variants.values()]
    values = evaluate(network, batches, loss, metric, configurations=configurations, fused=fused, largest_pass=largest_pass)
    return Measured(loss=values[0][0], metric=values[0][1], variants=dict(zip(variants, values[1:], strict=True)))


def evaluate(
    network: GrowingNetwork,
    batches: Batches,
    loss: PerSample,
    metric: PerSample | None = None,
    *,
    configurations: Sequence[Alphas],
    fused: bool = False,
    largest_pass: int = LARGEST_PASS,
) -> list[Values]:
    """Per-sample values of a network with each of several sets of alphas, all on the same samples.

    A network that draws random numbers in eval mode draws the same ones for every configuration, so that they stay paired.

    Args:
        network: left as it was: modes module by module, buffers, and the RNG streams.
        batches: (inputs, targets), each (B, ...); read once.
        loss: per-sample loss.
        metric: per-sample metric, or None.
        configurations: K sets of alphas.
        fused: stack configurations of a batch into passes of (K·B, ...), alpha set per sample. Only right for models that
            treat samples independently in eval mode; see :func:`fuses`.
        largest_pass: no stacked pass holds more samples; a batch that is larger by itself goes through unstacked.

    Returns:
        Values of each configuration, in order.

    Raises:
        InvalidModel: loss or metric return anything but one value per sample.
        InvalidSlot: a configuration names a seed that is not in the network.
        ValueError: an alpha is not between 0 and 1.
    """
    _check(network, configurations)
    losses: list[list[torch.Tensor]] = [[] for _ in configurations]
    metrics: list[list[torch.Tensor]] = [[] for _ in configurations]
    with _evaluating(network), torch.no_grad():
        for inputs, targets in batches:
            for part in _stacks(len(configurations), len(inputs), fused=fused, largest_pass=largest_pass):
                with untouched(network):
                    for index, output in zip(part, _outputs(network, inputs, [configurations[i] for i in part]), strict=True):
                        losses[index].append(per_sample(loss, output, targets, what="loss").cpu())
                        if metric is not None:
                            metrics[index].append(per_sample(metric, output, targets, what="metric").cpu())
    return [
        (torch.cat(losses[index]), None if metric is None else torch.cat(metrics[index])) for index in range(len(configurations))
    ]


def flops_of(
    network: GrowingNetwork,
    configurations: Sequence[Alphas],
    samples: Iterable[int],
    cost_of: CostOf,
    *,
    fused: bool = False,
    largest_pass: int = LARGEST_PASS,
) -> float:
    """FLOPs that :func:`evaluate` will spend: a stacked pass runs, for all its samples, every seed that is on for some.

    Args:
        network: its seeds' own alphas count where a configuration does not name them.
        configurations: as for :func:`evaluate`.
        samples: sizes of the batches.
        cost_of: FLOPs per sample.
        fused: as for :func:`evaluate`.
        largest_pass: as for :func:`evaluate`.
    """
    spent = 0.0
    for batch in samples:
        for part in _stacks(len(configurations), batch, fused=fused, largest_pass=largest_pass):
            spent += len(part) * batch * cost_of(_running(network, [configurations[index] for index in part]))
    return spent


def fuses(
    network: GrowingNetwork,
    batch: tuple[torch.Tensor, torch.Tensor],
    loss: PerSample,
    variants: Mapping[str, Alphas],
    *,
    largest_pass: int = LARGEST_PASS,
) -> bool:
    """Whether stacked and separate passes agree for this model and these variants.

    Tried on the first :func:`samples_tried` of a batch, as one stack of the network and all its variants.
    """
    size = samples_tried(len(batch[0]), variants, largest_pass=largest_pass)
    tried = [(batch[0][:size], batch[1][:size])]
    configurations: list[Alphas] = [{}, *variants.values()]
    stacked = evaluate(network, tried, loss, configurations=configurations, fused=True, largest_pass=largest_pass)
    separate = evaluate(network, tried, loss, configurations=configurations)
    pairs = ((a, b) for (a, _), (b, _) in zip(stacked, separate, strict=True))
    return all(bool(((a - b).abs() <= FUSED_TOLERANCE * (1 + b.abs())).all()) for a, b in pairs)


def samples_tried(batch: int, variants: Mapping[str, Alphas], *, largest_pass: int = LARGEST_PASS) -> int:
    """Samples of a batch that :func:`fuses` runs, twice for the network and for each variant: as many as fit one stack."""
    return min(batch, max(1, largest_pass // (1 + len(variants))))


def _check(network: GrowingNetwork, configurations: Sequence[Alphas]) -> None:
    for alphas in configurations:
        for name, alpha in alphas.items():
            network.seed(name)  # a name it does not know would be ignored, and the network measured as it is
            if not 0.0 <= alpha <= 1.0:
                raise ValueError(f"alpha {alpha} of seed {name!r} is not between 0 and 1")


@contextmanager
def _evaluating(network: GrowingNetwork) -> Iterator[None]:
    """Eval mode, and afterwards every module in the mode it was in: people freeze parts of a network that trains."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _stacks(count: int, batch: int, *, fused: bool, largest_pass: int) -> list[range]:
    """Which configurations go through together: indices of each pass."""
    size = max(1, largest_pass // max(batch, 1)) if fused else 1
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _running(network: GrowingNetwork, stack: Sequence[Alphas]) -> frozenset[str]:
    """Seeds that a pass of these configurations runs."""
    return frozenset(seed.name for seed in network.seeds() if any(alphas.get(seed.name, seed.alpha) > 0.0 for alphas in stack))


def _outputs(network: GrowingNetwork, inputs: torch.Tensor, stack: Sequence[Alphas]) -> Sequence[torch.Tensor]:
    """One pass of (K·B, ...): outputs (B, ...) of each configuration. A seed gets one alpha per sample where they differ."""
    count, batch = len(stack), len(inputs)
    overrides: dict[str, float | torch.Tensor] = {}
    for name in dict.fromkeys(name for alphas in stack for name in alphas):
        values = [alphas.get(name, network.seed(name).alpha) for alphas in stack]
        if len(set(values)) == 1:
            overrides[name] = values[0]  # one that is off for all of them does not run
        else:
            overrides[name] = torch.tensor(values, device=inputs.device).repeat_interleave(batch)  # (K·B,)
    with network.alphas(overrides):
        output: torch.Tensor = network(inputs.repeat(count, *[1] * (inputs.dim() - 1)) if count > 1 else inputs)
    return torch.split(output, batch)
