"""A strategy that is asked in this process as the daemon asks it, with what it wants to measure first; shared by benches."""

from __future__ import annotations

from dataclasses import dataclass, field

import lab

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.builtins.strategies import STRATEGIES
from esperd.builtins.triggers import TRIGGERS
from esperd.declarations import resolve
from esperd.growth import Grower
from esperd.growth.contribution import Measured
from esperd.growth.lifecycle import shortest_life
from esperd.growth.slot_statistics import SlotWatch
from esperd.messages.policy import (
    Arm,
    ArmMerit,
    ArmOption,
    ArmTrial,
    Decide,
    Decided,
    Observation,
    PolicySettings,
    SlotStatistics,
)
from esperd.policy.trigger import with_signal
from esperd.trainer.scouting import MOST_ROUNDS, SCOUTING, Scout

OF_TRAIN_LOSSES, OF_SLOTS = "generalisation_gap", "gradient_bottleneck"
"""Triggers that read more than gate losses and the epoch."""
TRIGGERED = {trigger.name: trigger.fires for trigger in TRIGGERS}
DECIDE = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}


@dataclass
class Deciding:
    """Asks a strategy after every epoch, and does what it says.

    Args:
        settings: of the policy; names the strategy.
        rng_seed: of the run.
        flops: budget of the run.
        samples: of the train split.
        blueprints: what may be grown; empty: every built-in one.
        most_parameters: of the grown network; None: as many as it likes.
    """

    settings: PolicySettings
    rng_seed: int
    flops: float
    samples: int
    blueprints: tuple[str, ...] = ()
    most_parameters: int | None = None
    state: bytes = b""
    points: int = 0
    gate_losses: list[float] = field(default_factory=list)
    """One more than there are of the train split, where it is asked before the first epoch."""
    train_losses: list[float] = field(default_factory=list)
    """Of every epoch, by who trains."""
    said: list[str] = field(default_factory=list)
    """What was decided, in words."""
    slots: tuple[SlotStatistics, ...] = ()
    """Measured since the last decision point."""
    gate_flops: list[float] = field(default_factory=list)
    """Spent when each gate loss was measured."""
    trial_flops: list[float] = field(default_factory=list)
    """Those of them that went into copies of the network."""

    def __call__(self, grower: Grower, measured: Measured) -> None:
        """One decision point."""
        self.gate_losses.append(measured.mean_loss)
        self.gate_flops.append(grower.ledger.total)
        self.trial_flops.append(grower.ledger.spent["trial"])
        if grower.watch is None and self.settings.trigger == OF_SLOTS:
            grower.watch = SlotWatch(grower.network)
        self.slots = grower.watch.read(grower.step) if grower.watch else ()
        scout: Scout | None = None
        for _ in range(MOST_ROUNDS):
            decided = self.ask(grower, measured, scout)
            asked = [decision for decision in decided.decisions if decision.action in SCOUTING]
            for decision in decided.decisions:
                if decision.action == "wait" or decision.action in SCOUTING:
                    continue
                refusal = grower.apply(decision)
                told = f"{decision.arm.blueprint} at {decision.arm.slot}" if decision.arm else decision.seed
                self.said.append(f"epoch {grower.epoch}: {decision.action} {told}{f' (refused: {refusal})' if refusal else ''}")
            if not asked:
                return
            assert grower.batches is not None
            scout = Scout(grower, grower.batches)
            scout.measure(asked)

    def ask(self, grower: Grower, measured: Measured, scout: Scout | None) -> Decided:
        """The strategy's answer."""
        self.points += 1
        seen = self._observe(grower, measured, tuple(scout.merits) if scout else (), tuple(scout.trials) if scout else ())
        request = Decide(
            job="bench",
            point=self.points,
            rng_seed=self.rng_seed,
            settings=self.settings,
            observation=seen,
            state=self.state,
        )
        decided = DECIDE[self.settings.strategy](with_signal(request, TRIGGERED[self.settings.trigger]))
        self.state = decided.state
        return decided

    def _observe(
        self, grower: Grower, measured: Measured, merits: tuple[ArmMerit, ...], trials: tuple[ArmTrial, ...]
    ) -> Observation:
        host = grower.ledger.cost("gate", "host") or 0.0
        gate = (grower.ledger.cost("gate", grower.structure()) or host) * len(measured.loss)
        epoch_flops = (grower.ledger.cost("train", grower.structure()) or 3 * host) * self.samples
        losses = self.gate_losses
        if self.settings.trigger == OF_TRAIN_LOSSES:  # it reads pairs
            losses = losses[len(losses) - len(self.train_losses) :]
        left = max(0.0, (self.flops - grower.ledger.total) / epoch_flops)
        return Observation(
            epoch=grower.epoch,
            progress=grower.ledger.total / self.flops,
            epochs_left=left,
            epochs_left_by_cost=left,
            shortest_life_epochs=shortest_life(grower.growth, screened=self.settings.nursery > 1),
            train_loss=measured.mean_loss,
            gate_loss=measured.mean_loss,
            gate_metric=measured.mean_metric,
            gate_losses=tuple(losses),
            train_losses=tuple(self.train_losses),
            gate_flops=tuple(self.gate_flops),
            trial_flops=tuple(self.trial_flops),
            slot_statistics=self.slots,
            host_parameters=grower.host_parameters,
            host_flops_per_sample=host,
            seeds=grower.records(),
            slots=grower.network.slots,
            steps_per_epoch=grower.steps_per_epoch,
            gate_pass_epochs=gate / epoch_flops,
            options=tuple(options(grower, self.blueprints, self.most_parameters)),
            merits=merits,
            trials=trials,
        )


def options(grower: Grower, blueprints: tuple[str, ...] = (), most_parameters: int | None = None) -> list[ArmOption]:
    """Every arm of a grower with its price.

    Args:
        grower: with slots.
        blueprints: names; empty: every built-in one that fits.
        most_parameters: of the grown network.
    """
    found = []
    for slot in grower.network.slots:
        taken = any(seed.lives for seed in grower.network.port(slot.slot)) or slot.slot in grower.resting
        for blueprint in BLUEPRINTS:
            if blueprint.topology != slot.topology or (blueprints and blueprint.name not in blueprints):
                continue
            parameters = blueprint.parameters(slot.shape)
            total = grower.network.effective_parameters + parameters
            why_not = "the slot is taken or rests" if taken else ""
            if most_parameters is not None and total > most_parameters:
                why_not = why_not or f"{total} parameters would exceed {most_parameters}"
            found.append(
                ArmOption(
                    arm=Arm(slot=slot.slot, blueprint=blueprint.name),
                    parameters=parameters,
                    flops_per_sample=blueprint.flops(slot.shape),
                    available=not why_not,
                    why_not=why_not,
                )
            )
    return found


def standing(data: lab.Data, grower: Grower, batch_size: int) -> tuple[Measured, float]:
    """Ready to decide before the first step: measured, with a batch to probe with, nothing spent yet.

    Returns:
        The gate pass, and the FLOPs of one epoch of the host.
    """
    grower.sample = next(iter(lab.batches(data.train, batch_size, 77)))
    measured = grower.measure(lab.in_order(data.gate))
    host_epoch = 3 * (grower.ledger.cost("gate", "host") or 0.0) * data.epoch_samples
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    grower.network.train()
    return measured, host_epoch
