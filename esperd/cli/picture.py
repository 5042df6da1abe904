"""The picture of a job on a terminal, drawn with rich from a :class:`~esperd.cli.job_view.JobView`; reads well at 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esperd.cli.job_view import JobView
from esperd.messages.growth import Contribution, SeedRecord, Stage, Trial
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted
from esperd.report import numbers
from esperd.report.decisions import say_decision, say_rollback
from esperd.report.tables import STAGE_STYLES

WIDEST = 100
ALPHA_WIDTH = 6
SPARK_WIDTH = 40
FIGURES_A_ROW = 3
SEEDS_SHOWN = 8
ROOMY = 90
"""Columns inside the frame from which on seeds are shown with their blueprint and alpha as a bar."""
BLOCKS = "▁▂▃▄▅▆▇█"

STATE_STYLES: dict[JobState, str] = {
    JobState.QUEUED: "yellow",
    JobState.LEASED: "cyan",
    JobState.RUNNING: "bold cyan",
    JobState.PAUSED: "yellow",
    JobState.SUCCEEDED: "bold green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "red",
    JobState.DEAD: "bold red",
}


def draw(view: JobView) -> RenderableType:
    """A panel with progress, losses, seeds, the last decisions and kernels."""
    parts: list[RenderableType] = [_progress(view)]
    if view.epoch is not None:
        parts += [_figures(view, view.epoch), _curve(view)]
    if view.seeds:
        parts += [Text(), _Seeds(view)]
    if view.decisions:
        parts += [Text(), _decisions(view)]
    parts += [Text(), _footer(view)]
    if view.rollbacks:
        times = f"{len(view.rollbacks)} times, the last time: " if len(view.rollbacks) > 1 else ""
        parts.append(Text(f"rolled back: {times}{say_rollback(view.rollbacks[-1])}", style="yellow"))
    if view.error is not None:
        parts.append(Text(view.error.message, style="bold red"))
    if view.export_failed is not None:
        told = f"{view.export_failed.directory} could not be written: {view.export_failed.reason}"
        parts.append(Text(f"{told}; `esper export {view.job}` writes the model elsewhere", style="yellow"))
    panel = Panel(
        Group(*parts),
        title=_title(view),
        title_align="left",
        subtitle=Text(f" {view.state} ", style=STATE_STYLES[view.state]),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="dim",
        padding=(0, 1),
    )
    return Constrain(panel, WIDEST)


def sparkline(values: tuple[float, ...], width: int = SPARK_WIDTH) -> str:
    """Values as bars from the lowest to the highest, averaged into ``width`` columns when there are more."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(index * len(values) / columns) for index in range(columns + 1)]
    means = [sum(values[low:high]) / (high - low) for low, high in pairwise(edges)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def alpha_bar(alpha: float, width: int = ALPHA_WIDTH) -> str:
    """Alpha as a bar with its value."""
    full = round(alpha * width)
    return f"{'█' * full}{'░' * (width - full)} {alpha:.2f}"


def _title(view: JobView) -> Text:
    title = Text.assemble((f" {view.name or view.job} ", "bold"))
    if view.name:
        title.append(f"{view.job} ", style="dim")
    return title


def _progress(view: JobView) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=8)
    grid.add_column(width=40)
    grid.add_column(justify="right", width=5)
    grid.add_column()
    share = view.epoch.progress if view.epoch is not None else 0.0
    finished = view.state is JobState.SUCCEEDED
    phase = view.epoch.phase if view.epoch is not None else "waiting"
    style = "green" if finished else ("blue" if phase == "control" else "cyan")
    bar = ProgressBar(total=1.0, completed=1.0 if finished else share, width=40, complete_style=style, finished_style=style)
    told = [_epoch_of(view)]
    if view.elapsed_s is not None:
        told.append(numbers.duration(view.elapsed_s))
    if view.attempt > 1:
        told.append(f"attempt {view.attempt}")
    grid.add_row(Text(phase, style=style), bar, f"{share:.0%}", Text(" · ".join(told), style="dim"))
    return grid


def _epoch_of(view: JobView) -> str:
    if view.epoch is None:
        return "no epoch yet"
    limit = view.training.epochs if view.training is not None and view.epoch.phase == "growth" else None
    return f"epoch {view.epoch.epoch}" + (f"/{limit}" if limit is not None else "")


