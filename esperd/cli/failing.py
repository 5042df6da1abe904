"""Why a job failed, for a person to read."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from esperd.messages.failures import Attempt, FailureAnalysis, Frame
from esperd.report import numbers
from esperd.report.grid import Column, Grid


def lines(found: FailureAnalysis) -> Iterator[tuple[str, str]]:
    """Text and style of every line above the table of attempts."""
    yield f"{found.job} ({found.name or 'no name'}) is {found.state}", "bold"
    yield f"what: {found.error.code}: {found.error.message}", "red"
    if found.where is not None:
        yield f"where: {_place(found.where)}", ""
        for frame in found.frames:
            if frame is not found.where:
                yield f"  {frame.owner}: {_place(frame)}", "dim"
    times = "once" if found.same_in_a_row == 1 else f"{found.same_in_a_row} attempts in a row"
    yield f"since: {_when(found.since)}, {times}", ""
    yield f"what changed: {'; '.join(found.changed) or 'nothing that is recorded'}", ""
    for advice in found.advice:
        yield f"try: {advice}", "cyan"


def attempts_grid(attempts: tuple[Attempt, ...]) -> Grid:
    """Every attempt, oldest first."""
    return Grid(
        "",
        (
            Column("attempt", "right"),
            Column("began"),
            Column("from epoch", "right"),
            Column("to epoch", "right"),
            Column("ended"),
            Column("why", widest=60),
        ),
        [
            (
                str(attempt.number),
                _when(attempt.leased_at),
                numbers.count(attempt.from_epoch),
                numbers.count(attempt.epoch),
                attempt.ended or "runs",
                "; ".join(filter(None, (attempt.error.message if attempt.error else "", attempt.note))),
            )
            for attempt in attempts
        ],
        empty="no attempt was recorded",
    )


def _place(frame: Frame) -> str:
    code = f": {frame.code}" if frame.code else ""
    return f"{frame.file}:{frame.line} in {frame.function}{code}"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")
