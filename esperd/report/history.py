"""A job's events as series over its epochs: what plots draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esperd.messages.growth import Contribution, Stage, Trial
from esperd.messages.telemetry import (
    AuditMeasured,
    Body,
    ContributionMeasured,
    DecisionMade,
    EpochCompleted,
    Event,
    GateEvaluated,
    PolicyUnavailable,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrainingStarted,
    TrialMeasured,
)


@dataclass(frozen=True)
class Span:
    """A seed stayed in one stage from one epoch to another, both included."""

    stage: Stage
    first: int
    last: int


@dataclass(frozen=True)
class SeedHistory:
    """One seed over time."""

    seed: str
    blueprint: str
    spans: tuple[Span, ...]
    alpha: tuple[tuple[int, float], ...]
    """Epoch and alpha."""
    contributions: tuple[Contribution, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class History:
    """Everything plots and logs show. After a resume or a rollback, epochs that were trained twice count once, as they were
    last.
    """

    training: TrainingStarted | None
    growth: tuple[EpochCompleted, ...]
    control: tuple[EpochCompleted, ...]
    seeds: tuple[SeedHistory, ...]
    """But for candidates that were screened out."""
    decisions: tuple[DecisionMade, ...]
    turns: tuple[StageChanged | GateEvaluated | PolicyUnavailable | RolledBack, ...]
    """Stage changes, gate verdicts, decision points without a policy and rollbacks, in order."""
    screenings: tuple[ScreeningEnded, ...]
    rollbacks: tuple[RolledBack, ...]
    """Of growth."""


def history_of(events: Iterable[Event]) -> History:
    """Read a job's events, oldest first."""
    told = [event.body for event in events]
    lasting = _lasting(told)
    epochs = [body for body in lasting if isinstance(body, EpochCompleted)]
    growth = _last_pass(body for body in epochs if body.phase == "growth")
    starts = [body for body in told if isinstance(body, TrainingStarted)]
    ended = {body.screening: body for body in told if isinstance(body, ScreeningEnded)}
    return History(
        training=starts[0] if starts else None,
        growth=growth,
        control=_last_pass(body for body in epochs if body.phase == "control"),
        seeds=_seeds(growth, [body for body in lasting if isinstance(body, ContributionMeasured | TrialMeasured)]),
        decisions=tuple(body for body in told if isinstance(body, DecisionMade)),
        turns=tuple(body for body in told if isinstance(body, StageChanged | GateEvaluated | PolicyUnavailable | RolledBack)),
        screenings=tuple(ended.values()),
        rollbacks=tuple({body.trip: body for body in _of_growth(told) if isinstance(body, RolledBack)}.values()),
    )


def _of_growth(told: Sequence[Body]) -> Sequence[Body]:
    """What was told before the control began."""
    for index, body in enumerate(told):
        if isinstance(body, AuditMeasured):
            return told[:index]
    return told


def _lasting(told: Sequence[Body]) -> list[Body]:
    """All but the epochs that were taken back, and what was measured after them: they were trained again, or never."""
    before = len(_of_growth(told))
    kept: list[Body] = []
    for index, body in enumerate(told):
        if isinstance(body, RolledBack):
            phase = "growth" if index < before else "control"
            kept = [each for each in kept if not _taken_back(each, body.to_epoch, phase)]
        kept.append(body)
    return kept


def _taken_back(body: Body, to_epoch: int, phase: str) -> bool:
    match body:
        case EpochCompleted():
            return body.phase == phase and body.epoch > to_epoch
        case ContributionMeasured() | TrialMeasured():
            return phase == "growth" and body.epoch > to_epoch
        case _:
            return False


def _last_pass(epochs: Iterable[EpochCompleted]) -> tuple[EpochCompleted, ...]:
    by_number = {body.epoch: body for body in epochs}
    return tuple(by_number[number] for number in sorted(by_number))


Measured = ContributionMeasured | TrialMeasured


def _seeds(growth: Sequence[EpochCompleted], measured: Sequence[Measured]) -> tuple[SeedHistory, ...]:
    went_on = {seed.seed for epoch in growth for seed in epoch.seeds if not seed.screening}
    names = dict.fromkeys(seed.seed for epoch in growth for seed in epoch.seeds if seed.seed in went_on)
    return tuple(_seed(name, growth, [body for body in measured if body.seed == name]) for name in names)


def _seed(name: str, growth: Sequence[EpochCompleted], measured: Sequence[Measured]) -> SeedHistory:
    records = [(epoch.epoch, seed) for epoch in growth for seed in epoch.seeds if seed.seed == name]
    spans: list[Span] = []
    for number, record in records:
        if spans and spans[-1].stage is record.stage:
            spans[-1] = Span(record.stage, spans[-1].first, number)
        else:
            spans.append(Span(record.stage, number, number))
    contributions = {body.epoch: body.contribution for body in measured if isinstance(body, ContributionMeasured)}
    trials = {body.epoch: body.trial for body in measured if isinstance(body, TrialMeasured)}
    return SeedHistory(
        seed=name,
        blueprint=records[0][1].blueprint,
        spans=tuple(spans),
        alpha=tuple((number, record.alpha) for number, record in records),
        contributions=tuple(contributions[number] for number in sorted(contributions)),
        trials=tuple(trials[number] for number in sorted(trials)),
    )
