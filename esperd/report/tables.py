"""The final tables of a job: control against grown network, every seed and what it brought, every refused arm, rollbacks."""

from __future__ import annotations

from esperd.messages.growth import Stage
from esperd.messages.reports import Metrics, Report
from esperd.report import numbers
from esperd.report.attribution import attribution_grids, effect
from esperd.report.decisions import say_remedy
from esperd.report.grid import Cell, Column, Grid

STAGE_STYLES: dict[Stage, str] = {
    Stage.DORMANT: "dim",
    Stage.GERMINATED: "cyan",
    Stage.TRAINING: "blue",
    Stage.BLENDING: "magenta",
    Stage.SHADOWING: "yellow",
    Stage.PROBATIONARY: "bright_yellow",
    Stage.FOSSILIZED: "bold green",
    Stage.CULLED: "red",
    Stage.EMBARGOED: "dim red",
    Stage.RESETTING: "dim",
}
"""How a stage is coloured wherever it is shown on a terminal."""


def report_grids(report: Report) -> tuple[Grid, ...]:
    """Every table of a report, in reading order."""
    taken_back = (rollbacks_grid(report),) if report.rollbacks or report.rollbacks is None else ()
    return (
        networks_grid(report),
        seeds_grid(report),
        reasons_grid(report),
        evidence_grid(report),
        *attribution_grids(report),
        refusals_grid(report),
        *taken_back,
    )


def networks_grid(report: Report) -> Grid:
    """The host alone (control) against the grown network, both measured once on the audit split."""
    name = report.metric_name
    differences = {"loss": _loss_difference(report), name: _metric_difference(report)}
    of_grown = _measured(report.grown, name)
    if report.control is None:
        rows = [(title, Cell(value, "bold")) for title, _, value in of_grown]
        return Grid("Networks", (Column("on the audit split"), Column("grown", "right")), rows)
    columns = (
        Column("on the audit split"),
        Column("host (control)", "right"),
        Column("grown", "right"),
        Column("difference", "right"),
    )
    compared = [
        (title, before, Cell(after, "bold"), differences.get(title) or numbers.change(value, value_before))
        for (title, value_before, before), (_, value, after) in zip(_measured(report.control, name), of_grown, strict=True)
    ]
    return Grid("Networks", columns, compared)


def _measured(network: Metrics, metric_name: str | None) -> list[tuple[str, float | None, str]]:
    """What was measured on a network: title, value, and the value as it is shown."""
    rows: list[tuple[str, float | None, str]] = [
        ("loss", network.loss, numbers.loss(network.loss)),
        ("parameters", network.parameters, numbers.count(network.parameters)),
        ("FLOPs per sample", network.flops_per_sample, numbers.flops(network.flops_per_sample)),
        ("training FLOPs", network.training_flops, numbers.flops(network.training_flops)),
        ("training time", network.training_seconds, numbers.duration(network.training_seconds)),
        ("epochs", network.epochs, f"{network.epochs:.1f}"),
    ]
    if metric_name is not None:
        rows.insert(0, (metric_name, network.metric, numbers.metric(network.metric, metric_name)))
    return rows


def seeds_grid(report: Report) -> Grid:
    """Every seed that lived: what it was, how it entered, what it cost, how it ended."""
    return Grid(
        "Seeds",
        (
            Column("seed", style="bold"),
            Column("blueprint"),
            Column("operator"),
            Column("alpha", "right"),
            Column("end"),
            Column("epochs", "right"),
            Column("parameters", "right"),
            Column("per sample", "right"),
        ),
        [
            (
                seed.seed,
                seed.blueprint,
                seed.operator or numbers.UNKNOWN,
                numbers.UNKNOWN if seed.alpha is None or seed.stage is not Stage.FOSSILIZED else f"{seed.alpha:g}",
                Cell(str(seed.stage), STAGE_STYLES[seed.stage]),
                f"{seed.germinated_epoch}-{seed.ended_epoch}",
                numbers.count(seed.parameters),
                numbers.flops(seed.flops_per_sample),
            )
            for seed in report.seeds
        ],
        empty="no seed was germinated",
    )


