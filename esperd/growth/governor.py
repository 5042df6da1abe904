"""The governor of a training run as a pure state machine: what was seen in, the next state and instructions out.

It catches catastrophes, each by a sign that is sufficient alone: a number that is not finite, a loss far above its recent level
(divergence), a network that answers no better than a constant although it once did (collapse). It then says to go back to the
last good point, and what to do differently from there.

Nothing here trains, measures or touches a tensor. Time is counted in looks: a look is the mean loss of ``settings.steps``
training steps, or one gate pass. A finite loss must look bad :data:`IN_A_ROW` times; a number that is not finite trips at once.

*The same point.* A point is what a :class:`SnapshotTaken` reports; a rollback leads to the latest one. Two catastrophes are at
the same point exactly when no snapshot was taken between them. A rollback takes none: the next one comes with the next good
gate pass. A process that resumes a checkpoint which was written at the point takes the snapshot anew, reported by
:class:`Resumed`: that is no new point, what was tried counts on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median, median_high
from typing import Literal

import msgspec

from esperd.messages.jobs import Governor

SHORTEST_HISTORY = 4
"""Looks before a loss has a recent level at all; fewer say nothing. Chosen, not measured."""

IN_A_ROW = 2
"""Anomalous looks at a loss, one after the other, that make a catastrophe. Of 156 healthy trial runs on digits (SGD and
AdamW, rates up to the edge, warm restarts, label noise) one look alone would have rolled back 13, for gate losses that batch norm
lifted for a single pass; two in a row none."""

NOISE = 6.0
"""Standard deviations of its own noise that a loss may stand above its level. Chosen, not measured."""

DEVIATIONS = 1.4826 / math.sqrt(2)
"""Median distance of two successive looks → standard deviation of one, for normal noise."""

SMALLEST_SHARE = 0.1
"""A level below this share of an untrained network's loss counts as this large: a tiny loss may multiply without harm. In the
same trial a hundredth gave false alarms, a tenth none."""

NEAR_CHANCE = 0.065
"""A loss that is at most this share below chance is that of a constant answer. Chosen, not measured."""

ONCE_BETTER = 0.6
"""Share of chance below which a network had learned something that it can lose. Chosen, not measured."""

Remedy = Literal["cull", "cut_rate"]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of one loss. Anomalies never enter it."""

    history: tuple[float, ...] = ()
    """The latest looks, oldest first."""
    first: float | None = None
    """Its first level: of a network that had hardly been trained."""
    lowest: float | None = None
    """Its lowest level so far."""
    anomalies: int = 0
    """Anomalous looks in a row, up to now."""
    mean: float = 0.0
    """Mean loss of the steps of a look that is not complete."""
    steps: int = 0
    """How many these are."""

    @property
    def level(self) -> float | None:
        """Median of the latest looks, the higher one of two; None while they are too few.

        Their mean would be a level that the loss never had, after a step from below zero to above it one of no size.
        """
        return median_high(self.history) if len(self.history) >= SHORTEST_HISTORY else None

    @property
    def noise(self) -> float:
        """Standard deviation of a look, from the distances of successive ones, so that a trend does not count as noise."""
        distances = [abs(after - before) for before, after in zip(self.history, self.history[1:], strict=False)]
        return DEVIATIONS * median(distances) if distances else 0.0


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rollback leads to: a snapshot, and what was known when it was taken."""

    epoch: int
    live_seeds: int
    train: Series
    gate: Series
    tried: tuple[Remedy, ...] = ()
    """What was done after the rollbacks to it, in order."""


class Trip(msgspec.Struct, frozen=True, kw_only=True):
    """A catastrophe that was rolled back."""

    epoch: int
    """Epochs completed when it was seen."""
    to_epoch: int
    reason: str
    numbers: dict[str, float | None]
    remedy: Remedy
    seeds_culled: int
    rate_scale: float


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the governor knows; part of a checkpoint, and of no rollback."""

    epoch: int = 0
    """Epochs completed."""
    train: Series = Series()
    gate: Series = Series()
    point: Point | None = None
    trips: tuple[Trip, ...] = ()
    rate_scale: float = 1.0
    """What the scheduled learning rate is to be multiplied with, all cuts so far."""
    story: str = ""
    """Why it gave up; empty while it has not."""


