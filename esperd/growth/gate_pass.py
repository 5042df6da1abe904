"""One decision point's look at the gate split: the network as it is, and every variant of it that somebody has to know about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch

from esperd.errors import TrainingDiverged
from esperd.growth.contribution import Batches, Measured, PerSample, fuses, measure
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork, Seed
from esperd.messages.growth import Contribution, Stage
from esperd.messages.jobs import Gates, Growth

ISOLATED_MODES = ("lookahead", "straight_through", "frozen_input")
"""Modes of incubation in which the network does not hear a seed in TRAINING."""


def variants_due(seeds: Iterable[Seed], growth: Growth) -> dict[str, dict[str, float]]:
    """What has to be measured: the network without each seed on probation, and with each seed that gate G2 is about to judge."""
    due: dict[str, dict[str, float]] = {}
    for seed in seeds:
        if seed.stage is Stage.PROBATIONARY:
            due[without(seed)] = {seed.name: 0.0}
        ending = seed.life.epochs_in_stage + 1 >= growth.incubation_epochs
        if seed.stage is Stage.TRAINING and growth.incubation in ISOLATED_MODES and ending:
            due[switched_on(seed)] = {seed.name: seed.alpha_target}
    return due


def without(seed: Seed) -> str:
    """Name of the variant in which a seed is off."""
    return f"without {seed.name}"


def switched_on(seed: Seed) -> str:
    """Name of the variant in which a seed is at its target alpha."""
    return f"with {seed.name}"


class GatePass:
    """Measures a network on the gate split, variants fused where that is exact, everything charged.

    Args:
        network: what is measured.
        loss: per-sample loss.
        metric: per-sample metric or None.
        ledger: is charged.
        settings: level and kind of intervals.
    """

    def __init__(
        self, network: GrowingNetwork, loss: PerSample, metric: PerSample | None, ledger: Ledger, settings: Gates
    ) -> None:
        self.network = network
        self.loss = loss
        self.metric = metric
        self.ledger = ledger
        self.settings = settings
        self.fused: bool | None = None
        """Whether stacked passes agree with separate ones for every seed measured so far; None until it was tried."""
        self.tried: set[str] = set()
        """Seeds for which that is known."""

    def run(self, batches: Batches, structure: str, variants: Mapping[str, Mapping[str, float]], epoch: int) -> Measured:
        """Measure the network and its variants.

        Args:
            batches: the gate split.
            structure: which seeds are heard, for the ledger.
            variants: alphas by seed, by name of the variant.
            epoch: for messages.

        Raises:
            TrainingDiverged: when the loss of the network as it is is not finite.
        """
        kept = list(batches)
        samples = sum(len(inputs) for inputs, _ in kept)
        if not variants:
            measured = self.ledger.charge("gate", structure, samples, lambda: measure(self.network, kept, self.loss, self.metric))
        else:
            measured = self._with_variants(kept, samples, structure, variants)
        if not torch.isfinite(measured.loss).all():
            raise TrainingDiverged(
                f"the gate loss is {measured.mean_loss} after epoch {epoch}; lower optimizer.learning_rate", epoch=epoch
            )
        return measured

    def _with_variants(
        self,
        batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        samples: int,
        structure: str,
        variants: Mapping[str, Mapping[str, float]],
    ) -> Measured:
        """The pass of the network as it is is charged as such, what the variants add to it as ablation."""
        first = batches[:1]
        if self.ledger.cost("gate", structure) is None:
            self.ledger.charge("gate", structure, len(first[0][0]), lambda: measure(self.network, first, self.loss))
        self._try_fusing(first[0], structure, variants)
        fused = bool(self.fused)
        measured = self.ledger.charge(
            "ablation",
            f"{structure}|{'|'.join(variants)}|{'fused' if fused else 'separate'}",
            samples,
            lambda: measure(self.network, batches, self.loss, self.metric, variants=variants, fused=fused),
        )
        plain = (self.ledger.cost("gate", structure) or 0.0) * samples
        self.ledger.spent["ablation"] -= plain
        self.ledger.spent["gate"] += plain
        return measured

    def _try_fusing(
        self, batch: tuple[torch.Tensor, torch.Tensor], structure: str, variants: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Find out whether passes may be stacked for seeds that were never in a variant."""
        seeds = {name for alphas in variants.values() for name in alphas}
        if self.fused is False or seeds <= self.tried:
            return
        key = f"fuses {structure}|{'|'.join(variants)}"
        self.fused = self.ledger.charge("ablation", key, len(batch[0]), lambda: fuses(self.network, batch, self.loss, variants))
        self.tried |= seeds

    def contribution(self, measured: Measured, variant: str, epoch: int) -> Contribution:
        """What the network loses in a variant."""
        return measured.contribution(variant, confidence=self.settings.confidence, epoch=epoch)

    def prospect(self, measured: Measured, variant: str, epoch: int) -> Contribution:
        """What the network gains in a variant."""
        lost = self.contribution(measured, variant, epoch)
        return msgspec.structs.replace(
            lost,
            loss=-lost.loss,
            lower=-lost.upper,
            upper=-lost.lower,
            metric=None if lost.metric is None else -lost.metric,
        )
