"""Tables of an attribution: what the kept seeds bring to the finished network, alone and together."""

from __future__ import annotations

from esperd.messages.growth import Attribution, Contribution, Interaction, SeedAttribution, Stage, Trial
from esperd.messages.reports import Report
from esperd.report import numbers
from esperd.report.grid import Column, Grid

MOST_INTERACTIONS = 12
"""Pairs in a table, the strongest ones; chosen, not measured."""


def attribution_grids(report: Report) -> tuple[Grid, ...]:
    """Seeds, pairs, and what was not measured; each where there is something to say."""
    if report.attribution is None:
        kept = any(seed.stage is Stage.FOSSILIZED for seed in report.seeds)
        said = Grid("Attribution", (), empty="not made: growth.attribution_share is 0, or the report is of format 1")
        return (said,) if kept else ()
    grids = [attribution_grid(report.attribution)]
    if report.attribution.interactions:
        grids.append(interactions_grid(report.attribution))
    if report.attribution.not_measured:
        grids.append(missing_grid(report.attribution))
    return tuple(grids)


def attribution_grid(found: Attribution) -> Grid:
    """What each kept seed brings to the network as it stands: left out of all, alone, and on average over every order."""
    return Grid(
        "Attribution",
        (
            Column("seed", style="bold"),
            Column("left out", "right"),
            Column("alone", "right"),
            Column("Shapley value", "right"),
        ),
        [(seed.seed, effect(seed.leave_one_out), effect(seed.solo), _shapley(seed, found.exact)) for seed in found.seeds],
        empty="no seed was kept",
        note=attribution_note(found),
    )


def attribution_note(found: Attribution) -> str:
    """How to read an attribution, and its limit."""
    orders = {
        True: "over every order of switching them on",
        False: f"over {found.permutations} orders of switching them on, ± the standard error of having sampled these",
        None: "over every order of switching them on, not known here",
    }
    levels = {each.confidence for seed in found.seeds for each in (seed.leave_one_out, seed.solo) if each is not None}
    interval = f", {min(levels):.0%} intervals" if levels else ""
    return (
        f"By how much a kept seed lowers the gate loss of the finished network ({numbers.count(found.samples)} samples"
        f"{interval}): positive is better. All on: {numbers.loss(found.loss_all_on)}; all off:"
        f" {numbers.loss(found.loss_all_off)}. Left out: the others stay on. Alone: the others are off. Shapley value: the mean"
        f" effect {orders[found.exact]}. As every contribution, these overstate what the seeds brought. It decided nothing, and"
        f" its {numbers.flops(found.flops)} are charged to no training."
    )


def strongest(found: Attribution) -> tuple[Interaction, ...]:
    """The strongest interactions first, as many as a table holds."""
    return tuple(sorted(found.interactions, key=lambda pair: -abs(pair.value))[:MOST_INTERACTIONS])


def interactions_grid(found: Attribution) -> Grid:
    """What pairs bring beyond what each of the two brings alone."""
    pairs, every = strongest(found), len(found.interactions)
    return Grid(
        "Interactions" if len(pairs) == every else f"Interactions, the {len(pairs)} strongest of {every}",
        (Column("seed", style="bold"), Column("with", style="bold"), Column("interaction", "right")),
        [(pair.first, pair.second, numbers.signed(pair.value)) for pair in pairs],
        note=INTERACTIONS_NOTE,
    )


INTERACTIONS_NOTE = (
    "What two seeds bring together beyond what each brings alone, all others off. Positive: each helps the other. Negative: they"
    " bring the same thing, or disturb each other."
)


def missing_grid(found: Attribution) -> Grid:
    """What was not measured, by the reason why."""
    by_reason: dict[str, list[str]] = {}
    for told in found.not_measured:
        what, _, why = told.rpartition(": ")
        by_reason.setdefault(why, []).append(what)
    return Grid(
        "Not attributed",
        (Column("because of"), Column("what", widest=70)),
        [(why, "; ".join(what)) for why, what in by_reason.items()],
    )


def effect(measured: Contribution | Trial | None) -> str:
    """What a seed brings with its interval; ``not measured`` when it never was."""
    return "not measured" if measured is None else numbers.interval(measured.loss, measured.lower, measured.upper)


def _shapley(seed: SeedAttribution, exact: bool | None) -> str:  # noqa: FBT001 - as the attribution says it
    if seed.shapley is None:
        return "not measured"
    if exact:
        return numbers.signed(seed.shapley)
    error = ", error unknown" if seed.shapley_error is None else f" ± {seed.shapley_error:.4f}"
    return f"{numbers.signed(seed.shapley)}{error}"
