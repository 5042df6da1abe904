"""A job's events as series over its epochs: what plots draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esperd.messages.growth import Contribution, Stage
from esperd.messages.telemetry import (
    ContributionMeasured,
    DecisionMade,
    EpochCompleted,
    Event,
    GateEvaluated,
    PolicyUnavailable,
    StageChanged,
    TrainingStarted,
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


@dataclass(frozen=True)
class History:
    """Everything plots and logs show. After a resume, epochs that were trained twice count once, as they were last."""

    training: TrainingStarted | None
    growth: tuple[EpochCompleted, ...]
    control: tuple[EpochCompleted, ...]
    seeds: tuple[SeedHistory, ...]
    decisions: tuple[DecisionMade, ...]
    turns: tuple[StageChanged | GateEvaluated | PolicyUnavailable, ...]
    """Stage changes, gate verdicts and decision points without a policy, in order."""


def history_of(events: Iterable[Event]) -> History:
    """Read a job's events, oldest first."""
    told = [event.body for event in events]
    epochs = [body for body in told if isinstance(body, EpochCompleted)]
    growth = _last_pass(body for body in epochs if body.phase == "growth")
    starts = [body for body in told if isinstance(body, TrainingStarted)]
    measured = [body for body in told if isinstance(body, ContributionMeasured)]
    return History(
        training=starts[0] if starts else None,
        growth=growth,
        control=_last_pass(body for body in epochs if body.phase == "control"),
        seeds=_seeds(growth, measured),
        decisions=tuple(body for body in told if isinstance(body, DecisionMade)),
        turns=tuple(body for body in told if isinstance(body, StageChanged | GateEvaluated | PolicyUnavailable)),
    )


def _last_pass(epochs: Iterable[EpochCompleted]) -> tuple[EpochCompleted, ...]:
    by_number = {body.epoch: body for body in epochs}
    return tuple(by_number[number] for number in sorted(by_number))


def _seeds(growth: Sequence[EpochCompleted], measured: Sequence[ContributionMeasured]) -> tuple[SeedHistory, ...]:
    names = list(dict.fromkeys(seed.seed for epoch in growth for seed in epoch.seeds))
    return tuple(_seed(name, growth, measured) for name in names)


def _seed(name: str, growth: Sequence[EpochCompleted], measured: Sequence[ContributionMeasured]) -> SeedHistory:
    records = [(epoch.epoch, seed) for epoch in growth for seed in epoch.seeds if seed.seed == name]
    spans: list[Span] = []
    for number, record in records:
        if spans and spans[-1].stage is record.stage:
            spans[-1] = Span(record.stage, spans[-1].first, number)
        else:
            spans.append(Span(record.stage, number, number))
    by_epoch = {body.epoch: body.contribution for body in measured if body.seed == name}
    return SeedHistory(
        seed=name,
        blueprint=records[0][1].blueprint,
        spans=tuple(spans),
        alpha=tuple((number, record.alpha) for number, record in records),
        contributions=tuple(by_epoch[number] for number in sorted(by_epoch)),
    )
