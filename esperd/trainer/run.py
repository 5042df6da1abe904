"""One training run: a network, its budget, and the loop *train an epoch → observe → decide → check → apply → record*."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
import structlog
import torch

from esperd import tracing
from esperd.errors import TrainingDiverged
from esperd.growth.contribution import Measured, measure
from esperd.growth.grower import Grower
from esperd.growth.lifecycle import shortest_life
from esperd.growth.optimizer import set_learning_rate
from esperd.growth.rollback import Snapshot
from esperd.growth.slot_statistics import SlotWatch
from esperd.growth.snapshot import Rebuild, restore, take, vacate
from esperd.messages.jobs import Budget, Job
from esperd.messages.policy import Observation, SlotStatistics
from esperd.messages.reports import Metrics, RefusedArm
from esperd.messages.telemetry import Body, EpochCompleted
from esperd.plugins import Plugins
from esperd.trainer import budget as budgets
from esperd.trainer.budget import Schedule
from esperd.trainer.checkpoint import RunState, restore_rng
from esperd.trainer.data import Splits, epoch_order
from esperd.trainer.decision_points import DecisionPoints
from esperd.trainer.desk import Desk
from esperd.trainer.epoch_cost import gate_cost, training_cost
from esperd.trainer.guard import Guard, WentBack
from esperd.trainer.headroom import headroom
from esperd.trainer.kernel_source import KernelSource
from esperd.trainer.passes import Stopped, TrialSamples, batches_of, evaluation_batch
from esperd.trainer.point import Point
from esperd.trainer.stopwatch import ArmSeconds
from esperd.trainer.unavailable import UnavailableArm, UnavailableArms

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a run stands, beside its grower."""

    batch: int
    loss_sum: torch.Tensor | None
    loss_samples: int
    gate_losses: tuple[float, ...]
    train_losses: tuple[float, ...]
    gate_flops: tuple[float, ...]
    trial_flops: tuple[float, ...]
    policy_state: bytes
    heard: int | None
    refused: tuple[RefusedArm, ...]
    unavailable: tuple[UnavailableArm, ...]