def _figures(view: JobView, epoch: EpochCompleted) -> RenderableType:
    host = view.training
    figures = [("train loss", numbers.loss(epoch.train_loss)), ("gate loss", numbers.loss(epoch.gate_loss))]
    if epoch.gate_metric is not None:
        figures.append((view.metric_name or "metric", numbers.metric(epoch.gate_metric, view.metric_name)))
    figures += [
        ("parameters", _grown(numbers.count(epoch.parameters), epoch.parameters, host.host_parameters if host else None)),
        (
            "per sample",
            _grown(
                numbers.flops(epoch.flops_per_sample),
                epoch.flops_per_sample,
                host.host_flops_per_sample if host else None,
            ),
        ),
        ("charged", numbers.flops(epoch.training_flops)),
        ("learning rate", f"{epoch.learning_rate:.2e}"),
        ("epoch took", numbers.duration(epoch.seconds)),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(FIGURES_A_ROW):
        grid.add_column(style="dim", no_wrap=True, min_width=10)
        grid.add_column(no_wrap=True, min_width=18)
    for start in range(0, len(figures), FIGURES_A_ROW):
        cells = [text for figure in figures[start : start + FIGURES_A_ROW] for text in figure]
        grid.add_row(*cells, *[""] * (2 * FIGURES_A_ROW - len(cells)))
    return Group(Text(), grid, Text())


def _grown(shown: str, value: float, host: float | None) -> str:
    return f"{shown} {numbers.change(value, host)}" if host and value != host else shown


def _curve(view: JobView) -> RenderableType:
    if len(view.gate_losses) < 2:
        return Text()
    return Text.assemble(
        ("gate loss  ", "dim"),
        (f"{view.gate_losses[0]:.3f} ", "dim"),
        (sparkline(view.gate_losses), "cyan"),
        (f" {view.gate_losses[-1]:.3f}", ""),
        (f"   best {min(view.gate_losses):.3f}", "dim"),
    )


class _Seeds:
    """The newest seeds, then the candidates of each screening that runs, under one line that says so."""

    def __init__(self, view: JobView) -> None:
        self._grown = [seed for seed in view.seeds.values() if not seed.screening]
        self._candidates = [seed for seed in view.seeds.values() if seed.screening]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        roomy = options.max_width >= ROOMY
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
        table.add_column("seed", style="bold", no_wrap=True, max_width=22, overflow="ellipsis")
        if roomy:
            table.add_column("blueprint", max_width=20)
        table.add_column("stage", no_wrap=True)
        table.add_column("alpha", no_wrap=True)
        table.add_column("brings", no_wrap=True)
        for seed, cells in self._rows(roomy=roomy):
            blueprint = [Text(seed.blueprint if seed else "", no_wrap=True, overflow="ellipsis")] if roomy else []
            table.add_row(cells[0], *blueprint, *cells[1:])
        yield table

    def _rows(self, *, roomy: bool) -> Iterator[tuple[SeedRecord | None, tuple[Text, ...]]]:
        """Seed, if the row is one's, and its cells but for the blueprint, which gives way where numbers need the room."""
        for seed in self._grown[-SEEDS_SHOWN:]:
            style = STAGE_STYLES[seed.stage]
            alpha = Text(alpha_bar(seed.alpha) if roomy else f"{seed.alpha:.2f}")
            alpha.stylize("dim" if seed.stage is Stage.CULLED else style)
            yield seed, (Text(seed.seed), Text(f"● {seed.stage}", style=style), alpha, _brings(seed))
        if len(self._grown) > SEEDS_SHOWN:
            yield None, (Text(f"… {len(self._grown) - SEEDS_SHOWN} earlier", style="dim"),)
        yield from self._screenings()

    def _screenings(self) -> Iterator[tuple[SeedRecord | None, tuple[Text, ...]]]:
        """Each screening that runs as a group of its candidates; those that are out, of all screenings, as one number."""
        running: dict[str, list[SeedRecord]] = {}
        for seed in self._candidates:
            if seed.stage is not Stage.CULLED:
                running.setdefault(seed.screening, []).append(seed)
        for together in running.values():
            yield None, (Text("screening", style="cyan"), Text(f"● {len(together)} candidates", style="cyan"))
            for seed in together:
                branch = "└" if seed is together[-1] else "├"
                yield seed, (Text(f"{branch} {seed.seed}", style="not bold"), Text(), Text(), _brings(seed))
        out = len(self._candidates) - sum(map(len, running.values()))
        if out:
            yield None, (Text(), Text(f"{out} screened out", style="dim"))


def _brings(seed: SeedRecord) -> Text:
    """By how much a seed lowers the loss: contribution and trial; before there is any, what it would be were it on."""
    told = [_effect("", seed.contribution)] if seed.contribution is not None else []
    if seed.trial is not None:
        told.append(_effect("trial ", seed.trial))
    if not told and seed.prospect is not None:
        told.append(_effect("if on ", seed.prospect))
    return Text("\n").join(told) if told else Text("not measured", style="dim")


def _effect(what: str, measured: Contribution | Trial) -> Text:
    style = "green" if measured.lower > 0 else ("red" if measured.upper < 0 else "yellow")
    return Text.assemble((what, "dim"), (numbers.interval(measured.loss, measured.lower, measured.upper), style))


def _decisions(view: JobView) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False, expand=True)
    table.add_column("epoch", justify="right", style="dim", width=5)
    table.add_column("decision", max_width=40, overflow="fold")
    table.add_column("because", style="dim", ratio=1, overflow="fold")
    for made in view.decisions:
        style = {"germinate": "cyan", "fossilize": "green", "cull": "red"}.get(made.decision.action, "")
        reason = made.decision.reason if made.applied else f"refused: {made.refusal}"
        said = Text(say_decision(made.decision), style=style if made.applied else "yellow")
        table.add_row(str(made.epoch), said, Text(reason))
    return table


def _footer(view: JobView) -> Text:
    kernels = ", ".join(f"{count} {'from ' if source != 'compiled' else ''}{source}" for source, count in view.kernels.items())
    told = [f"kernels {kernels or 'none loaded'}", f"checkpoints {view.checkpoints}"]
    if view.policy_unavailable:
        told.append(f"decision points without a policy {view.policy_unavailable}")
    for network, metrics in view.audits.items():
        score = f" {numbers.metric(metrics.metric, view.metric_name)}" if metrics.metric is not None else ""
        told.append(f"audit of {network}{score} loss {numbers.loss(metrics.loss)}")
    return Text(" · ".join(told), style="dim")
