"""A watched job as a value: events are folded into it one by one. Pure; what draws it is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from esperd.messages.growth import LIVE_STAGES, Contribution, SeedRecord, SlotRecord, Stage, Trial
from esperd.messages.jobs import DEFAULT_METRICS, FINAL_JOB_STATES, Job, JobError, JobInfo, JobState
from esperd.messages.policy import Arm, Decision
from esperd.messages.reports import Metrics
from esperd.messages.telemetry import (
    AuditMeasured,
    Body,
    CheckpointSaved,
    ContributionMeasured,
    DecisionMade,
    EpochCompleted,
    Event,
    ExportFailed,
    KernelLoaded,
    PolicyUnavailable,
    ProspectMeasured,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrainingStarted,
    TrialMeasured,
)
from esperd.messages.telemetry import JobStateChanged as StateChanged

DECISIONS_KEPT = 6
LOSSES_KEPT = 400


@dataclass(frozen=True, kw_only=True)
class JobView:
    """Everything a live view shows. What has not been told yet is None."""

    job: str
    name: str
    metric_name: str | None
    state: JobState
    attempt: int = 0
    error: JobError | None = None
    started_at: float | None = None
    """When training began."""
    last_at: float | None = None
    training: TrainingStarted | None = None
    epoch: EpochCompleted | None = None
    """The last one, of whatever phase."""
    gate_losses: tuple[float, ...] = ()
    """Of the current phase, oldest first."""
    seeds: dict[str, SeedRecord] = field(default_factory=dict)
    decisions: tuple[DecisionMade, ...] = ()
    kernels: dict[str, int] = field(default_factory=dict)
    """Kernels loaded, by where they came from."""
    audits: dict[str, Metrics] = field(default_factory=dict)
    checkpoints: int = 0
    policy_unavailable: int = 0
    rollbacks: tuple[RolledBack, ...] = ()
    """Catastrophes that training went back from, oldest first."""
    export_failed: ExportFailed | None = None

    @property
    def is_over(self) -> bool:
        """The job will not change any more."""
        return self.state in FINAL_JOB_STATES

    @property
    def elapsed_s(self) -> float | None:
        """Seconds since training began, by the times of the events."""
        return None if self.started_at is None or self.last_at is None else self.last_at - self.started_at

    @property
    def live_seeds(self) -> int:
        """Seeds between germination and their end."""
        return sum(seed.stage in LIVE_STAGES for seed in self.seeds.values())


def metric_name_of(job: Job) -> str | None:
    """What a job's metric is called: the one it names, or its loss's own."""
    return job.metric or DEFAULT_METRICS.get(job.loss)


def begin(info: JobInfo) -> JobView:
    """A view of a job of which no event was seen yet."""
    return JobView(
        job=info.id,
        name=info.name,
        metric_name=metric_name_of(info.job),
        state=JobState.QUEUED,
        attempt=0,
    )


def fold(view: JobView, event: Event) -> JobView:
    """The view after one more event."""
    return replace(_fold_body(view, event.body, event.at), last_at=event.at)


def _fold_body(view: JobView, body: Body, at: float) -> JobView:
    match body:
        case StateChanged():
            return replace(view, state=body.state, attempt=body.attempt, error=body.error)
        case TrainingStarted():
            return replace(view, training=body, started_at=view.started_at or at)
        case EpochCompleted():
            return _fold_epoch(view, body)
        case DecisionMade():
            return replace(view, decisions=_with_decision(view.decisions, body))
        case StageChanged():
            return _fold_stage(view, body)
        case ContributionMeasured() | ProspectMeasured() | TrialMeasured():
            return _fold_measured(view, body)
        case ScreeningEnded():
            return view if body.winner is None else _with_seed(view, body.winner, screening="")
        case KernelLoaded():
            return replace(view, kernels={**view.kernels, body.source: view.kernels.get(body.source, 0) + 1})
        case CheckpointSaved():
            return replace(view, checkpoints=view.checkpoints + 1)
        case PolicyUnavailable():
            return replace(view, policy_unavailable=view.policy_unavailable + 1)
        case RolledBack():
            return _fold_rollback(view, body)
        case AuditMeasured():
            return replace(view, audits={**view.audits, body.network: body.metrics})
        case ExportFailed():
            return replace(view, export_failed=body)
        case _:
            return view


def _with_decision(before: tuple[DecisionMade, ...], made: DecisionMade) -> tuple[DecisionMade, ...]:
    decision = made.decision
    if decision.action == "wait":
        if decision.arm is None and not decision.proposes and not decision.by:
            return before  # nothing was wanted: not worth a line
        if decision.proposes:  # of several that are proposed again and again, each is shown once
            before = tuple(other for other in before if _wish(other.decision) != _wish(decision))
        elif before and _wish(before[-1].decision) == _wish(decision):
            before = before[:-1]  # declined again: the latest reason stands for all
    return (*before, made)[-DECISIONS_KEPT:]


def _wish(decision: Decision) -> tuple[str, str, Arm | None, str | None]:
    """What a decision is about, whatever its reason."""
    return decision.action, decision.proposes, decision.arm, decision.seed


def _fold_epoch(view: JobView, body: EpochCompleted) -> JobView:
    before = view.gate_losses
    if view.epoch is not None and view.epoch.phase != body.phase:
        before = ()
    elif view.epoch is not None and view.epoch.epoch >= body.epoch:  # trained again, after a rollback or by another attempt
        before = before[: max(0, len(before) - (view.epoch.epoch - body.epoch + 1))]
    seeds = {**view.seeds, **{seed.seed: seed for seed in body.seeds}}
    return replace(view, epoch=body, gate_losses=(*before, body.gate_loss)[-LOSSES_KEPT:], seeds=seeds)


def _fold_stage(view: JobView, body: StageChanged) -> JobView:
    if body.after is Stage.CULLED:
        return _with_seed(view, body.seed, stage=body.after, alpha=0.0, reason=body.reason)
    return _with_seed(view, body.seed, stage=body.after, reason=body.reason)


def _fold_measured(view: JobView, body: ContributionMeasured | ProspectMeasured | TrialMeasured) -> JobView:
    match body:
        case ContributionMeasured():
            return _with_seed(view, body.seed, contribution=body.contribution)
        case ProspectMeasured():
            return _with_seed(view, body.seed, prospect=body.prospect)
        case TrialMeasured():
            return _with_seed(view, body.seed, trial=body.trial)


def _fold_rollback(view: JobView, body: RolledBack) -> JobView:
    for name in body.gone:
        view = _with_seed(view, name, stage=Stage.CULLED, alpha=0.0, reason="rolled back")
    return replace(view, rollbacks=(*view.rollbacks, body))


def _with_seed(view: JobView, name: str, **changes: Stage | Contribution | Trial | float | str) -> JobView:
    """The view with something new of a seed. Of one without a record nothing is shown: that comes with the epoch's end, with
    parameters and price.
    """
    if name not in view.seeds:
        return view
    seed = msgspec.structs.replace(view.seeds[name], **changes)
    return replace(view, seeds={**view.seeds, name: seed})


def slots_line(slots: tuple[SlotRecord, ...]) -> str:
    """Slots with their shapes: ``features.3 (16×8×8)``."""
    return ", ".join(f"{slot.slot} ({'×'.join(str(size) for size in slot.shape)})" for slot in slots)  # noqa: RUF001
