"""A job's plots as inline SVG whose colours are CSS variables, so that a page can be light or dark. Drawn by matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esperd.errors import MissingExtra
from esperd.messages.growth import Attribution, Contribution, Stage, Trial
from esperd.messages.reports import Report
from esperd.messages.telemetry import EpochCompleted
from esperd.report import numbers
from esperd.report.history import History, SeedHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 9.2

# matplotlib knows colours, not CSS variables: it draws with these, and each becomes `var(--NAME)` in the SVG.
_MARKERS = {
    name: f"#fe{index:02x}01"
    for index, name in enumerate(
        (
            "ink",
            "muted",
            "line",
            "card",
            "grown",
            "control",
            "seed-0",
            "seed-1",
            "seed-2",
            "seed-3",
            "seed-4",
            "seed-5",
            *(f"stage-{stage}" for stage in Stage),
            "bad",
        )
    )
}
_VARIABLES = {marker: f"var(--{name})" for name, marker in _MARKERS.items()}
_MARKER = re.compile("|".join(_VARIABLES))
_IDENTIFIER = re.compile(r'(\bid="|url\(#|xlink:href="#)([^")]+)')
SEED_COLOURS = 6


def draw_plots(history: History, report: Report) -> dict[str, str]:
    """Draw what a job's history and its report allow.

    Args:
        history: the job's events as series.
        report: what the job found.

    Returns:
        SVG elements by name: ``training``, ``equal_flops``, ``alpha``, ``parameters``, ``contributions``, ``attribution``,
        ``flops``. A plot without data is absent.

    Raises:
        MissingExtra: when matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtra('plots need matplotlib: pip install "esperd[report]"', extra="report", package="matplotlib") from error
    plots: dict[str, Callable[[], Figure | None]] = {
        "training": lambda: _training(history, report.metric_name),
        "equal_flops": lambda: _equal_flops(history),
        "alpha": lambda: _alpha(history),
        "parameters": lambda: _parameters(history),
        "contributions": lambda: _contributions(history),
        "attribution": lambda: _attribution(report),
        "flops": lambda: _flops(report.flops),
    }
    with mpl.rc_context(_settings()):
        drawn = {name: draw() for name, draw in plots.items()}
        return {name: _svg(figure, name) for name, figure in drawn.items() if figure is not None}


def _settings() -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "esperd",
        "font.size": 9.5,
        "text.parse_math": False,
        "text.color": _MARKERS["ink"],
        "axes.labelcolor": _MARKERS["muted"],
        "axes.edgecolor": _MARKERS["line"],
        "axes.facecolor": "none",
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _MARKERS["line"],
        "grid.linewidth": 0.6,
        "xtick.color": _MARKERS["line"],
        "ytick.color": _MARKERS["line"],
        "xtick.labelcolor": _MARKERS["muted"],
        "ytick.labelcolor": _MARKERS["muted"],
        "figure.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }


def _figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def _training(history: History, metric_name: str | None) -> Figure | None:
    """Loss, metric and the seeds' stages over the epochs, one above the other."""
    if not history.growth:
        return None
    has_metric = any(epoch.gate_metric is not None for epoch in history.growth)
    heights = [2.6, *([2.0] if has_metric else []), *([0.45 + 0.3 * len(history.seeds)] if history.seeds else [])]
    figure = _figure(sum(heights) + 0.4)
    axes = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])
    last = history.growth[-1].epoch
    # The control trains more epochs for the same FLOPs; all of them are in the plot over FLOPs.
    history = replace(history, control=tuple(epoch for epoch in history.control if epoch.epoch <= last))
    _loss_axis(axes[0], history)
    if has_metric:
        _metric_axis(axes[1], history, metric_name)
    if history.seeds:
        _stages_axis(axes[-1], history)
        for axis in axes[:-1]:
            _shade_stages(axis, history)
    _epochs_along(axes[-1])
    axes[-1].set_xlim(0.5, last + 0.5)
    return figure


def _loss_axis(axis: Axes, history: History) -> None:
    for epochs, colour, name in _phases(history):
        at = [epoch.epoch for epoch in epochs]
        axis.plot(at, [epoch.gate_loss for epoch in epochs], color=colour, label=f"{name}, gate")
        axis.plot(at, [epoch.train_loss for epoch in epochs], color=colour, linewidth=1, linestyle=":", label=f"{name}, train")
    if all(epoch.gate_loss > 0 and epoch.train_loss > 0 for epoch in (*history.growth, *history.control)):
        _logarithmic(axis)
    for index, back in enumerate(history.rollbacks):
        label = "_" if index else "rolled back"  # a label that begins so is in no legend
        axis.axvline(back.to_epoch + 0.5, color=_MARKERS["bad"], linewidth=1.2, linestyle="--", label=label)
    axis.set_title("loss")
    axis.legend(ncols=5, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)


def _logarithmic(axis: Axes) -> None:
    """A logarithmic y-axis whose ticks are written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _epochs_along(axis: Axes) -> None:
    """An x-axis of whole epochs."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")