@dataclass
class Run:
    """One network on its way through its budget.

    Args:
        phase: ``growth``, or ``control`` for the host alone.
        job: what was asked for.
        budget: what this run may spend; the control's differs from the job's.
        grower: network, optimiser, seeds.
        splits: train, gate, audit.
        desk: the daemon.
        source: makes seeds, knows which arms exist.
        plugins: blueprints and strategies.
        schedule: share of the budget that is spent → learning rate as a share of the first.
        device: where tensors live.
        events: takes events as they happen.
        epoch_ended: called after each epoch, with the run between two epochs.
        step_ended: called after each step, with the run in the middle of an epoch.
        chance_loss: loss of the best constant answer; None when there is no such number.
        traced_flops: forward FLOPs of the host for one sample as they were counted before training: what a run that never came
            to its first gate pass is measured with.
        pieces: parts in which each batch is trained, and the gate split is read in smaller ones.
        clock: seconds, monotonic.
    """

    phase: str
    job: Job
    budget: Budget
    grower: Grower
    splits: Splits
    desk: Desk
    source: KernelSource
    plugins: Plugins
    schedule: Schedule
    device: torch.device
    events: list[Body]
    epoch_ended: Callable[[Run], None]
    step_ended: Callable[[Run], None] = lambda _run: None
    pieces: int = 1
    clock: Callable[[], float] = time.monotonic
    batch: int = 0
    loss_sum: torch.Tensor | None = None
    loss_samples: int = 0
    seconds_before: float = 0.0
    gate_losses: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    gate_flops: list[float] = field(default_factory=list)
    """FLOPs spent when each gate loss was measured."""
    trial_flops: list[float] = field(default_factory=list)
    """Those of them that went into networks nobody trains on."""
    look: list[torch.Tensor] = field(default_factory=list)
    """Losses of the steps since the governor was last shown any."""
    chance_loss: float | None = None
    traced_flops: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._ended: float | None = None
        self._point: Point | None = None
        self._left_point = False
        self._epoch_seconds: float | None = None
        self.grower.steps_per_epoch = self.steps_per_epoch
        self.grower.pieces = self.pieces
        self.samples = TrialSamples(self.splits, self.job, self.device, self.desk)
        self.grower.batches = self.samples
        if self.grows:
            self.grower.watch = SlotWatch(self.grower.network)
        self.points = DecisionPoints(
            job=self.job,
            grower=self.grower,
            desk=self.desk,
            source=self.source,
            plugins=self.plugins,
            samples=self.samples,
            budget=self.budget,
            events=self.events,
        )
        if self.grows:
            self.points.refuse_broken()
        self.guard: Guard[Cursor] = Guard(self.job.governor, self.chance_loss, self.grower, self.events.append)

    # --- where it stands -------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the train split; the last one may be smaller."""
        return -(-self.splits.train.samples // self.job.batch_size)

    @property
    def seconds(self) -> float:
        """Seconds spent in this run, earlier attempts counted in. They end when the budget is spent: what is measured then is no
        training.
        """
        now = self.clock() if self._ended is None else self._ended
        return self.seconds_before + now - self._started

    @property
    def grows(self) -> bool:
        """Whether seeds may be grown in this run."""
        return self.phase == "growth" and self.job.growth.enabled

    def spent(self) -> budgets.Spent:
        """What is gone of the budget. The host's gate pass that ends an epoch is set aside from its beginning: it will be run."""
        gate_pass = self.host_flops_per_sample * self.splits.gate.samples
        return budgets.Spent(
            steps=self.grower.step,
            steps_per_epoch=self.steps_per_epoch,
            flops=self.grower.ledger.total + gate_pass,
            seconds=self.seconds,
        )

    @property
    def progress(self) -> float:
        """Share of the budget that is gone."""
        return budgets.progress(self.budget, self.spent())

    # --- the loop --------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train until the budget is spent.

        Raises:
            Stopped: when the daemon asked for it; the run stands after a whole step.
            TrainingDiverged: when the governor has nothing left to try.
        """
        if self.guard.snapshot is None:
            # A checkpoint that holds no point was written at it: nothing has happened since.
            self.guard.stand(self._cursor(), resumed=self.guard.watch.point is not None)
            self._describe_point()
        while self.batch > 0 or self.progress < 1.0:  # an epoch that was begun is brought to its decision point
            try:
                with tracing.span("trainer epoch", epoch=self.grower.epoch + 1, phase=self.phase):
                    self._one_epoch()
            except WentBack as went:
                self._go_on_from_cursor(went.cursor)
        self.points.conclude()
        self.grower.close()
        self._ended = self.clock()

    def _one_epoch(self) -> None:
        began, step = self.seconds, self.grower.step
        with tracing.span("trainer train"):
            train_loss = self._train_epoch()
        trained = self.seconds - began
        with tracing.span("trainer gate"):
            measured = self._measure()
        # a resumed run may train but the rest of its first epoch
        self._epoch_seconds = self.seconds - began + trained * (self.steps_per_epoch / max(self.grower.step - step, 1) - 1.0)
        self.gate_losses.append(measured.mean_loss)
        heard = self._heard()
        self.train_losses.append(train_loss)
        self.gate_flops.append(self.grower.ledger.total)
        self.trial_flops.append(self.grower.ledger.spent["trial"])
        self.grower.end_epoch()
        if self.grows:
            with tracing.span("trainer decide"):
                self._decide(train_loss, measured)
        if heard - self._heard():
            self.guard.seed_lost()
        snapshot = self.guard.snapshot
        self.guard.decided(self._cursor)
        if self.guard.snapshot is not snapshot:
            self._describe_point()
        self._record(train_loss, measured, self.seconds - began)
        self.epoch_ended(self)

    def _heard(self) -> set[str]:
        """Seeds whose output enters the network."""
        return {seed.name for seed in self.grower.network.seeds() if seed.presence != "silent"}

    def _measure(self) -> Measured:
        """Read the gate split, and show the governor what it says."""
        try:
            measured = self.grower.measure(self._gate())
        except TrainingDiverged:  # the governor says what is to be done about it
            self.guard.gate(math.nan)
            raise
        self.guard.gate(measured.mean_loss)
        return measured

    def _train_epoch(self) -> float:
        """One pass over what is left of this epoch; returns its mean loss."""
        self.grower.network.train()
        order = epoch_order(self.job.rng_seed, self.grower.epoch, self.splits.train.samples)
        batches = torch.split(order, self.job.batch_size)
        for index in range(self.batch, len(batches)):
            why = self.desk.stop_requested()
            if why is not None:
                raise Stopped(why)
            share = self.progress
            if share >= 1.0 and self.batch > 0:
                break
            rate = self.job.optimizer.learning_rate * self.schedule(share) * self.guard.watch.rate_scale
            set_learning_rate(self.grower.optimizer, rate, self.grower.step)
            inputs, targets = (part.to(self.device) for part in self.splits.train.batch(batches[index]))
            if self.grower.sample is None:
                self.grower.sample = (inputs, targets)
            with tracing.step_span("trainer step"):
                loss = self.grower.train_step(inputs, targets)
            self.loss_sum = loss * len(inputs) if self.loss_sum is None else self.loss_sum + loss * len(inputs)
            self.loss_samples += len(inputs)
            self.batch = index + 1
            self._left_point = True
            self.look.append(loss)
            if len(self.look) >= self.job.governor.steps:
                self._look()
            self.desk.progressed(self.grower.step)
            if self.batch < len(batches):
                self.step_ended(self)
        self._look()
        mean = float(self.loss_sum) / self.loss_samples if self.loss_sum is not None else float("nan")
        self.batch, self.loss_sum, self.loss_samples = 0, None, 0
        self.grower.epoch += 1
        return mean

    def _look(self) -> None:
        """Show the governor the latest steps: here the device is waited for."""
        losses, self.look = self.look, []
        if losses:
            self.guard.steps(float(torch.stack(losses).mean()), len(losses))

    @property
    def _evaluation_batch(self) -> int:
        return max(evaluation_batch(self.splits, self.job) // self.pieces, 1)

    def _gate(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield from batches_of(self.splits.gate, self.device, self._evaluation_batch)

    # --- decisions -------------------------------------------------------------------------------------------------------

    def _decide(self, train_loss: float, measured: Measured) -> None:
        watch = self.grower.watch
        statistics = () if watch is None else watch.read(self.grower.step)  # once: reading begins anew

        def observe(points: DecisionPoints) -> Observation:
            seen = self._observe(points, train_loss, measured, statistics)
            self.guard.told.clear()
            return seen

        self.points.decide(observe)

    def _gate_pass_epochs(self, epoch_flops: float | None) -> float | None:
        cost = gate_cost(self.grower)
        return None if cost is None or not epoch_flops else cost * self.splits.gate.samples / epoch_flops

    def _observe(
        self, points: DecisionPoints, train_loss: float, measured: Measured, statistics: tuple[SlotStatistics, ...]
    ) -> Observation:
        grower = self.grower
        cost = training_cost(grower)
        epoch_flops = None if cost is None else cost * self.splits.train.samples
        spent, epoch_seconds = self.spent(), self._epoch_seconds
        return Observation(
            epoch=grower.epoch,
            progress=self.progress,
            epochs_left=budgets.epochs_left(self.budget, spent, epoch_flops=epoch_flops, epoch_seconds=epoch_seconds),
            epochs_left_by_cost=budgets.epochs_left_by_cost(
                self.budget, spent, epoch_flops=epoch_flops, epoch_seconds=epoch_seconds
            ),
            shortest_life_epochs=shortest_life(self.job.growth, screened=self.job.policy.nursery > 1),
            train_loss=train_loss,
            gate_loss=measured.mean_loss,
            gate_metric=measured.mean_metric,
            gate_losses=tuple(self.gate_losses),
            host_parameters=grower.host_parameters,
            host_flops_per_sample=self.host_flops_per_sample,
            seeds=grower.records(),
            screened_out=tuple(grower.screened_out),
            slots=grower.network.slots,
            options=tuple(points.offers.options(points.unavailable)),
            unavailable=points.unavailable.arms(),
            merits=tuple(points.scout.merits) if points.scout else (),
            trials=tuple(points.scout.trials) if points.scout else (),
            train_losses=tuple(self.train_losses),
            steps_per_epoch=self.steps_per_epoch,
            gate_pass_epochs=self._gate_pass_epochs(epoch_flops),
            gate_flops=tuple(self.gate_flops),
            trial_flops=tuple(self.trial_flops),
            slot_statistics=statistics,
            headroom=headroom(self.device),
            rolled_back=tuple(self.guard.told),
        )

    @property
    def host_flops_per_sample(self) -> float:
        """Forward FLOPs of the host alone, for one sample; counted in the first gate pass."""
        return self.grower.ledger.cost("gate", "host") or 0.0

    # --- what is left behind ---------------------------------------------------------------------------------------------

    def _record(self, train_loss: float, measured: Measured, seconds: float) -> None:
        grower = self.grower
        self.events.append(
            EpochCompleted(
                epoch=grower.epoch,
                phase=self.phase,
                train_loss=train_loss,
                gate_loss=measured.mean_loss,
                gate_metric=measured.mean_metric,
                learning_rate=grower.host_learning_rate(),
                parameters=grower.network.effective_parameters,
                flops_per_sample=self.flops_per_sample(),
                training_flops=grower.ledger.total,
                progress=min(self.progress, 1.0),
                seconds=seconds,
                seeds=grower.records() if self.grows else (),
            )
        )

    def flops_per_sample(self) -> float:
        """Forward FLOPs of the network as it is: host and every seed with alpha above 0."""
        seeds = (seed.flops_per_sample for seed in self.grower.network.seeds() if seed.alpha > 0.0)
        host = self.grower.ledger.cost("gate", "host")
        return (self.traced_flops if host is None else host) + sum(seeds)

    def audit(self) -> tuple[Measured, Metrics]:
        """Read the audit split. To be called once, when nothing will be decided any more."""
        seconds = self.seconds
        measured = measure(
            self.grower.network,
            batches_of(self.splits.audit, self.device, self._evaluation_batch),
            self.grower.loss,
            self.grower.metric,
        )
        if not torch.isfinite(measured.loss).all():
            raise TrainingDiverged(f"the audit loss is {measured.mean_loss}; lower optimizer.learning_rate")
        metrics = Metrics(
            loss=measured.mean_loss,
            metric=measured.mean_metric,
            parameters=self.grower.network.effective_parameters,
            flops_per_sample=self.flops_per_sample(),
            training_flops=self.grower.ledger.total,
            training_seconds=seconds,
            epochs=self.grower.step / self.steps_per_epoch,
        )
        return measured, metrics

    # --- between two attempts --------------------------------------------------------------------------------------------

    def state(self) -> tuple[RunState, dict[str, torch.Tensor]]:
        """Everything needed to go on: state and tensors."""
        grower, tensors = take(self.grower)
        if self.loss_sum is not None:
            tensors["run.loss_sum"] = self.loss_sum
        if self.grower.watch is not None and (norms := self.grower.watch.norms()):
            tensors["run.slot_norms"] = torch.tensor(norms, dtype=torch.float64)
        if self.grower.sample is not None:
            tensors["run.sample_inputs"], tensors["run.sample_targets"] = self.grower.sample
        state = RunState(
            phase="growth" if self.phase == "growth" else "control",
            grower=grower,
            batch=self.batch,
            loss_samples=self.loss_samples,
            seconds=self.seconds,
            gate_losses=tuple(self.gate_losses),
            train_losses=tuple(self.train_losses),
            gate_flops=tuple(self.gate_flops),
            trial_flops=tuple(self.trial_flops),
            seconds_shares=tuple(
                ArmSeconds(arm=arm, share=share) for arm, share in sorted(self.points.offers.seconds_shares.items())
            ),
            policy_state=self.points.policy_state,
            heard=self.points.heard,
            refused=tuple(self.points.refused),
            policy_unavailable=self.points.policy_unavailable,
            unavailable=self.points.unavailable.entries(),
            watch=self.guard.watch,
            decision_points=self.points.asked,
            rolled_back=tuple(self.guard.told),
            look=len(self.look),
            evidence=self.points.evidence,
            slot_bytes=() if self.grower.watch is None else self.grower.watch.sample_bytes(),
        )
        if self.look:
            tensors["run.look"] = torch.stack(self.look)
        if self._point is not None and self._left_point:
            state = msgspec.structs.replace(state, point=self._point.state)
            tensors |= self._point.named()
        return state, tensors

    def go_on_from(self, state: RunState, tensors: dict[str, torch.Tensor], rebuild: Rebuild) -> None:
        """Stand where a saved run stood, with the same point to go back to. The random streams are where the point had them then.

        Raises:
            CheckpointRejected: when it was taken of another network.
        """
        if state.point is not None:
            point = Point.among(state.point, tensors)
            self._stand_where(point.state, point.tensors, rebuild)
            restore_rng(point.streams)
            self.guard.snapshot = Snapshot.take(self.grower, self._cursor())
            self._point, self._left_point = point, True
            vacate(self.grower)
        self._stand_where(state, tensors, rebuild)

    def _stand_where(self, state: RunState, tensors: dict[str, torch.Tensor], rebuild: Rebuild) -> None:
        moved = {name: tensor.to(self.device) if _lives_with_the_model(name) else tensor for name, tensor in tensors.items()}
        restore(self.grower, state.grower, moved, rebuild)
        self.batch, self.loss_samples = state.batch, state.loss_samples
        self.loss_sum = moved.get("run.loss_sum")
        if "run.sample_inputs" in moved:
            self.grower.sample = (moved["run.sample_inputs"], moved["run.sample_targets"])
        self.seconds_before = state.seconds
        self._started = self.clock()
        self.gate_losses = list(state.gate_losses)
        self.train_losses, self.gate_flops = list(state.train_losses), list(state.gate_flops)
        self.trial_flops = list(state.trial_flops)
        self.points.offers.seconds_shares = {known.arm: known.share for known in state.seconds_shares}
        if self.grower.watch is not None:
            norms = tensors["run.slot_norms"].tolist() if "run.slot_norms" in tensors else None
            self.grower.watch.begin(self.grower.step - self.batch, norms, state.slot_bytes)
        self.points.policy_state, self.points.heard = state.policy_state, state.heard
        self.points.refused = list(state.refused)
        self.points.policy_unavailable = state.policy_unavailable
        self.points.unavailable = UnavailableArms(state.unavailable)
        self.points.asked = state.decision_points
        self.points.evidence = state.evidence
        self.guard.watch, self.guard.told = state.watch, list(state.rolled_back)
        self.look = list(moved["run.look"].unbind()) if state.look else []

    # --- the point the governor goes back to -----------------------------------------------------------------------------

    def _cursor(self) -> Cursor:
        return Cursor(
            batch=self.batch,
            loss_sum=None if self.loss_sum is None else self.loss_sum.clone(),
            loss_samples=self.loss_samples,
            gate_losses=tuple(self.gate_losses),
            train_losses=tuple(self.train_losses),
            gate_flops=tuple(self.gate_flops),
            trial_flops=tuple(self.trial_flops),
            policy_state=self.points.policy_state,
            heard=self.points.heard,
            refused=tuple(self.points.refused),
            unavailable=self.points.unavailable.entries(),
        )

    def _describe_point(self) -> None:
        """The run stands at the point it would be taken back to: what a later checkpoint must say of that is kept."""
        self._point, self._left_point = None, False
        if self.guard.snapshot is not None:
            self._point = Point.of(*self.state(), self.guard.snapshot.copies())

    def _go_on_from_cursor(self, cursor: Cursor) -> None:
        self.batch, self.loss_samples, self.look = cursor.batch, cursor.loss_samples, []
        self.loss_sum = None if cursor.loss_sum is None else cursor.loss_sum.clone()
        self.gate_losses = list(cursor.gate_losses)
        self.points.policy_state, self.points.heard = cursor.policy_state, cursor.heard
        self.train_losses, self.gate_flops = list(cursor.train_losses), list(cursor.gate_flops)
        self.trial_flops = list(cursor.trial_flops)
        if self.grower.watch is not None:
            self.grower.watch.begin(self.grower.step - self.batch)
        self.points.refused, self.points.unavailable = list(cursor.refused), UnavailableArms(cursor.unavailable)


def _lives_with_the_model(name: str) -> bool:
    """The optimiser's tensors are brought to their places by :func:`esperd.growth.snapshot.restore`: some stay on the CPU."""
    return not name.startswith("optimizer.")
