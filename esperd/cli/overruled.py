"""What people say about decisions: a command line as a wish, proposals and replays as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import click
import msgspec

from esperd.messages.jobs import Job
from esperd.messages.overruling import ProposalList, ReplayedPoint, Wish
from esperd.messages.policy import Decision
from esperd.report import numbers
from esperd.report.decisions import say_decision
from esperd.report.grid import Cell, Column, Grid


class Wished(TypedDict, total=False):
    """Arguments of ``JobHandle.overrule``."""

    wish: Wish
    slot: str
    blueprint: str
    seed: str
    number: int | None


def with_approval(job: Job) -> Job:
    """The same job, in which people approve what is done to the structure."""
    return msgspec.structs.replace(job, policy=msgspec.structs.replace(job.policy, approve=True))


def wish_of(words: Sequence[str]) -> Wished | None:
    """Read ``grow SLOT BLUEPRINT``, ``keep SEED``, ``cull SEED``, ``wait``, ``approve [N]``; None for no words.

    Raises:
        click.UsageError: for anything else.
    """
    match list(words):
        case []:
            return None
        case ["grow", slot, blueprint]:
            return {"wish": "grow", "slot": slot, "blueprint": blueprint}
        case ["keep" | "cull" as wish, seed]:
            return {"wish": "keep" if wish == "keep" else "cull", "seed": seed}
        case ["wait"]:
            return {"wish": "wait"}
        case ["approve"]:
            return {"wish": "approve", "number": None}
        case ["approve", number] if number.isascii() and number.isdigit() and int(number) >= 1:
            return {"wish": "approve", "number": int(number)}
    raise click.UsageError(
        f"{' '.join(words)!r} is not something to decide; say one of: grow SLOT BLUEPRINT, keep SEED, cull SEED, wait, approve, "
        "approve N"
    )


def proposals_grid(listed: ProposalList, job: Job) -> Grid:
    """What awaits approval."""
    if job.policy.approve:
        empty = "nothing awaits approval" if listed.point is not None else "nothing awaits approval: no decision point came yet"
    else:
        empty = "nothing awaits approval: this job's policy decides by itself (policy.approve = false)"
    return Grid(
        "",
        (
            Column("n", "right", style="bold"),
            Column("proposal", widest=40),
            Column("score", "right"),
            Column("because", widest=60),
        ),
        [
            (str(number), say_decision(proposal), score(proposal), proposal.reason)
            for number, proposal in enumerate(listed.proposals, start=1)
        ],
        empty=empty,
        note=f"Of decision point {listed.point}; what nobody answers is replaced by the next point's proposals.",
    )


def said_grid(listed: ProposalList) -> Grid:
    """What people said for the next decision point."""
    rows = [(say_decision(word), word.by, word.reason) for word in listed.said]
    columns = (Column("decision", style="bold", widest=40), Column("by"), Column("because", widest=60))
    return Grid("Said for the next decision point", columns, rows)


def replay_grid(points: Sequence[ReplayedPoint]) -> Grid:
    """Points whose answer differs from the logged one, or could not be computed; none where all are the same."""
    rows = [
        (str(found.point), Cell("differs", "bold red") if found.same is False else Cell("not known", "yellow"), found.difference)
        for found in points
        if not found.same
    ]
    return Grid("", (Column("point", "right", style="bold"), Column("replay"), Column("difference", widest=80)), rows)


def replay_line(points: Sequence[ReplayedPoint]) -> str:
    """How many points came out as they were logged."""
    if not points:
        return "no decision was logged yet"
    same = sum(found.same is True for found in points)
    return f"{same} of {len(points)} decision points come out the same, byte for byte"


def score(decision: Decision) -> str:
    """A decision's score; unknown where it has none."""
    return numbers.UNKNOWN if decision.score is None else f"{decision.score:.4f}"