def evidence_grid(report: Report) -> Grid:
    """What was measured of seeds while they lived, with the limits of it; a seed of which nothing was is left out."""
    measured = [seed for seed in report.seeds if seed.contribution is not None or seed.trial is not None]
    levels = {each.confidence for seed in measured for each in (seed.contribution, seed.trial) if each is not None}
    interval = f", {min(levels):.0%} intervals" if levels else ""
    note = (
        f"By how much the seed lowers the gate loss{interval}: positive is better. A contribution compares with the network"
        " without the seed: it overstates what the seed brought, because the host has adapted to it."
    )
    columns = [Column("seed", style="bold"), Column("contribution", "right")]
    rows = [[seed.seed, effect(seed.contribution)] for seed in measured]
    if any(seed.trial is not None for seed in measured):
        note += " A trial does not: it compares with a twin that trained on without the seed for the same FLOPs."
        columns.append(Column("trial", "right"))
        rows = [[*row, effect(seed.trial)] for row, seed in zip(rows, measured, strict=True)]
    return Grid("What each seed brought", columns, rows, empty="of no seed this was measured", note=note)


def reasons_grid(report: Report) -> Grid:
    """Why each seed ended as it did, in a grid of its own: reasons are sentences."""
    return Grid(
        "Why",
        (Column("seed", style="bold"), Column("end"), Column("because", widest=76)),
        [(seed.seed, Cell(str(seed.stage), STAGE_STYLES[seed.stage]), seed.reason) for seed in report.seeds],
        empty="no seed was germinated",
    )


def _silent(report: Report) -> str:
    """That the policy did not decide; empty where it always did."""
    if not report.policy_unavailable:
        return ""
    points = "1 decision point" if report.policy_unavailable == 1 else f"{report.policy_unavailable} decision points"
    return f"At {points} the policy decided nothing, because it failed or did not answer; esper events says why."


def refusals_grid(report: Report) -> Grid:
    """What was wanted and not grown."""
    silent = _silent(report)
    return Grid(
        "Refused",
        (
            Column("epoch", "right"),
            Column("slot", style="bold"),
            Column("blueprint"),
            Column("by"),
            Column("reason", widest=60),
        ),
        [(str(arm.epoch), arm.slot, arm.blueprint, arm.by, arm.reason) for arm in report.refused],
        empty=f"nothing was refused. {silent}" if silent else "nothing was refused",
        note=silent,
    )


def rollbacks_grid(report: Report) -> Grid:
    """Catastrophes of training, and what was done about them."""
    return Grid(
        "Rolled back",
        (
            Column("network", style="bold"),
            Column("at epoch", "right"),
            Column("back to", "right"),
            Column("reason", widest=44),
            Column("then", widest=24),
        ),
        [
            (
                "control" if each.phase == "control" else "grown",
                str(each.epoch),
                str(each.to_epoch),
                each.reason,
                say_remedy(each.action, each.rate_scale),
            )
            for each in report.rollbacks or ()
        ],
        empty="nothing was rolled back" if report.rollbacks is not None else "the report is of format 1, which does not say",
    )


def _loss_difference(report: Report) -> str:
    if report.comparison is None:
        return numbers.UNKNOWN
    measured = report.comparison
    return numbers.interval(-measured.loss, -measured.loss_upper, -measured.loss_lower)


def _metric_difference(report: Report) -> str:
    measured = report.comparison
    if measured is None or measured.metric is None:
        return numbers.UNKNOWN
    scale, places = (100.0, 2) if report.metric_name in numbers.SHARES else (1.0, 4)
    ends = [None if end is None else end * scale for end in (measured.metric_lower, measured.metric_upper)]
    return numbers.interval(measured.metric * scale, ends[0], ends[1], places)
