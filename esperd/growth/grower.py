"""The grower: one network in training, its seeds, and what becomes of them at each decision point.

It owns no loop. A training loop calls :meth:`Grower.train_step` for each batch, and once per epoch :meth:`Grower.measure`,
:meth:`Grower.end_epoch` and :meth:`Grower.apply` with what a policy decided. Nothing structural happens anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from esperd.errors import TrainingDiverged, UnknownName
from esperd.growth import lifecycle
from esperd.growth.alpha import Curve, Ramp
from esperd.growth.contribution import Batches, Measured, PerSample, ablations, fuses, measure, samples_tried
from esperd.growth.gates import Evidence, GateCheck, Probe
from esperd.growth.gradients import STRIDE, GradientRatio, gradient_norms
from esperd.growth.incubation import lookahead_gradients
from esperd.growth.ledger import Ledger
from esperd.growth.lifecycle import CheckGate, CullRequested, Entered, EpochEnded, GateAnswered, Occurrence, Refused
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.optimizer import HOST_GROUP, add_group, remove_group
from esperd.messages.growth import COOLDOWN_STAGES, SeedRecord, SlotRecord, Stage
from esperd.messages.jobs import Gates, Growth, SeedOutcome
from esperd.messages.policy import Decision
from esperd.messages.telemetry import Body, ContributionMeasured, GateEvaluated, StageChanged


@dataclass(frozen=True, kw_only=True)
class GrownModule:
    """A seed's module, fresh, and what is known about it."""

    module: nn.Module
    parameters: int
    flops_per_sample: float
    kernel: str | None = None
    """Manifest id; None when it runs as a plain module."""
    graph: str | None = None
    """The kernel's portable form; what checkpoints and exports rebuild the seed from. None for a plain module."""


class Nursery(Protocol):
    """Where seeds come from."""

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        """Why this blueprint cannot be grown at this slot; empty when it can."""
        ...

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, epoch: int) -> GrownModule:
        """A fresh module for a seed of this name, on the device and in the dtype of the slot."""
        ...

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        """The blueprint's own threshold for gate G2, if it has one."""
        ...


class SurgeryFunction(Protocol):
    """A surgery operation: completes, returns why it refused, or raises and leaves the network as it was."""

    def __call__(self, grower: Grower, decision: Decision) -> str | None:
        """Carry out the decision; return None, or the reason for refusing it."""
        ...


@dataclass
class Incubation:
    """What was gathered about a seed since its epoch began."""

    ratio: GradientRatio
    loss_sum: torch.Tensor | None = None
    passes: int = 0


