"""The grower: one network in training, its seeds, and what becomes of them at each decision point.

It owns no loop. A training loop calls :meth:`Grower.train_step` for each batch, and once per epoch :meth:`Grower.measure`,
:meth:`Grower.end_epoch` and :meth:`Grower.apply` with what a policy decided. Nothing structural happens anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from esperd.errors import NotTraining, UnknownName
from esperd.growth import lifecycle
from esperd.growth.alpha import Curve, Ramp
from esperd.growth.contribution import Measured, PerSample, per_sample
from esperd.growth.decision_point import decision_point
from esperd.growth.gate_pass import GatePass, is_isolated, switched_on, variants_due, without
from esperd.growth.gates import Evidence, GateCheck, Probe, thresholds
from esperd.growth.gradients import STRIDE, gradient_norms
from esperd.growth.incubation import Incubator
from esperd.growth.ledger import Ledger
from esperd.growth.lifecycle import CheckGate, CullRequested, Entered, EpochEnded, GateAnswered, Life, Occurrence, Refused
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.nursery import choose, screenings
from esperd.growth.optimizer import add_group, clip_gradients, follow_host, host_group, remove_group
from esperd.growth.precision import Precision
from esperd.growth.ranks import Alone, Ranks
from esperd.growth.records import outcome_of, record_of, screened
from esperd.growth.runner import Forward, Plain, Runner
from esperd.growth.slot_statistics import SlotWatch
from esperd.growth.source import SeedSource
from esperd.messages.growth import COOLDOWN_STAGES, SeedRecord, Stage, Verdict
from esperd.messages.jobs import Gates, Growth
from esperd.messages.policy import Decision
from esperd.messages.reports import SeedOutcome
from esperd.messages.telemetry import (
    Body,
    ContributionMeasured,
    GateEvaluated,
    ProspectMeasured,
    ScreeningEnded,
    StageChanged,
)

BEHIND_THE_HOST = ("lookahead", "frozen_input")
"""Modes of incubation in which a seed learns by passes of its own."""


class TrialBatches(Protocol):
    """Where controlled trials get their samples."""

    def train(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of the train split, without end, the same ones for the same epoch."""
        ...

    def gate(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The gate split."""
        ...


class SurgeryFunction(Protocol):
    """A surgery operation: completes, returns why it refused, or raises and leaves the network as it was."""

    def __call__(self, grower: Grower, decision: Decision) -> str | None:
        """Carry out the decision; return None, or the reason for refusing it."""
        ...


@dataclass
class Grower:
    """Grows seeds in a network while it trains.

    Args:
        network: host and slots.
        optimizer: as from :func:`esperd.growth.optimizer.build_optimizer`: its first group is the host's.
        loss: per-sample loss, (output, target) → (B,).
        metric: per-sample metric or None.
        growth: durations, the mode of incubation, the operator.
        settings: thresholds of the gates.
        gates: checks by name, G0 to G5.
        operations: surgery operations by name.
        curve: alpha schedule.
        source: makes modules.
        ledger: is charged for everything.
        emit: takes events as they happen.
        precision: of training passes.
        max_gradient_norm: gradients are clipped to it, group by group; None: never.
        runner: runs the host's own training passes.
        batches: what controlled trials train on and are judged by; None: none can be run.
        ranks: the processes that grow this network together; with several of them ``runner`` averages their gradients.
        watch: measures at the slots in the host's own passes; None: nothing does.
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
    source: SeedSource
    ledger: Ledger
    emit: Callable[[Body], None]
    precision: Precision = field(default_factory=Precision)
    max_gradient_norm: float | None = None
    runner: Runner = field(default_factory=Plain)
    batches: TrialBatches | None = None
    ranks: Ranks = field(default_factory=Alone)
    watch: SlotWatch | None = None
    epoch: int = 0
    """Epochs completed."""
    steps_per_epoch: int = 1
    resting: dict[str, Seed] = field(default_factory=dict)
    """Culled seeds whose slots cool down, by slot. Their modules are gone from the network."""
    outcomes: list[SeedOutcome] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    """Gate losses since each shadowing seed reached its target alpha."""
    screened_out: list[SeedRecord] = field(default_factory=list)
    """Candidates that lost a screening, as they ended: they leave nothing in the network. Whoever told the policy of them
    clears it."""
    gate_loss: float | None = None
    """As last measured."""
    measured_at: int | None = None
    """Epoch of that."""
    sample: tuple[torch.Tensor, torch.Tensor] | None = None
    """A batch of the train split, for probing new seeds."""
    step: int = 0
    """Optimiser steps taken."""
    pieces: int = 1
    """Parts in which the host's pass goes over a batch, to take less memory; their gradients are added up."""

    def __post_init__(self) -> None:
        self.ledger.processes = self.ranks.size
        self.incubator = Incubator(self.network, self.loss, self.ledger, self.precision, self.trained_host_parameters, self.ranks)
        self.gate_pass = GatePass(self.network, self.loss, self.metric, self.ledger, self.settings, self.ranks)

    # --- one batch -------------------------------------------------------------------------------------------------------

    def train_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One optimiser step of the host and every seed that trains.

        Args:
            inputs: (B, ...).
            targets: (B, ...).

        Returns:
            () mean loss of the batch (this rank's), detached, still on the device. While the host stands still
            (``frozen_input``) it is that of the passes with the incubating seeds at their target alpha.

        Raises:
            NotTraining: when the network is in eval mode: BatchNorm and dropout would not do what training needs.
            InvalidModel: when the loss returns anything but one value per sample.
        """
        if not self.network.training:
            raise NotTraining("train_step was called on a network in eval mode; call network.train() first")
        behind = self.incubating()
        still = bool(behind) and self.growth.incubation == "frozen_input"
        if not still:
            self._move_alphas()
        self.optimizer.zero_grad(set_to_none=True)
        if still:
            value = self._frozen_passes(behind, inputs, targets)
        else:
            with self.incubator.beside(behind, inputs, record=self.runner.records and self.pieces == 1):
                value = self._host_pass(inputs, targets)
            for seed in behind:
                self._teach(seed, inputs, targets)
        self._take_step()
        return value

    def incubating(self) -> list[Seed]:
        """Seeds that learn behind the host, by passes of their own."""
        own_passes = self.growth.incubation in BEHIND_THE_HOST
        return [seed for seed in self.network.seeds() if seed.stage is Stage.TRAINING and (own_passes or seed.screening)]

    def structure(self) -> str:
        """Which seeds take part in the host's own pass; names the structure in the ledger."""
        return ",".join(seed.name for seed in self.network.seeds() if seed.presence != "silent") or "host"

    def _move_alphas(self) -> None:
        for seed in self.network.seeds():
            if not seed.ramp.at_rest:
                seed.ramp = seed.ramp.step()
                seed.alpha = seed.ramp.value(self.curve)

    def _host_pass(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        structure = self.structure()
        shape = tuple(inputs.shape[1:])
        counted = self.ledger.cost("train", structure, shape) is None
        forward = self.runner.forward(self.network, structure, counted=counted)

        def work() -> torch.Tensor:
            with self.precision.autocast():
                value = per_sample(self.loss, forward(inputs), targets, what="loss").mean()
            self.precision.scaled(value).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            return value.detach()

        if self.pieces > 1:
            value = self._host_pieces(structure, inputs, targets, forward)
        else:
            with self._watching(counted=counted):
                value = self.ledger.charge("train", structure, len(inputs), work, shape=shape)
        for seed in self.network.seeds():
            if seed.presence == "taught":
                self.runner.taught(seed)
        return value

    def _host_pieces(self, structure: str, inputs: torch.Tensor, targets: torch.Tensor, forward: Forward) -> torch.Tensor:
        """The host's pass over one piece of a batch (B, ...) after the other: the mean loss of all, and its gradient."""
        total = torch.zeros((), device=inputs.device)
        for part, wanted in zip(inputs.chunk(self.pieces), targets.chunk(self.pieces), strict=True):

            def work(part: torch.Tensor = part, wanted: torch.Tensor = wanted) -> torch.Tensor:
                with self.precision.autocast():
                    value = per_sample(self.loss, forward(part), wanted, what="loss").sum() / len(inputs)
                self.precision.scaled(value).backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
                return value.detach()

            total = total + self.ledger.charge("train", structure, len(part), work, shape=tuple(part.shape[1:]))
        return total

    def _watching(self, *, counted: bool) -> AbstractContextManager[None]:
        """The slots are measured in every so many passes: those that run as they do otherwise, and can be looked into."""
        if self.watch is None or counted or not self.runner.records or not self.watch.due(self.step):
            return nullcontext()
        return self.watch.watching(self.precision)

    def _frozen_passes(self, seeds: list[Seed], inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self.incubator.beside(seeds, inputs, record=False):
            pass  # the host makes no pass of its own to start from
        return torch.stack([self._teach(seed, inputs, targets) for seed in seeds]).mean()

    def _teach(self, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = self.incubator.teach(seed, self.structure(), inputs, targets)
        self.runner.taught(seed)
        return value

    def _take_step(self) -> None:
        training = [seed for seed in self.network.seeds() if seed.stage is Stage.TRAINING]
        isolated = [seed for seed in training if is_isolated(seed, self.growth)]
        due = self._due_for_sampling()
        overflowed = self.precision.overflowed(parameter for seed in due for parameter in seed.parameters())
        self.precision.unscale(self.optimizer, (parameter for seed in isolated for parameter in seed.parameters()))
        if due:
            self.incubator.sample_gradients(due, gradient_norms(host_group(self.optimizer)["params"]), overflowed)
        if self.max_gradient_norm is not None:
            clip_gradients(self.optimizer, self.max_gradient_norm)
        follow_host(self.optimizer, self.step)
        self.precision.step(self.optimizer)
        self.step += 1

    def _due_for_sampling(self) -> list[Seed]:
        """Every so many steps of a seed's own: what stands before its zero-initialised layer has no gradient in its first
        ones.
        """
        ages = {group["name"]: self.step - group["born"] for group in self.optimizer.param_groups}
        return [seed for seed in self.network.seeds() if seed.stage is Stage.TRAINING and ages[seed.name] % STRIDE == STRIDE - 1]

    # --- one decision point ----------------------------------------------------------------------------------------------

    def measure(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Measured:
        """Pass over the gate split: the network as it is, without each probationary seed, and with each one that G2 is about
        to judge.

        Args:
            batches: all of the gate split; of several ranks each measures a part of it, and all get what was found.

        Raises:
            InvalidModel: when loss or metric return anything but one value per sample.
            TrainingDiverged: when the gate loss is not finite.
            RanksDisagree: ranks came here from different standings, or left it with different ones.
            RankFailed: another rank raised, or is not heard of.
        """
        with decision_point(self, "the gate pass"):
            seeds = {seed.name: seed for seed in self.network.seeds()}
            due = variants_due(seeds.values(), self.growth)
            measured = self.gate_pass.run(batches, self.structure(), due, self.epoch)
            self.gate_loss, self.measured_at = self.ranks.first("the gate loss", measured.mean_loss), self.epoch
            for seed in seeds.values():
                if without(seed) in due:
                    found = self.gate_pass.contribution(measured, without(seed), self.epoch)
                    seed.contribution = self.ranks.first(f"the contribution of {seed.name}", found)
                    self.emit(ContributionMeasured(epoch=self.epoch, seed=seed.name, contribution=seed.contribution))
                if switched_on(seed) in due:
                    found = self.gate_pass.prospect(measured, switched_on(seed), self.epoch)
                    seed.prospect = self.ranks.first(f"the prospect of {seed.name}", found)
                    self.emit(ProspectMeasured(epoch=self.epoch, seed=seed.name, prospect=seed.prospect))
        return measured

    def end_epoch(self) -> None:
        """Move every seed on: stays are counted, gates that are due are asked, slots cool down.

        Raises:
            RanksDisagree: a gate said different things on different ranks, or they came here from different standings.
            RankFailed: another rank raised, or is not heard of.
        """
        with decision_point(self, "the end of the epoch"):
            self._move_on()

    def _move_on(self) -> None:
        still = self.growth.incubation == "frozen_input" and bool(self.incubating())
        resting = list(self.resting.values())  # before any is culled now: that one's rest begins with the next epoch
        for seed in list(self.network.seeds()):
            if still and seed.lives and seed.stage is not Stage.TRAINING:
                continue  # the network stood still: for a seed that it hears, no time has passed
            if seed.name in self.windows and (loss := self._gate_loss_now()) is not None:
                self.windows[seed.name].append(loss)
            if seed.stage is Stage.TRAINING:
                self.incubator.end_epoch(seed)
            if seed.screening:
                seed.life = replace(seed.life, epochs_in_stage=seed.life.epochs_in_stage + 1)
            elif seed.lives:
                self.occur(seed, EpochEnded())
        for seed in resting:
            self.occur(seed, EpochEnded())
        self._end_screenings()

    def _gate_loss_now(self) -> float | None:
        """The gate loss where it was measured at this decision point: an older one says nothing about it."""
        return self.gate_loss if self.measured_at == self.epoch else None

    def _end_screenings(self) -> None:
        loss = self._gate_loss_now()
        for name, candidates in screenings(self.network.seeds()).items():
            if min(seed.life.epochs_in_stage for seed in candidates) < self.growth.screening_epochs or loss is None:
                continue
            choice = choose(candidates, gate_loss=loss, largest_rise=self.settings.max_loss_drift)
            winner = None if choice.winner is None else choice.winner.name
            told = tuple(screened(seed) for seed in candidates)
            self.emit(ScreeningEnded(epoch=self.epoch, screening=name, winner=winner, candidates=told))
            for seed, reason in choice.losers:
                self.occur(seed, CullRequested(reason))
                self.screened_out.append(record_of(seed))
            if choice.winner is not None:
                self._go_on(choice.winner)

    def _go_on(self, winner: Seed) -> None:
        """The winner of a screening begins to incubate as any seed does, with what it has learned."""
        winner.screening = ""
        winner.life = Life(stage=Stage.TRAINING)
        self.incubator.gathered.pop(winner.name, None)
        self._incubate(winner)

    def apply(self, decision: Decision) -> str | None:
        """Carry out a decision.

        Returns:
            None when it was done, otherwise why it was refused.

        Raises:
            UnknownName: when no surgery operation is called like its action.
            RanksDisagree: ranks were given different decisions, a gate said different things on them, or the decision left
                different networks behind.
            RankFailed: another rank raised, or is not heard of.
        """
        with decision_point(self, f"the decision to {decision.action}"):
            self.ranks.agree("the decision", decision)
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
                        seed.verdict = self._verdict(gate, seed, probe)
                        self.emit(GateEvaluated(epoch=self.epoch, seed=seed.name, verdict=seed.verdict))
                        pending.append(GateAnswered(seed.verdict))
                    case Entered(before, after, reason):
                        self._entered(seed, before, after, reason)
                    case Refused(reason):
                        refusal = reason
        return refusal

    def close(self) -> None:
        """The budget is spent: what is still on trial is removed, because nothing proved it.

        Raises:
            RanksDisagree: ranks came here from different standings.
            RankFailed: another rank raised, or is not heard of.
        """
        with decision_point(self, "the end of growth"):
            for seed in list(self.network.seeds()):
                if seed.lives:
                    self.occur(seed, CullRequested("the budget ended before it was proven"))

    # --- what entering a stage means -------------------------------------------------------------------------------------

    def _entered(self, seed: Seed, before: Stage, after: Stage, reason: str) -> None:
        match after:
            case Stage.TRAINING:
                self._begin_training(seed)
            case Stage.BLENDING:
                self._begin_blending(seed, before)
            case Stage.SHADOWING:
                loss = self._gate_loss_now()
                self.windows[seed.name] = [] if loss is None else [loss]
            case Stage.PROBATIONARY:
                self.windows.pop(seed.name, None)
            case Stage.FOSSILIZED:
                self.outcomes.append(outcome_of(seed, reason, self.epoch))
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

    def _begin_training(self, seed: Seed) -> None:
        warmup = round(self.growth.warmup_epochs * self.steps_per_epoch)
        scale = self.growth.learning_rate_scale
        add_group(self.optimizer, seed.name, seed.parameters(), scale, born=self.step, warmup=warmup)
        if not seed.screening:
            self._incubate(seed)

    def _incubate(self, seed: Seed) -> None:
        if self.growth.incubation == "joint":
            self._isolate(seed)
            self._aim(seed, 0)
        elif self.growth.incubation == "straight_through":
            seed.presence = "taught"

    def _begin_blending(self, seed: Seed, before: Stage) -> None:
        self.incubator.gathered.pop(seed.name, None)
        self._isolate(seed)
        if seed.life.leaving:  # a seed on its way out learns nothing more: the host learns to be without it
            remove_group(self.optimizer, seed.name)
        from_start = self.growth.incubation == "joint" and before is Stage.TRAINING
        self._aim(seed, 0 if from_start else self.growth.blending_epochs * self.steps_per_epoch)

    def _isolate(self, seed: Seed) -> None:
        """From here on the host hears the seed; whether it also adapts to it is the job's to say."""
        seed.isolated = not getattr(self.growth.co_adaptation, seed.record.topology)

    def _aim(self, seed: Seed, steps: int) -> None:
        seed.ramp = seed.ramp.toward(seed.alpha_target, steps, self.growth.alpha_schedule)
        seed.alpha = seed.ramp.value(self.curve)

    def _remove(self, seed: Seed, reason: str) -> None:
        remove_group(self.optimizer, seed.name)
        self.network.remove(seed.name)
        self.incubator.gathered.pop(seed.name, None)
        self.windows.pop(seed.name, None)
        seed.alpha, seed.ramp = 0.0, Ramp()
        if not seed.screening:  # of a screening nothing was heard: there is nothing to rest from
            self.resting[seed.record.slot] = seed
        self.outcomes.append(outcome_of(seed, reason, self.epoch))

    # --- what is known about a seed --------------------------------------------------------------------------------------

    def _verdict(self, gate: str, seed: Seed, probe: Probe | None) -> Verdict:
        """One verdict for all ranks, on the evidence of rank 0: what each of them measured may differ in its last bits."""
        what = f"gate {gate} of {seed.name}"
        evidence = self.ranks.first(f"the evidence for {what}", self._evidence(seed, probe))
        verdict = self.gates[gate](evidence, self._thresholds(seed))
        self.ranks.agree(what, verdict)
        return verdict

    def _thresholds(self, seed: Seed) -> Gates:
        declared = self.source.min_gradient_ratio(seed.blueprint)
        return thresholds(self.settings, seed.record.topology, seed.blueprint, declared)

    def _evidence(self, seed: Seed, probe: Probe | None) -> Evidence:
        others = [other for other in self.network.port(seed.record.slot) if other.lives and other is not seed]
        occupied = any(not seed.screening or other.screening != seed.screening for other in others)
        health = self.incubator.health(seed)
        return Evidence(
            blueprint=seed.blueprint,
            slot=seed.record.slot,
            epoch=self.epoch,
            unfit=self.source.unfit(seed.blueprint, seed.record),
            slot_free=not occupied and seed.record.slot not in self.resting,
            probe=probe,
            gradient_ratio=health.ratio,
            vanished_share=health.vanished_share,
            exploded_share=health.exploded_share,
            host_learns=self.growth.incubation != "frozen_input",
            isolated=is_isolated(seed, self.growth),
            prospect=seed.prospect,
            gate_loss=self._gate_loss_now(),
            alpha=seed.alpha,
            alpha_target=seed.alpha_target,
            alpha_at_rest=seed.ramp.at_rest,
            gate_losses=tuple(self.windows.get(seed.name, ())),
            contribution=seed.contribution,
            trial=seed.trial,
        )

    def records(self) -> tuple[SeedRecord, ...]:
        """Every seed in the network, and every culled one whose slot still cools down."""
        seeds = [*self.network.seeds(), *(seed for seed in self.resting.values() if seed.stage in COOLDOWN_STAGES)]
        return tuple(record_of(seed) for seed in seeds)

    @property
    def trained_host_parameters(self) -> int:
        """Parameters of the host that receive gradients: what a gradient norm of the host is a norm over."""
        return sum(parameter.numel() for parameter in host_group(self.optimizer)["params"])

    @property
    def host_parameters(self) -> int:
        """Trainable and frozen parameters of the host alone."""
        return sum(parameter.numel() for parameter in self.network.host.parameters())

    def host_learning_rate(self) -> float:
        """The host's learning rate as of the last step."""
        return float(host_group(self.optimizer)["lr"])
