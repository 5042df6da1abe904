"""Decisions explained: a job's decision points as a table, and one of them with everything that mattered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from esperd.cli.overruled import score
from esperd.errors import CheckpointRejected
from esperd.messages.growth import SeedRecord, Stage
from esperd.messages.jobs import DEFAULT_METRICS, JobInfo
from esperd.messages.overruling import LoggedDecision
from esperd.messages.policy import Alternative, Arm, Decision, Observation, PolicySettings
from esperd.messages.telemetry import DecisionMade, Event, PolicyUnavailable, StageChanged, TrainingStarted
from esperd.policy.rent import rent, seconds_share_of
from esperd.policy.state import decode_state
from esperd.report import numbers
from esperd.report.attribution import effect
from esperd.report.decisions import say_decision
from esperd.report.grid import Cell, Column, Grid
from esperd.report.tables import STAGE_STYLES

MEASURING = ("gauge", "try")
"""Actions that change nothing: only what could not be measured is told of them."""
ACTION_STYLES = {"germinate": "cyan", "fossilize": "green", "cull": "red"}


@dataclass(frozen=True)
class DecisionPoint:
    """What was decided at one point, as the trainer told it."""

    point: int | None
    """None: told by an older esperd, which did not say."""
    epoch: int
    made: tuple[DecisionMade, ...]


def points_of(events: Sequence[Event]) -> list[DecisionPoint]:
    """A job's decision points, in order; of one that a resumed job came back to, what was told last."""
    points: dict[tuple[int | None, int], list[DecisionMade]] = {}
    before: tuple[int | None, int] | None = None
    for event in events:
        if isinstance(event.body, TrainingStarted):
            before = None  # an attempt that ended within a point tells the whole of it again
        if not isinstance(event.body, DecisionMade):
            continue
        key = (event.body.point, event.body.epoch)
        if key != before:
            points[key] = []
        points[key].append(event.body)
        before = key
    return [DecisionPoint(point=point, epoch=epoch, made=tuple(made)) for (point, epoch), made in points.items()]


def points_grid(points: Sequence[DecisionPoint], strategy: str, silent: Sequence[PolicyUnavailable] = ()) -> Grid:
    """Every decision, point by point. Points at which the same was waited for are one row; of those at which the policy decided
    nothing the note tells.
    """
    rows: list[tuple[str | Cell, ...]] = []
    for first, last in _folded(points):
        for number, made in enumerate(last.made):
            numbered = number == 0  # said once a point
            rows.append(
                (
                    _span(first.point, last.point) if numbered else "",
                    _span(first.epoch, last.epoch) if numbered else "",
                    decision_cell(made.decision),
                    score(made.decision),
                    made.decision.by or strategy,
                    outcome_cell(made.decision, made),
                )
            )
    columns = (
        Column("point", "right", style="bold"),
        Column("epoch", "right"),
        Column("decision", widest=44),
        Column("score", "right"),
        Column("by"),
        Column("outcome", widest=40),
    )
    note, empty = "Why, and what else there was: esper explain ID POINT.", "no decision was made yet"
    if silent:
        epochs = "1 epoch" if len(silent) == 1 else f"{len(silent)} epochs"
        empty = f"After {epochs} the policy decided nothing; after epoch {silent[-1].epoch}: {silent[-1].reason}."
        note = f"{empty} {note}"
    return Grid("", columns, rows, empty=empty, note=note)


def _folded(points: Sequence[DecisionPoint]) -> list[tuple[DecisionPoint, DecisionPoint]]:
    """First and last of each run of points that waited for the same."""
    folded: list[tuple[DecisionPoint, DecisionPoint]] = []
    for point in points:
        if folded and _waits(point) and _waits(folded[-1][1]) == _waits(point):
            folded[-1] = (folded[-1][0], point)
        else:
            folded.append((point, point))
    return folded


def _waits(point: DecisionPoint) -> list[tuple[str, str]]:
    """What a point waits for; empty when it does something."""
    if any(made.decision.action != "wait" for made in point.made):
        return []
    return [(say_decision(made.decision), made.decision.by) for made in point.made]


def _span(first: int | None, last: int | None) -> str:
    if first is None or last is None:
        return numbers.UNKNOWN
    return str(last) if first == last else f"{first}-{last}"


def decision_cell(decision: Decision) -> Cell:
    """What was decided, coloured by what it does."""
    return Cell(say_decision(decision), "yellow" if decision.proposes else ACTION_STYLES.get(decision.action, "dim"))