@dataclass
class Grower:
    """Grows seeds in a network while it trains.

    Args:
        network: host and slots.
        optimizer: as from :func:`esperd.growth.optimizer.build_optimizer`: its first group is the host's.
        loss: per-sample loss, (output, target) → (B,).
        metric: per-sample metric or None.
        growth: durations and the mode of incubation.
        settings: thresholds of the gates.
        gates: checks by name, G0 to G5.
        operations: surgery operations by name.
        curve: alpha schedule.
        nursery: makes modules.
        ledger: is charged for everything.
        emit: takes events as they happen.
    """

    network: GrowingNetwork
    optimizer: torch.optim.Optimizer
    loss: PerSample
    metric: PerSample | None
    growth: Growth
    settings: Gates
    gates: Mapping[str, GateCheck]
    operations: Mapping[str, SurgeryFunction]
    curve: Curve
    nursery: Nursery
    ledger: Ledger
    emit: Callable[[Body], None]
    epoch: int = 0
    """Epochs completed."""
    steps_per_epoch: int = 1
    resting: dict[str, Seed] = field(default_factory=dict)
    """Culled seeds whose slots cool down, by slot. Their modules are gone from the network."""
    outcomes: list[SeedOutcome] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    """Gate losses since each shadowing seed reached its target alpha."""
    incubations: dict[str, Incubation] = field(default_factory=dict)
    train_loss: float | None = None
    gate_loss: float | None = None
    sample: tuple[torch.Tensor, torch.Tensor] | None = None
    """A batch of the train split, for probing new seeds."""
    fused: bool | None = None
    """Whether stacked ablation passes agree with separate ones for every seed measured so far; None until it was tried."""
    step: int = 0
    """Optimiser steps taken."""

    # --- one batch -------------------------------------------------------------------------------------------------------

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One optimiser step of the host and every seed that trains.

        Args:
            inputs: (B, ...).
            targets: (B, ...).

        Returns:
            () mean loss of the batch, detached, still on the device.
        """
        for seed in self.network.seeds():
            if not seed.ramp.at_rest:
                seed.ramp = seed.ramp.step()
                seed.alpha = seed.ramp.value(self.curve)
        self.optimizer.zero_grad(set_to_none=True)
        value = self.ledger.charge("train", self.structure(), len(inputs), lambda: self._host_pass(inputs, targets))
        for seed in self.incubating():
            self._lookahead_pass(seed, inputs, targets)
        if self.step % STRIDE == 0:
            self._sample_gradients()
        self.optimizer.step()
        self.step += 1
        return value

    def incubating(self) -> list[Seed]:
        """Seeds that learn by lookahead, behind the host."""
        if self.growth.incubation != "lookahead":
            return []
        return [seed for seed in self.network.seeds() if seed.stage is Stage.TRAINING]

    def structure(self) -> str:
        """Which seeds take part in a forward pass; names the structure in the ledger."""
        return ",".join(seed.name for seed in self.network.seeds() if seed.alpha > 0.0) or "host"

    def _host_pass(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = self.loss(self.network(inputs), targets).mean()
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return value.detach()

    def _lookahead_pass(self, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        def work() -> torch.Tensor:
            return lookahead_gradients(self.network, seed, inputs, targets, self.loss, alpha=self.growth.alpha_target)

        value = self.ledger.charge("incubation", f"{self.structure()}+{seed.name}", len(inputs), work)
        gathered = self._incubation(seed)
        gathered.loss_sum = value if gathered.loss_sum is None else gathered.loss_sum + value
        gathered.passes += 1

    def _sample_gradients(self) -> None:
        training = [seed for seed in self.network.seeds() if seed.stage is Stage.TRAINING]
        if not training:
            return
        host = gradient_norms(self.optimizer.param_groups[0]["params"])
        for seed in training:
            self._incubation(seed).ratio.observe(host, gradient_norms(seed.parameters()))

    def _incubation(self, seed: Seed) -> Incubation:
        if seed.name not in self.incubations:
            ratio = GradientRatio(host_parameters=self.trained_host_parameters, seed_parameters=seed.parameters_added)
            self.incubations[seed.name] = Incubation(ratio=ratio)
        return self.incubations[seed.name]

    # --- one decision point ----------------------------------------------------------------------------------------------

    def measure(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Measured:
        """Pass over the gate split, with one ablation for each probationary seed, fused where that is exact.

        Raises:
            TrainingDiverged: when the gate loss is not finite.
        """
        ablate = [seed.name for seed in self.network.seeds() if seed.stage is Stage.PROBATIONARY]
        kept = list(batches)
        tried = self._try_fusing(kept[0], [name for name in ablate if self.network.seed(name).contribution is None])
        measured = self._charged_measure(kept, ablate, tried)
        self.gate_loss = measured.mean_loss
        if not torch.isfinite(measured.loss).all():
            raise TrainingDiverged(
                f"the gate loss is {measured.mean_loss} after epoch {self.epoch}; lower optimizer.learning_rate",
                epoch=self.epoch,
            )
        for name in ablate:
            seed = self.network.seed(name)
            seed.contribution = measured.contribution(name, confidence=self.settings.confidence, epoch=self.epoch)
            self.emit(ContributionMeasured(epoch=self.epoch, seed=name, contribution=seed.contribution))
        return measured

    def _try_fusing(self, batch: tuple[torch.Tensor, torch.Tensor], seeds: list[str]) -> int:
        """Find out whether passes may be stacked for seeds that were never measured; returns how many samples that took."""
        if not seeds or self.fused is False:
            return 0
        variants = ablations(seeds)
        self.fused = fuses(self.network, batch, self.loss, variants)
        return 2 * (1 + len(seeds)) * samples_tried(len(batch[0]), variants)

    def _charged_measure(self, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], ablate: list[str], tried: int) -> Measured:
        """The gate pass is charged as such; what the ablations add to it, and the samples tried before, as ablation."""
        samples = sum(len(inputs) for inputs, _ in batches)
        if not ablate:
            return self.ledger.charge(
                "gate", self.structure(), samples, lambda: measure(self.network, batches, self.loss, self.metric)
            )
        if self.ledger.cost("gate", self.structure()) is None:
            first: Batches = batches[:1]
            self.ledger.charge("gate", self.structure(), len(batches[0][0]), lambda: measure(self.network, first, self.loss))
        plain = self.ledger.cost("gate", self.structure()) or 0.0
        result = measure(self.network, batches, self.loss, self.metric, variants=ablations(ablate), fused=bool(self.fused))
        self.ledger.spent["gate"] += plain * samples
        self.ledger.spent["ablation"] += sum(self._cost_without(name, plain) for name in ablate) * samples + plain * tried
        return result

    def _cost_without(self, name: str, plain: float) -> float:
        """FLOPs per sample of an ablated pass: a stacked one still runs the seed, a separate one does not."""
        return plain if self.fused else plain - self.network.seed(name).flops_per_sample

    def end_epoch(self) -> None:
        """Move every seed on: stays are counted, gates that are due are asked, slots cool down."""
        resting = list(self.resting.values())  # before any is culled now: that one's rest begins with the next epoch
        for seed in list(self.network.seeds()):
            if seed.name in self.windows and self.gate_loss is not None:
                self.windows[seed.name].append(self.gate_loss)
            if seed.stage is Stage.TRAINING:
                self._read_incubation(seed)
            if seed.lives:
                self.occur(seed, EpochEnded())
        for seed in resting:
            self.occur(seed, EpochEnded())

    def apply(self, decision: Decision) -> str | None:
        """Carry out a decision.

        Returns:
            None when it was done, otherwise why it was refused.

        Raises:
            UnknownName: when no surgery operation is called like its action.
        """
        if decision.action not in self.operations:
            known = sorted(self.operations)
            raise UnknownName(
                f"no surgery operation is called {decision.action!r}; there are: {', '.join(known)}",
                kind="surgery_operations",
                name=decision.action,
                available=known,
            )
        return self.operations[decision.action](self, decision)

    def occur(self, seed: Seed, occurrence: Occurrence, probe: Probe | None = None) -> str | None:
        """Let something happen to a seed, and follow the instructions of its life to the end.

        Returns:
            Why a request was refused; None when nothing was.
        """
        refusal: str | None = None
        pending: list[Occurrence] = [occurrence]
        while pending:
            seed.life, instructions = lifecycle.advance(seed.life, pending.pop(0), self.growth)
            for instruction in instructions:
                match instruction:
                    case CheckGate(gate):
                        seed.verdict = self.gates[gate](self._evidence(seed, probe), self.settings)
                        self.emit(GateEvaluated(epoch=self.epoch, seed=seed.name, verdict=seed.verdict))
                        pending.append(GateAnswered(seed.verdict))
                    case Entered(before, after, reason):
                        self._entered(seed, before, after, reason)
                    case Refused(reason):
                        refusal = reason
        return refusal

    def close(self) -> None:
        """The budget is spent: what is still on trial is removed, because nothing proved it."""
        for seed in list(self.network.seeds()):
            if seed.lives:
                self.occur(seed, CullRequested("the budget ended before it was proven"))

    # --- what entering a stage means -------------------------------------------------------------------------------------

    def _entered(self, seed: Seed, before: Stage, after: Stage, reason: str) -> None:
        match after:
            case Stage.TRAINING:
                add_group(self.optimizer, seed.name, seed.parameters(), self.growth.learning_rate_scale)
                if self.growth.incubation == "joint":
                    self._aim(seed, self.growth.alpha_target, 0)
            case Stage.BLENDING:
                self.incubations.pop(seed.name, None)
                steps = 0 if self.growth.incubation == "joint" else self.growth.blending_epochs * self.steps_per_epoch
                self._aim(seed, self.growth.alpha_target, steps)
            case Stage.SHADOWING:
                self.windows[seed.name] = [] if self.gate_loss is None else [self.gate_loss]
            case Stage.PROBATIONARY:
                self.windows.pop(seed.name, None)
            case Stage.FOSSILIZED:
                self.outcomes.append(self._outcome(seed, reason))
            case Stage.CULLED:
                self._remove(seed, reason)
            case Stage.DORMANT:
                self.resting.pop(seed.record.slot, None)
            case _:
                pass
        self.emit(
            StageChanged(
                epoch=self.epoch,
                seed=seed.name,
                slot=seed.record.slot,
                blueprint=seed.blueprint,
                before=before,
                after=after,
                reason=reason,
            )
        )

    def _aim(self, seed: Seed, target: float, steps: int) -> None:
        seed.ramp = seed.ramp.toward(target, steps, self.growth.alpha_schedule)
        seed.alpha = seed.ramp.value(self.curve)

    def _remove(self, seed: Seed, reason: str) -> None:
        remove_group(self.optimizer, seed.name)
        self.network.remove(seed.name)
        self.incubations.pop(seed.name, None)
        self.windows.pop(seed.name, None)
        seed.alpha, seed.ramp = 0.0, Ramp()
        self.resting[seed.record.slot] = seed
        self.outcomes.append(self._outcome(seed, reason))

    def _outcome(self, seed: Seed, reason: str) -> SeedOutcome:
        return SeedOutcome(
            seed=seed.name,
            slot=seed.record.slot,
            blueprint=seed.blueprint,
            stage=seed.stage,
            reason=reason,
            contribution=seed.contribution,
            parameters=seed.parameters_added,
            flops_per_sample=seed.flops_per_sample,
            germinated_epoch=seed.epoch,
            ended_epoch=self.epoch,
        )

    # --- what is known about a seed --------------------------------------------------------------------------------------

    def _read_incubation(self, seed: Seed) -> None:
        gathered = self._incubation(seed)
        seed.gradient_ratio, _ = gathered.ratio.read()
        seed.incubation_loss = None if gathered.loss_sum is None else float(gathered.loss_sum) / gathered.passes
        gathered.loss_sum, gathered.passes = None, 0

    def _evidence(self, seed: Seed, probe: Probe | None) -> Evidence:
        gathered = self.incubations.get(seed.name)
        occupied = any(other.lives and other is not seed for other in self.network.port(seed.record.slot))
        return Evidence(
            blueprint=seed.blueprint,
            slot=seed.record.slot,
            epoch=self.epoch,
            min_gradient_ratio=self.nursery.min_gradient_ratio(seed.blueprint),
            unfit=self.nursery.unfit(seed.blueprint, seed.record),
            slot_free=not occupied and seed.record.slot not in self.resting,
            probe=probe,
            gradient_ratio=seed.gradient_ratio,
            vanished_share=gathered.ratio.read()[1] if gathered else None,
            incubation_loss=seed.incubation_loss,
            train_loss=self.train_loss,
            isolated=self.growth.incubation == "lookahead",
            alpha=seed.alpha,
            alpha_target=self.growth.alpha_target,
            alpha_at_rest=seed.ramp.at_rest,
            gate_losses=tuple(self.windows.get(seed.name, ())),
            contribution=seed.contribution,
        )

    def records(self) -> tuple[SeedRecord, ...]:
        """Every seed in the network, and every culled one whose slot still cools down."""
        seeds = [*self.network.seeds(), *(seed for seed in self.resting.values() if seed.stage in COOLDOWN_STAGES)]
        return tuple(
            SeedRecord(
                seed=seed.name,
                slot=seed.record.slot,
                blueprint=seed.blueprint,
                stage=seed.stage,
                alpha=seed.alpha,
                parameters=seed.parameters_added,
                flops_per_sample=seed.flops_per_sample,
                germinated_epoch=seed.epoch,
                epochs_in_stage=seed.life.epochs_in_stage,
                kernel=seed.kernel,
                contribution=seed.contribution,
                gradient_ratio=seed.gradient_ratio,
                verdict=seed.verdict,
                reason=seed.life.reason,
            )
            for seed in seeds
        )

    @property
    def trained_host_parameters(self) -> int:
        """Parameters of the host that receive gradients: what a gradient norm of the host is a norm over."""
        return sum(parameter.numel() for parameter in self.optimizer.param_groups[0]["params"])

    @property
    def host_parameters(self) -> int:
        """Trainable and frozen parameters of the host alone."""
        return sum(parameter.numel() for parameter in self.network.host.parameters())

    def host_learning_rate(self) -> float:
        """The host's learning rate as of the last step."""
        group = next(group for group in self.optimizer.param_groups if group["name"] == HOST_GROUP)
        return float(group["lr"])