def _legend_below(figure: Figure, axis: Axes, columns: int) -> None:
    """Names under the plot, where they cover no line."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)), columnspacing=1.2)


def _metric_axis(axis: Axes, history: History, metric_name: str | None) -> None:
    scale = 100.0 if metric_name in numbers.SHARES else 1.0
    for epochs, colour, name in _phases(history):
        measured = [(epoch.epoch, epoch.gate_metric * scale) for epoch in epochs if epoch.gate_metric is not None]
        axis.plot([at for at, _ in measured], [value for _, value in measured], color=colour, label=name)
    axis.set_title(f"{metric_name or 'metric'} on the gate split" + (", %" if scale == 100.0 else ""))
    axis.legend(ncols=2, loc="lower right")


def _stages_axis(axis: Axes, history: History) -> None:
    from matplotlib.patches import Patch

    for row, seed in enumerate(history.seeds):
        for span in seed.spans:
            width = span.last - span.first + 1
            axis.barh(row, width, left=span.first - 0.5, height=0.62, color=_MARKERS[f"stage-{span.stage}"], linewidth=0)
    axis.set_yticks(range(len(history.seeds)), [f"{seed.seed}  {seed.blueprint}" for seed in history.seeds])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_title("stages of the seeds")
    seen = {span.stage for seed in history.seeds for span in seed.spans}
    patches = [Patch(color=_MARKERS[f"stage-{stage}"], label=str(stage)) for stage in Stage if stage in seen]
    axis.figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), handlelength=1, handleheight=1)


def _shade_stages(axis: Axes, history: History) -> None:
    """Bands in which some seed blends or is on probation: there the network changes."""
    for seed in history.seeds:
        for span in seed.spans:
            if span.stage in (Stage.BLENDING, Stage.PROBATIONARY):
                colour = _MARKERS[f"stage-{span.stage}"]
                axis.axvspan(span.first - 0.5, span.last + 0.5, color=colour, alpha=0.10, linewidth=0)


def _equal_flops(history: History) -> Figure | None:
    """Gate loss over training FLOPs: the comparison the verdict is about."""
    if not history.growth or not history.control:
        return None
    figure = _figure(2.5)
    axis = figure.subplots()
    for epochs, colour, name in _phases(history):
        axis.plot([epoch.training_flops for epoch in epochs], [epoch.gate_loss for epoch in epochs], color=colour, label=name)
    axis.xaxis.set_major_formatter(lambda value, _: numbers.flops(value) if value else "0")
    if all(epoch.gate_loss > 0 for epoch in (*history.growth, *history.control)):
        _logarithmic(axis)
    axis.set_title("gate loss at equal training FLOPs")
    axis.set_xlim(left=0)
    axis.legend(ncols=2, loc="upper right")
    return figure


def _alpha(history: History) -> Figure | None:
    if not history.seeds:
        return None
    figure = _figure(2.3 + 0.1 * len(history.seeds), WIDTH_IN / 2)
    axis = figure.subplots()
    for index, seed in enumerate(history.seeds):
        axis.plot([at for at, _ in seed.alpha], [alpha for _, alpha in seed.alpha], **_seed_line(index, seed))
    axis.set_ylim(-0.04, 1.04)
    axis.set_title("alpha")
    _epochs_along(axis)
    _legend_below(figure, axis, 2)
    return figure


def _parameters(history: History) -> Figure | None:
    if not history.growth:
        return None
    figure = _figure(2.6, WIDTH_IN / 2)
    axis = figure.subplots()
    at = [epoch.epoch for epoch in history.growth]
    counts = [epoch.parameters for epoch in history.growth]
    axis.step(at, counts, where="mid", color=_MARKERS["grown"], label="grown")
    if history.training is not None:
        host = history.training.host_parameters
        axis.axhline(host, color=_MARKERS["control"], linewidth=1.2, linestyle="--", label="host")
        axis.fill_between(at, host, counts, step="mid", color=_MARKERS["grown"], alpha=0.14, linewidth=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_title("parameters")
    _epochs_along(axis)
    _legend_below(figure, axis, 2)
    return figure


def _contributions(history: History) -> Figure | None:
    measured = [(index, seed) for index, seed in enumerate(history.seeds) if seed.contributions]
    if not measured:
        return None
    figure = _figure(2.8)
    axis = figure.subplots()
    axis.axhline(0, color=_MARKERS["muted"], linewidth=1)
    for index, seed in measured:
        style = _seed_line(index, seed)
        at = [each.epoch for each in seed.contributions]
        means, ends = _with_intervals(seed.contributions)
        axis.errorbar(at, means, yerr=ends, marker="o", markersize=4.5, capsize=4, elinewidth=1.3, **style)
        if seed.trials:
            at = [each.epoch for each in seed.trials]
            means, ends = _with_intervals(seed.trials)
            style = {**_POINTS, "color": style["color"], "label": f"{seed.seed}, trial"}
            axis.errorbar(at, means, yerr=ends, **style)
    confidence = measured[0][1].contributions[0].confidence
    axis.set_title(f"contribution: gate loss without the seed minus with it, {confidence:.0%} interval")
    _epochs_along(axis)
    _legend_below(figure, axis, 4)
    return figure


_POINTS: dict[str, Any] = {"marker": "D", "markersize": 5.5, "capsize": 4, "elinewidth": 1.3, "linestyle": "none"}
"""What is measured once is drawn as points: each stands for itself."""


def _with_intervals(measured: Sequence[Contribution | Trial]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Means, and how far their intervals reach below and above them."""
    below = [each.loss - each.lower for each in measured]
    above = [each.upper - each.loss for each in measured]
    return [each.loss for each in measured], (below, above)