def outcome_cell(decision: Decision, made: DecisionMade | None) -> Cell:
    """Whether it was carried out."""
    if decision.proposes:
        return Cell("awaits approval", "yellow")
    if decision.action == "wait":
        return Cell("")
    if made is None and decision.action in MEASURING:
        return Cell("measured; the next point has what was found", "dim")
    if made is None:
        return Cell("not told by the trainer", "yellow")
    return Cell("applied", "green") if made.applied else Cell(f"refused: {made.refusal}", "red")


class Explained:
    """One decision point with everything that mattered.

    Args:
        info: the job.
        logged: the point.
        events: of the job, oldest first.
    """

    def __init__(self, info: JobInfo, logged: LoggedDecision, events: Sequence[Event]) -> None:
        self._info = info
        self._logged = logged
        self._stages = [event.body for event in events if isinstance(event.body, StageChanged)]
        told = [found.made for found in points_of(events) if found.point == logged.point]
        self._made = told[0] if told else ()

    def document(self) -> dict[str, object]:
        """Everything, for programs."""
        outcomes = [
            {"decision": decision, "applied": made.applied if made else None, "refusal": made.refusal if made else "", **became}
            for decision, made, became in self._outcomes()
        ]
        return {**msgspec.structs.asdict(self._logged), "job": self._info.id, "outcomes": outcomes}

    def lines(self) -> list[str]:
        """Where the job stood, in a few lines."""
        logged, asked = self._logged, self._logged.request
        if asked is None:
            return [
                f"point {logged.point} of {self._info.id}: {self._info.job.policy.strategy} decided",
                "what it saw was not kept: it was logged by an older esperd",
            ]
        seen = asked.observation
        metric_name = self._info.job.metric or DEFAULT_METRICS.get(self._info.job.loss)
        scored = f", {metric_name} {numbers.metric(seen.gate_metric, metric_name)}" if seen.gate_metric is not None else ""
        deciders = ", ".join(dict.fromkeys([*(word.by for word in logged.said), asked.settings.strategy]))
        spent = f"{seen.progress:.0%} of the budget"
        left = f", {seen.epochs_left:.1f} epochs left" if seen.epochs_left is not None else ""
        losses = f"train loss {numbers.loss(seen.train_loss)}, gate loss {numbers.loss(seen.gate_loss)}{_since(seen)}{scored}"
        host = f"{numbers.count(seen.host_parameters)} parameters, {numbers.flops(seen.host_flops_per_sample)} a sample"
        told = [
            f"point {logged.point} of {self._info.id}, after epoch {seen.epoch} ({spent}{left}): decided by {deciders}",
            f"{losses}; host {host}",
        ]
        told += [f"rolled back: {what}" for what in seen.rolled_back]
        return told

    def grids(self) -> list[Grid]:
        """Decisions and what became of them, seeds, arms; each where there is something to show."""
        grids = [self._decisions_grid()]
        asked = self._logged.request
        if asked is not None and asked.observation.seeds:
            grids.append(_seeds_grid(asked.observation, asked.settings))
        if any(decision.arm is not None for decision in self._logged.answer.decisions):
            grids.append(self._arms_grid())
        return grids

    def _decisions_grid(self) -> Grid:
        strategy = self._info.job.policy.strategy
        rows: list[tuple[str | Cell, ...]] = []
        for decision, made, became in self._outcomes():
            outcome = outcome_cell(decision, made)
            why = f": {became['why']}" if became and became["why"] != decision.reason else ""  # not told twice
            since = f"{became['seed']} is {became['stage']}{why}" if became else ""
            told = "\n".join(part for part in (outcome.text, since) if part)
            rows.append(
                (
                    decision_cell(decision),
                    score(decision),
                    decision.by or strategy,
                    decision.reason,
                    Cell(told, outcome.style),
                )
            )
        columns = (
            Column("decision", widest=28),
            Column("score", "right"),
            Column("by"),
            Column("because", widest=44),
            Column("what became of it", widest=34),
        )
        return Grid("Decisions", columns, rows, empty="nothing was decided")

    def _outcomes(self) -> list[tuple[Decision, DecisionMade | None, dict[str, str]]]:
        """Decisions, each with what the trainer told of it and what the seed is now."""
        told = dict(enumerate(self._made))
        found = []
        for number, decision in enumerate(self._logged.answer.decisions):
            made = told.get(number)
            made = made if made is not None and made.decision == decision else None
            found.append((decision, made, self._became(decision, made)))
        return found

    def _became(self, decision: Decision, made: DecisionMade | None) -> dict[str, str]:
        """The seed that a decision was about, or that came of it, as it stands now."""
        name = decision.seed
        if name is None and decision.action == "germinate" and decision.arm is not None and made is not None:
            born = [
                change.seed
                for change in self._stages
                if change.after is Stage.GERMINATED
                and change.epoch == made.epoch
                and (change.slot, change.blueprint) == (decision.arm.slot, decision.arm.blueprint)
            ]
            name = born[-1] if born else None
        last = [change for change in self._stages if change.seed == name]
        return {"seed": last[-1].seed, "stage": str(last[-1].after), "why": last[-1].reason} if last else {}

    def _arms_grid(self) -> Grid:
        """Every arm that could have been chosen, the chosen first, and a word on those that could not."""
        asked, answer = self._logged.request, self._logged.answer
        chosen = [decision for decision in answer.decisions if decision.arm is not None]
        pulls = _pulls(answer.state)
        entries: dict[Arm, tuple[str, float | None, int | None]] = {}
        for decision in chosen:
            if decision.arm is not None:
                declined = "proposed" if decision.proposes else "declined"
                verb = declined if decision.action == "wait" else decision.action
                entries[decision.arm] = (verb, decision.score, None if pulls is None else pulls.get(decision.arm, 0))
        alternatives: list[Alternative] = [other for decision in chosen for other in decision.alternatives]
        for other in alternatives:
            entries.setdefault(other.arm, ("", other.score, other.pulls))
        options = {} if asked is None else {option.arm: option for option in asked.observation.options}
        rows: list[tuple[str | Cell, ...]] = []
        for arm, (verb, scored, tries) in entries.items():
            option = options.get(arm)
            price = None
            if option is not None and asked is not None:
                size, share = (option.parameters, option.flops_per_sample), option.seconds_share
                price = rent(*size, asked.observation, asked.settings, share)
            rows.append(
                (
                    arm.slot,
                    arm.blueprint,
                    Cell(verb, "bold"),
                    numbers.loss(scored),
                    numbers.count(tries),
                    numbers.loss(price),
                    numbers.count(option.parameters if option is not None else None),
                )
            )
        columns = (
            Column("slot", style="bold"),
            Column("blueprint", style="bold"),
            Column("chosen"),
            Column("score", "right"),
            Column("tries", "right"),
            Column("rent", "right"),
            Column("parameters", "right"),
        )
        closed = [option for option in options.values() if not option.available and option.arm not in entries]
        why_not = "; ".join(sorted({option.why_not for option in closed}))
        arms = "1 more arm" if len(closed) == 1 else f"{len(closed)} more arms"
        note = f"{arms} could not be grown: {why_not}." if closed else ""
        return Grid("Arms", columns, rows, note=note)


