"""One decision point's look at the gate split: the network as it is, and every variant of it that somebody has to know about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch

from esperd.errors import TrainingDiverged
from esperd.growth.checksum import checksum
from esperd.growth.contribution import Alphas, Batches, CostOf, Measured, PerSample, flops_of, fuses, measure, samples_tried
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.ranks import Alone, Ranks
from esperd.growth.shards import gathered, shard
from esperd.messages.growth import Contribution, Stage
from esperd.messages.jobs import Gates, Growth


def variants_due(seeds: Iterable[Seed], growth: Growth) -> dict[str, dict[str, float]]:
    """What has to be measured: the network without each seed on probation, and with each seed that gate G2 is about to judge, or
    whose screening ends.
    """
    due: dict[str, dict[str, float]] = {}
    for seed in seeds:
        if seed.stage is Stage.PROBATIONARY and seed.life.epochs_in_stage < growth.probation_epochs:  # else its time is up
            due[without(seed)] = {seed.name: 0.0}
        stay = growth.screening_epochs if seed.screening else growth.incubation_epochs
        ending = seed.life.epochs_in_stage + 1 >= stay
        if seed.stage is Stage.TRAINING and is_isolated(seed, growth) and ending:
            due[switched_on(seed)] = {seed.name: seed.alpha_target}
    return due


def is_isolated(seed: Seed, growth: Growth) -> bool:
    """Whether the network does not hear this seed while it is in TRAINING."""
    return bool(seed.screening) or growth.incubation != "joint"


def without(seed: Seed) -> str:
    """Name of the variant in which a seed is off."""
    return f"without {seed.name}"


def switched_on(seed: Seed) -> str:
    """Name of the variant in which a seed is at its target alpha."""
    return f"with {seed.name}"


class GatePass:
    """Measures a network on the gate split, variants fused where that is exact, everything charged. Of several processes each
    measures a part.

    Args:
        network: what is measured.
        loss: per-sample loss.
        metric: per-sample metric or None.
        ledger: is charged.
        settings: level and kind of intervals.
        ranks: the processes.
    """

    def __init__(
        self,
        network: GrowingNetwork,
        loss: PerSample,
        metric: PerSample | None,
        ledger: Ledger,
        settings: Gates,
        ranks: Ranks | None = None,
    ) -> None:
        self.network = network
        self.loss = loss
        self.metric = metric
        self.ledger = ledger
        self.settings = settings
        self.ranks = ranks or Alone()
        self.fused: bool | None = None
        """Whether stacked passes agree with separate ones for every seed measured so far; None until it was tried."""
        self.tried: set[str] = set()
        """Seeds for which that is known."""

    def run(self, batches: Batches, structure: str, variants: Mapping[str, Alphas], epoch: int) -> Measured:
        """Measure the network and its variants.

        Args:
            batches: the gate split, all of it, on every rank.
            structure: which seeds are heard, for the ledger.
            variants: alphas by seed, by name of the variant.
            epoch: for messages.

        Raises:
            TrainingDiverged: when the loss of the network as it is is not finite.
            InvalidData: the split has fewer samples than there are ranks.
        """
        split = list(batches)
        if self.ranks.size > 1:
            self.ranks.agree("the gate split", _fingerprint(split))
        kept = shard(split, self.ranks.rank, self.ranks.size)
        samples = sum(len(inputs) for inputs, _ in kept)
        if not variants:
            measured = self.ledger.charge("gate", structure, samples, lambda: measure(self.network, kept, self.loss, self.metric))
        else:
            measured = self._with_variants(kept, samples, structure, variants)
        measured = gathered(self.ranks, measured)
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
        variants: Mapping[str, Alphas],
    ) -> Measured:
        """The pass of the network as it is is charged as such, what the variants add to it as ablation."""
        first = batches[:1]
        if self.ledger.cost("gate", structure) is None:
            self.ledger.charge("gate", structure, len(first[0][0]), lambda: measure(self.network, first, self.loss))
        plain = self.ledger.cost("gate", structure) or 0.0
        self._try_fusing(first[0], plain, variants)
        measured = measure(self.network, batches, self.loss, self.metric, variants=variants, fused=bool(self.fused))
        spent = self._flops(variants, [len(inputs) for inputs, _ in batches], plain, fused=bool(self.fused))
        self.ledger.add("gate", plain * samples)
        self.ledger.add("ablation", spent - plain * samples)
        return measured

    def _try_fusing(self, batch: tuple[torch.Tensor, torch.Tensor], plain: float, variants: Mapping[str, Alphas]) -> None:
        """Find out whether passes may be stacked for seeds that were never in a variant."""
        seeds = {name for alphas in variants.values() for name in alphas}
        if self.fused is False or seeds <= self.tried:
            return
        agrees = fuses(self.network, batch, self.loss, variants)
        self.fused = all(self.ranks.gather("whether passes may be stacked", agrees))
        self.tried |= seeds
        tried = [samples_tried(len(batch[0]), variants)]
        self.ledger.add("ablation", sum(self._flops(variants, tried, plain, fused=fused) for fused in (True, False)))

    def _flops(self, variants: Mapping[str, Alphas], samples: Sequence[int], plain: float, *, fused: bool) -> float:
        """What the network as it is and its variants cost together."""
        return flops_of(self.network, [{}, *variants.values()], samples, self.cost_of(plain), fused=fused)

    def cost_of(self, plain: float) -> CostOf:
        """FLOPs per sample of a pass in which some seeds run.

        Args:
            plain: of the network as it is.
        """
        host = plain - sum(seed.flops_per_sample for seed in self.network.seeds() if seed.presence in ("blended", "whole"))
        return lambda running: host + sum(self.network.seed(name).flops_per_sample for name in running)

    def contribution(self, measured: Measured, variant: str, epoch: int) -> Contribution:
        """What the network loses in a variant."""
        return measured.contribution(
            variant, confidence=self.settings.confidence, epoch=epoch, interval=self.settings.interval, rng_seed=epoch
        )

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


def _fingerprint(split: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, str]:
    """How many samples it has, and a checksum of inputs and targets."""
    parts = ((f"{number}.{name}", part) for number, batch in enumerate(split) for name, part in zip("xy", batch, strict=True))
    return sum(len(inputs) for inputs, _ in split), checksum(parts)