def _attribution(report: Report) -> Figure | None:
    """What each kept seed brings left out of all, alone, over every order and in its trial; of one seed the first three are
    equal.
    """
    found = report.attribution
    if found is None or len(found.seeds) < 2 or not any(seed.leave_one_out or seed.solo for seed in found.seeds):
        return None
    trials = {seed.seed: seed.trial for seed in report.seeds}
    kinds: list[tuple[str, str, str, list[Contribution | Trial | None]]] = [
        ("left out", "seed-0", "o", [seed.leave_one_out for seed in found.seeds]),
        ("alone", "seed-4", "o", [seed.solo for seed in found.seeds]),
        ("trial", "control", "D", [trials.get(seed.seed) for seed in found.seeds]),
    ]
    kinds = [kind for kind in kinds if any(kind[3])]
    figure = _figure(1.0 + (0.24 * len(kinds) + 0.4) * len(found.seeds))
    axis = figure.subplots()
    axis.axvline(0, color=_MARKERS["muted"], linewidth=1)
    height = 0.8 / (len(kinds) + 1)
    places = [row - 0.4 + height / 2 for row in range(len(found.seeds))]
    _shapley_bars(axis, found, places, height)
    for number, (kind, colour, marker, measured) in enumerate(kinds, start=1):
        known = [(place + number * height, each) for place, each in zip(places, measured, strict=True) if each is not None]
        means, ends = _with_intervals([each for _, each in known])
        style: dict[str, Any] = {**_POINTS, "color": _MARKERS[colour], "marker": marker, "label": kind}
        axis.errorbar(means, [at for at, _ in known], xerr=ends, **style)
    axis.set_yticks(range(len(found.seeds)), [seed.seed for seed in found.seeds])
    axis.set_ylim(len(found.seeds) - 0.5, -0.5)
    axis.grid(visible=False, axis="y")
    axis.set_title(f"by how much each kept seed lowers the gate loss{_level(found)}")
    _legend_below(figure, axis, 4)
    return figure


def _level(found: Attribution) -> str:
    levels = [each.confidence for seed in found.seeds for each in (seed.leave_one_out, seed.solo) if each is not None]
    return f", {levels[0]:.0%} intervals" if levels else ""


def _shapley_bars(axis: Axes, found: Attribution, places: Sequence[float], height: float) -> None:
    known = [(place, seed) for place, seed in zip(places, found.seeds, strict=True) if seed.shapley is not None]
    if not known:
        return
    axis.barh(
        [place for place, _ in known],
        [seed.shapley or 0.0 for _, seed in known],
        height=height * 0.85,
        xerr=None if found.exact else [float("nan") if seed.shapley_error is None else seed.shapley_error for _, seed in known],
        color=_MARKERS["grown"],
        ecolor=_MARKERS["ink"],
        linewidth=0,
        label="Shapley value" if found.exact else "Shapley value, ± standard error",
    )


def _flops(flops: dict[str, float]) -> Figure | None:
    total = sum(flops.values())
    if not total:
        return None
    figure = _figure(0.5 + 0.34 * len(flops))
    axis = figure.subplots()
    purposes = sorted(flops, key=lambda purpose: -flops[purpose])
    bars = axis.barh(purposes, [flops[purpose] for purpose in purposes], height=0.6, color=_MARKERS["grown"], linewidth=0)
    labels = [f"{numbers.flops(flops[purpose])}  {flops[purpose] / total:.1%}" for purpose in purposes]
    axis.bar_label(bars, labels, padding=5)
    axis.margins(x=0.22)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_title(f"training FLOPs by purpose, {numbers.flops(total)} in all")
    return figure


def _phases(history: History) -> list[tuple[tuple[EpochCompleted, ...], str, str]]:
    """Epochs, colour and name; the control first, so that the grown network is drawn over it."""
    phases = [(history.control, _MARKERS["control"], "control"), (history.growth, _MARKERS["grown"], "grown")]
    return [phase for phase in phases if phase[0]]


def _seed_line(index: int, seed: SeedHistory) -> dict[str, Any]:
    return {"color": _MARKERS[f"seed-{index % SEED_COLOURS}"], "label": seed.seed}


def _svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element: identifiers made unique on the page, colours turned into CSS variables."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    numbered: dict[str, str] = {}
    svg = _IDENTIFIER.sub(
        lambda found: found[1] + numbered.setdefault(found[2], f"{name}-{len(numbered)}"), svg
    )  # matplotlib hashes some from memory addresses: numbers are the same in every run
    return _MARKER.sub(lambda found: _VARIABLES[found[0]], svg).strip()