def _seeds_grid(seen: Observation, settings: PolicySettings) -> Grid:
    """Seeds as they stood at the point, with what was measured of each and what it must save."""
    return Grid(
        "Seeds",
        (
            Column("seed", style="bold"),
            Column("blueprint"),
            Column("stage"),
            Column("alpha", "right"),
            Column("rent", "right"),
            Column("contribution", "right"),
        ),
        [_seed_row(record, seen, settings) for record in seen.seeds],
    )


def _seed_row(record: SeedRecord, seen: Observation, settings: PolicySettings) -> tuple[str | Cell, ...]:
    share = seconds_share_of(Arm(slot=record.slot, blueprint=record.blueprint), seen)
    price = rent(record.parameters, record.flops_per_sample, seen, settings, share)
    stage = Cell(str(record.stage), STAGE_STYLES[record.stage])
    return record.seed, record.blueprint, stage, f"{record.alpha:.2f}", numbers.loss(price), effect(record.contribution)


def _since(seen: Observation) -> str:
    """How the gate loss moved in the last epoch."""
    if len(seen.gate_losses) < 2:
        return ""
    return f" ({numbers.signed(seen.gate_losses[-1] - seen.gate_losses[-2])})"


def _pulls(state: bytes) -> dict[Arm, int] | None:
    """Tries by arm; None where the strategy keeps a state of its own kind."""
    try:
        return {entry.arm: entry.pulls for entry in decode_state(state).arms}
    except CheckpointRejected:
        return None
