"""A finished job as one self-contained HTML page: no script, no font, no image from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from esperd.messages.growth import Attribution, Stage
from esperd.messages.jobs import Job
from esperd.messages.reports import Report
from esperd.messages.telemetry import DecisionMade, Event, GateEvaluated, RolledBack, StageChanged
from esperd.report import numbers
from esperd.report.attribution import (
    INTERACTIONS_NOTE,
    attribution_grid,
    attribution_grids,
    effect,
    interactions_grid,
    missing_grid,
)
from esperd.report.decisions import say_decision, say_remedy
from esperd.report.grid import Cell, Column, Grid
from esperd.report.history import History, history_of
from esperd.report.plots import draw_plots
from esperd.report.tables import evidence_grid, networks_grid, reasons_grid, refusals_grid, rollbacks_grid, seeds_grid
from esperd.report.verdict import Judgement, Paid, judge

SMALLEST_MATRIX = 3
"""Seeds from which on pairs are shown as a matrix: of two there is one pair."""

_VERDICT_CLASSES = {Paid.YES: "yes", Paid.NO: "no", Paid.UNDECIDED: "undecided", Paid.UNKNOWN: "unknown"}


def render_html(report: Report, events: Sequence[Event], job: Job | None = None) -> str:
    """Write a job's report as an HTML page.

    Args:
        report: what the job found.
        events: its events, oldest first: plots and the decision log are made of them.
        job: its configuration; None leaves that section out.

    Returns:
        The whole page. Every text in it that came from outside is escaped.

    Raises:
        MissingExtra: when matplotlib is not installed.
    """
    history = history_of(events)
    plots = draw_plots(history, report)
    title = report.name or report.job
    sections = [
        _header(report, title),
        _verdict(judge(report)),
        _figures(report),
        _section("Networks", _card(networks_grid(report)), note=_audit_note(report)),
        _plots_section("Training", plots, ("training", "equal_flops")),
        _pair_section("Growth", plots),
        _section(
            "Seeds", _card(seeds_grid(report)) + _card(reasons_grid(report)) + _details("Screenings", _screenings_grid(history))
        ),
        _section("What each seed brought", _card(evidence_grid(report))) if report.seeds else "",
        _attribution(report, plots),
        _section("Refused", _card(refusals_grid(report))),
        _section("Rolled back", _card(rollbacks_grid(report))) if report.rollbacks else "",
        _section("Decisions", _card(_decisions_grid(history)) + _details("Stages and gates", _turns_grid(history))),
        _plots_section("Cost", plots, ("flops",)),
        _configuration(job) if job is not None else "",
        _footer(report),
    ]
    style = resources.files("esperd.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}: grown by esperd</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def write_html(path: Path, report: Report, events: Sequence[Event], job: Job | None = None) -> None:
    """Render a page into a file; its folder is made when it does not exist.

    Raises:
        MissingExtra: when matplotlib is not installed.
        OSError: when the file cannot be written.
    """
    page = render_html(report, events, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _header(report: Report, title: str) -> str:
    facts = [
        f"job {report.job}",
        f"RNG seed {report.rng_seed}",
        report.device,
        f"esperd {report.esperd}",
        f"torch {report.torch}",
    ]
    if report.resumed:
        facts.append(f"resumed {report.resumed} times")
    if report.policy_unavailable:
        facts.append(f"policy unavailable at {report.policy_unavailable} decision points")
    told = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (
        f'<header>\n<p class="program">esperd growth report</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="facts">{told}</p>\n</header>\n'
    )


def _verdict(judgement: Judgement) -> str:
    price = f'<p class="price">Price: {escape(judgement.price)}</p>' if judgement.price else ""
    headline = str(judgement.paid).capitalize()
    return (
        f'<section class="verdict {_VERDICT_CLASSES[judgement.paid]}"><strong>{escape(headline)}</strong>'
        f"<p>{escape(judgement.because)}</p>{price}</section>\n"
    )


def _figures(report: Report) -> str:
    """The four numbers a reader looks for first."""
    grown, control = report.grown, report.control
    shown: list[tuple[str, str, str]] = []
    if report.metric_name is not None:
        before = numbers.metric(control.metric, report.metric_name) if control else ""
        shown.append((f"{report.metric_name}, audit", numbers.metric(grown.metric, report.metric_name), before))
    shown += [
        ("loss, audit", numbers.loss(grown.loss), numbers.loss(control.loss) if control else ""),
        ("parameters", numbers.count(grown.parameters), numbers.count(control.parameters) if control else ""),
        (
            "forward, per sample",
            numbers.flops(grown.flops_per_sample),
            numbers.flops(control.flops_per_sample) if control else "",
        ),
    ]
    cards = [
        f'<div class="figure"><div class="name">{escape(name)}</div><div class="value">{escape(value)}</div>'
        f'<div class="before">{f"control {escape(before)}" if before else "grown network"}</div></div>'
        for name, value, before in shown
    ]
    return f'<div class="figures">{"".join(cards)}</div>\n'


def _audit_note(report: Report) -> str:
    if report.comparison is None:
        return "Measured once, on the audit split, which nothing was chosen on."
    return (
        f"Measured once, on the {report.comparison.samples} samples of the audit split, which nothing was chosen on. "
        f"Differences are paired per sample, with their {report.comparison.confidence:.0%} interval; they hold for this RNG seed."
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}{_note(note)}</section>\n"


def _plots_section(title: str, plots: dict[str, str], names: Sequence[str]) -> str:
    drawn = [f'<div class="card">{plots[name]}</div>' for name in names if name in plots]
    return _section(title, f'<div class="stack">{"".join(drawn)}</div>\n') if drawn else ""


def _pair_section(title: str, plots: dict[str, str]) -> str:
    pair = [f'<div class="card">{plots[name]}</div>' for name in ("parameters", "alpha") if name in plots]
    wide = [f'<div class="card">{plots["contributions"]}</div>'] if "contributions" in plots else []
    if not pair and not wide:
        return ""
    return _section(title, f'<div class="stack"><div class="pair">{"".join(pair)}</div>{"".join(wide)}</div>\n')


def _attribution(report: Report, plots: dict[str, str]) -> str:
    """What the kept seeds bring together: a picture, the numbers, pairs as a matrix where there are three seeds or more."""
    found = report.attribution
    if found is None:
        return "".join(_section("Attribution", _card(grid)) for grid in attribution_grids(report))
    parts = [f'<div class="card">{plots["attribution"]}</div>\n'] if "attribution" in plots else []
    parts.append(_card(attribution_grid(found)))
    if found.interactions:
        pairs = _matrix(found) if len(found.seeds) >= SMALLEST_MATRIX else _card(interactions_grid(found))
        parts.append(f"<h3>Interactions</h3>\n{pairs}")
    if found.not_measured:
        parts.append(f"<h3>Not attributed</h3>\n{_card(missing_grid(found))}")
    return _section("Attribution", "".join(parts))


def _matrix(found: Attribution) -> str:
    """Interactions of all pairs, coloured by sign and strength."""
    names = [seed.seed for seed in found.seeds]
    values = {frozenset((pair.first, pair.second)): pair.value for pair in found.interactions}
    strongest = max(map(abs, values.values())) or 1.0
    head = "".join(f'<th class="right">{escape(name)}</th>' for name in names)
    rows = []
    for name in names:
        cells = []
        for other in names:
            value = values.get(frozenset((name, other)))
            if value is None:
                cells.append(f'<td class="right">{"" if other == name else numbers.UNKNOWN}</td>')
                continue
            side = "helps" if value > 0 else "disturbs"
            cells.append(
                f'<td class="right {side}" style="--strength: {abs(value) / strongest:.0%}">{numbers.signed(value)}</td>'
            )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    table = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="card">{table}</div>\n{_note(INTERACTIONS_NOTE)}'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def _card(grid: Grid) -> str:
    return f'<div class="card">{_table(grid)}</div>\n{_note(grid.note if grid.rows else "")}'


def _details(title: str, grid: Grid) -> str:
    if not grid.rows:
        return ""
    return f"<details><summary>{escape(title)} ({len(grid.rows)})</summary>{_table(grid)}</details>\n"


def _table(grid: Grid) -> str:
    if not grid.rows:
        return f'<p class="empty">{escape(grid.empty)}</p>'
    head = "".join(f'<th class="{column.align}">{escape(column.title)}</th>' for column in grid.columns)
    rows = "".join(
        f"<tr>{''.join(_cell(cell, column) for cell, column in zip(row, grid.columns, strict=True))}</tr>" for row in grid.rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cell(cell: str | Cell, column: Column) -> str:
    text, style = (cell.text, cell.style) if isinstance(cell, Cell) else (cell, "")
    classes = [column.align, "whole" if column.widest is None else "wide"]
    if "bold" in column.style or "bold" in style:
        classes.append("strong")
    shown = escape(text)
    if text in set(Stage):
        shown = f'<span class="pill" style="color: var(--stage-{shown})">{shown}</span>'
    return f'<td class="{" ".join(classes)}">{shown}</td>'


def _decisions_grid(history: History) -> Grid:
    """Every decision; a wait repeated for the same reason is one row over its epochs."""
    rows: list[tuple[str | Cell, ...]] = []
    for made, first in _folded(history.decisions):
        decision = made.decision
        waits = decision.action == "wait"
        outcome = "" if waits else ("applied" if made.applied else f"refused: {made.refusal}")
        rows.append(
            (
                str(made.epoch) if made.epoch == first else f"{first}-{made.epoch}",
                Cell(say_decision(decision), "" if waits else "bold"),
                numbers.UNKNOWN if decision.score is None else f"{decision.score:.4f}",
                decision.reason,
                outcome,
            )
        )
    columns = (
        Column("epoch", "right"),
        Column("decision", widest=36),
        Column("score", "right"),
        Column("because", widest=60),
        Column("outcome", widest=30),
    )
    return Grid("", columns, rows, empty="no decision was recorded")


def _folded(decisions: Sequence[DecisionMade]) -> list[tuple[DecisionMade, int]]:
    """Decisions, each with the epoch since which it stands unchanged."""
    folded: list[tuple[DecisionMade, int]] = []
    for made in decisions:
        if folded and made.decision.action == "wait" and made.decision == folded[-1][0].decision:
            folded[-1] = (made, folded[-1][1])
        else:
            folded.append((made, made.epoch))
    return folded


def _turns_grid(history: History) -> Grid:
    rows: list[tuple[str, str, str, str]] = []
    for turn in history.turns:
        if isinstance(turn, StageChanged):
            rows.append((str(turn.epoch), turn.seed, f"{turn.before} → {turn.after}", turn.reason))
        elif isinstance(turn, GateEvaluated):
            verdict = turn.verdict
            said = "passed" if verdict.passed else "failed"
            rows.append((str(turn.epoch), turn.seed, f"{verdict.gate} {said}", verdict.reason))
        elif isinstance(turn, RolledBack):
            remedy = say_remedy(turn.action, turn.rate_scale)
            rows.append((str(turn.epoch), "", f"rolled back to epoch {turn.to_epoch}", f"{turn.reason}; {remedy}"))
        else:
            rows.append((str(turn.epoch), "", "policy unavailable", turn.reason))
    columns = (Column("epoch", "right"), Column("seed"), Column("what"), Column("because", widest=60))
    return Grid("", columns, rows)


def _screenings_grid(history: History) -> Grid:
    """Every candidate of every screening, with what switching it on promised."""
    rows = []
    for ended in history.screenings:
        for each in ended.candidates:
            won = each.seed == ended.winner
            style = "bold" if won else ""
            rows.append(
                (str(ended.epoch), Cell(each.seed, style), each.blueprint, effect(each.prospect), "goes on" if won else "is out")
            )
    columns = (
        Column("epoch", "right"),
        Column("candidate"),
        Column("blueprint"),
        Column("switched on it would bring", "right"),
        Column("then"),
    )
    return Grid("", columns, rows)


def _configuration(job: Job) -> str:
    values: dict[str, Any] = msgspec.to_builtins(job)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [_assignment(key, value) for key, value in values.items() if key not in tables and value is not None]
    for name, table in tables.items():
        if not table:
            continue
        lines += ["", f"[{name}]"]
        lines += [_assignment(key, value) for key, value in table.items() if value is not None]
    written = "\n".join(lines)
    return _section("Configuration", f"<details><summary>The job, every key</summary><pre>{written}</pre></details>\n")


def _assignment(key: str, value: Any) -> str:  # noqa: ANN401 - a value of a job
    return escape(f"{key} = {json.dumps(value, ensure_ascii=False)}")


def _footer(report: Report) -> str:
    return (
        f"<footer>Written by esperd {escape(report.esperd)}. This page is complete in itself: it loads nothing from "
        "anywhere.</footer>\n"
    )