@dataclass(frozen=True)
class StepsObserved:
    """Some training steps are done since the last one of these.

    Args:
        loss_sum_finite: whether the sum of their losses is.
        mean_loss: their mean; looked at once ``settings.steps`` steps are together.
        steps: how many.
    """

    loss_sum_finite: bool
    mean_loss: float
    steps: int


@dataclass(frozen=True)
class GateObserved:
    """The gate pass of a decision point; ``epoch`` counts the epochs completed."""

    loss: float
    epoch: int


@dataclass(frozen=True)
class SnapshotTaken:
    """A snapshot stands. Answers :class:`TakeSnapshot`; also, unasked, one from before the first step."""

    epoch: int
    live_seeds: int
    """Seeds in it that may be culled."""


@dataclass(frozen=True)
class Resumed:
    """A process goes on from a checkpoint that was written at the point, and has taken the snapshot of it anew. To be told before
    anything else.
    """

    epoch: int
    live_seeds: int


@dataclass(frozen=True)
class SeedLost:
    """A seed that was heard was culled at a decision point: the levels are those of a network that is no more. That the loss
    rises to what the host alone can do is no catastrophe.
    """


Occurrence = StepsObserved | GateObserved | SnapshotTaken | Resumed | SeedLost


@dataclass(frozen=True)
class TakeSnapshot:
    """This decision point is good. Once its decisions are carried out, take a snapshot and answer with :class:`SnapshotTaken`."""


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Go back to the latest snapshot and do something differently.

    Args:
        reason: what went wrong.
        numbers: what was looked at; None for what is not finite or was not known.
        action: what is new this time: ``cull`` or ``cut_rate``.
        culls: whether to cull every seed that lives in the snapshot. True also where ``action`` cuts the rate at a point
            whose seeds were culled before: the snapshot brings them back.
        rate_scale: what the scheduled learning rate is to be multiplied with from now on; holds earlier cuts.
        epoch: epochs completed when it was seen.
        to_epoch: epochs completed in the snapshot.
        trip: number of this rollback in the run, from 1.
    """

    reason: str
    numbers: dict[str, float | None]
    action: Remedy
    culls: bool
    rate_scale: float
    epoch: int
    to_epoch: int
    trip: int


@dataclass(frozen=True)
class Fail:
    """Nothing is left to try. ``story`` tells each catastrophe with its numbers, and what was done about it."""

    story: str


Instruction = TakeSnapshot | Rollback | Fail


@dataclass(frozen=True)
class _Finding:
    """Something is wrong with a loss, or with a number."""

    reason: str
    numbers: dict[str, float | None]


def advance(
    watch: Watch, occurrence: Occurrence, settings: Governor, *, chance_loss: float | None = None
) -> tuple[Watch, list[Instruction]]:
    """What the governor makes of something it sees.

    Args:
        watch: what it knows.
        occurrence: what was seen.
        settings: thresholds and remedies.
        chance_loss: loss of the best constant answer: ln K for a cross entropy over K classes; None when there is no such
            number, and collapse is then not looked for.

    Returns:
        What it knows now, and what the caller must do. After :class:`Fail` it answers everything with the same story.
    """
    if watch.story:
        return watch, [Fail(watch.story)]
    match occurrence:
        case StepsObserved():
            return _steps_observed(watch, occurrence, settings, chance_loss)
        case GateObserved():
            return _gate_observed(msgspec.structs.replace(watch, epoch=occurrence.epoch), occurrence.loss, settings, chance_loss)
        case SnapshotTaken(epoch, live_seeds):
            return _stands(watch, epoch, live_seeds, tried=()), []
        case Resumed(epoch, live_seeds):
            return _stands(watch, epoch, live_seeds, tried=watch.point.tried if watch.point else ()), []
        case SeedLost():
            train, gate = Series(first=watch.train.first), Series(first=watch.gate.first)
            return msgspec.structs.replace(watch, train=train, gate=gate), []


def _stands(watch: Watch, epoch: int, live_seeds: int, tried: tuple[Remedy, ...]) -> Watch:
    point = Point(epoch=epoch, live_seeds=live_seeds, train=watch.train, gate=watch.gate, tried=tried)
    return msgspec.structs.replace(watch, epoch=epoch, point=point)


# --- looking ---------------------------------------------------------------------------------------------------------------


def _steps_observed(
    watch: Watch, seen: StepsObserved, settings: Governor, chance_loss: float | None
) -> tuple[Watch, list[Instruction]]:
    what, series = f"the training loss in epoch {watch.epoch + 1}", watch.train
    steps = series.steps + seen.steps
    mean = series.mean + (seen.mean_loss - series.mean) * (seen.steps / steps) if steps else 0.0
    if not (seen.loss_sum_finite and math.isfinite(seen.mean_loss) and math.isfinite(mean)):
        return _trip(watch, _Finding(f"{what} is not finite", {"loss": None}), settings)
    if not settings.enabled:
        return watch, []
    if steps < settings.steps:
        return msgspec.structs.replace(watch, train=msgspec.structs.replace(series, mean=mean, steps=steps)), []
    series = msgspec.structs.replace(series, mean=0.0, steps=0)
    untrained = series.first if chance_loss is None else chance_loss
    finding = _diverged(what, series, mean, settings, untrained) or _collapsed(what, series, mean, series.lowest, chance_loss)
    if finding is None:
        return msgspec.structs.replace(watch, train=_learned(series, mean, settings)), []
    watch = msgspec.structs.replace(watch, train=msgspec.structs.replace(series, anomalies=series.anomalies + 1))
    return _trip(watch, finding, settings) if watch.train.anomalies >= IN_A_ROW else (watch, [])


def _gate_observed(watch: Watch, loss: float, settings: Governor, chance_loss: float | None) -> tuple[Watch, list[Instruction]]:
    what, series = f"the gate loss after epoch {watch.epoch}", watch.gate
    if not math.isfinite(loss):
        return _trip(watch, _Finding(f"{what} is not finite", {"loss": None}), settings)
    if not settings.enabled:
        return watch, []
    # A gate loss may creep above chance while the answers get better (overconfident errors), so only a fall from its recent
    # level is a collapse; a training loss may not, so its lowest level counts.
    untrained = watch.train.first if chance_loss is None else chance_loss
    finding = _diverged(what, series, loss, settings, untrained) or _collapsed(what, series, loss, series.level, chance_loss)
    if finding is None:
        good = watch.train.anomalies == 0
        return msgspec.structs.replace(watch, gate=_learned(series, loss, settings)), [TakeSnapshot()] if good else []
    watch = msgspec.structs.replace(watch, gate=msgspec.structs.replace(series, anomalies=series.anomalies + 1))
    return _trip(watch, finding, settings) if watch.gate.anomalies >= IN_A_ROW else (watch, [])


def _learned(series: Series, loss: float, settings: Governor) -> Series:
    """The series after a look that was no anomaly."""
    series = msgspec.structs.replace(series, history=(*series.history, loss)[-settings.window :], anomalies=0)
    level = series.level
    if level is None:
        return series
    return msgspec.structs.replace(
        series,
        first=level if series.first is None else series.first,
        lowest=level if series.lowest is None else min(level, series.lowest),
    )


def _diverged(what: str, series: Series, loss: float, settings: Governor, untrained: float | None) -> _Finding | None:
    """One limit, never a chain of conditions that all have to hold: the factor, wider for a noisy loss, at most its square."""
    level = series.level
    if level is None or untrained is None:
        return None
    size = max(abs(level), SMALLEST_SHARE * abs(untrained))
    factor = settings.divergence_factor
    margin = min(max((factor - 1) * size, NOISE * series.noise), (factor**2 - 1) * size)
    if loss <= level + margin or size == 0.0:  # a loss that was always zero has no scale
        return None
    reason = f"{what} is {loss:.4g}, above the {level + margin:.4g} that its recent level of {level:.4g} allows"
    return _Finding(reason, {"loss": loss, "level": level, "limit": level + margin, "noise": series.noise})


def _collapsed(what: str, series: Series, loss: float, best: float | None, chance_loss: float | None) -> _Finding | None:
    """No better than the best constant answer, after it had been; no constant answer is ever better than chance."""
    if chance_loss is None or best is None or series.level is None:
        return None
    if best > ONCE_BETTER * chance_loss or loss < (1 - NEAR_CHANCE) * chance_loss:
        return None
    reason = f"{what} is {loss:.4g}, no better than a constant answer ({chance_loss:.4g}), after it had been {best:.4g}"
    return _Finding(reason, {"loss": loss, "level": series.level, "best": best, "chance": chance_loss})


# --- what is done about it -------------------------------------------------------------------------------------------------


def _trip(watch: Watch, finding: _Finding, settings: Governor) -> tuple[Watch, list[Instruction]]:
    point = watch.point
    if not settings.enabled:
        return _fail(watch, finding, "the governor is not enabled")
    if point is None:
        return _fail(watch, finding, "there is no earlier good point to go back to")
    if len(watch.trips) >= settings.max_rollbacks:
        return _fail(watch, finding, f"{settings.max_rollbacks} rollbacks are allowed")
    remedy = _next_remedy(point, settings)
    if remedy is None:
        return _fail(watch, finding, f"nothing is left to try from epoch {point.epoch}")
    tried = (*point.tried, remedy)
    culls = "cull" in tried
    rate_scale = watch.rate_scale * settings.rate_cut if remedy == "cut_rate" else watch.rate_scale
    trip = Trip(
        epoch=watch.epoch,
        to_epoch=point.epoch,
        reason=finding.reason,
        numbers=finding.numbers,
        remedy=remedy,
        seeds_culled=point.live_seeds if culls else 0,
        rate_scale=rate_scale,
    )
    after = Watch(
        epoch=point.epoch,
        train=point.train,
        gate=point.gate,
        point=msgspec.structs.replace(point, tried=tried),
        trips=(*watch.trips, trip),
        rate_scale=rate_scale,
    )
    instruction = Rollback(
        reason=finding.reason,
        numbers=finding.numbers,
        action=remedy,
        culls=culls,
        rate_scale=rate_scale,
        epoch=watch.epoch,
        to_epoch=point.epoch,
        trip=len(after.trips),
    )
    return after, [instruction]


def _next_remedy(point: Point, settings: Governor) -> Remedy | None:
    if not point.tried and settings.action == "cull" and point.live_seeds > 0:
        return "cull"
    return None if "cut_rate" in point.tried else "cut_rate"


def _fail(watch: Watch, finding: _Finding, why: str) -> tuple[Watch, list[Instruction]]:
    told = [f"{trip.reason}: went back to epoch {trip.to_epoch} and {_told(trip)}" for trip in watch.trips]
    story = "; then ".join([*told, f"{finding.reason}, and {why}"])
    watch = msgspec.structs.replace(watch, story=f"{story}; lower optimizer.learning_rate")
    return watch, [Fail(watch.story)]


def _told(trip: Trip) -> str:
    culled = f"culled {trip.seeds_culled} living seed{'' if trip.seeds_culled == 1 else 's'}" if trip.seeds_culled else ""
    cut = f"cut the learning rate to {trip.rate_scale:.3g} of its schedule" if trip.remedy == "cut_rate" else ""
    return " and ".join(part for part in (culled, cut) if part)
