"""What the lines of ``bench/growth.py`` say, as a picture: H1, choosing, growing by a strategy, ablations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import growth_figures
import growth_plan
import lab

Row = tuple[str, list[float]]
"""What it is, and its values by RNG seed, in points of audit accuracy."""
NAMES = {
    "scratch_marginal": "from scratch, extra budget",
    "scratch_total": "from scratch, total budget",
    "wide_parameters": "static, as many parameters",
    "wide_flops": "static, as many inference FLOPs",
}


def draw(lines: lab.Lines, to: Path) -> None:
    """Write a picture: a panel a table, a dot an RNG seed, a bar the mean with its 95 % BCa interval where there is one.

    Args:
        lines: known.
        to: file; its ending says the format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = [(title, rows) for title, make in PANELS if (rows := [row for row in make(lines) if row[1]])]
    if not panels:
        return
    heights = [len(rows) + 1.5 for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.0, 0.42 * sum(heights) + 0.6), gridspec_kw={"height_ratios": heights}, squeeze=False
    )
    for (title, rows), axis in zip(panels, axes[:, 0], strict=True):
        axis.axvline(0.0, color="0.6", linewidth=1)
        for place, (_, values) in enumerate(rows):
            mean, low, high = growth_figures.interval(values)
            axis.plot(values, [place] * len(values), "o", color="#4c72b0", alpha=0.35, markersize=4)
            if math.isfinite(low):
                axis.plot([low, high], [place, place], color="#1b3a6b", linewidth=2)
            axis.plot([mean], [place], "D", color="#1b3a6b", markersize=5)
        axis.set_yticks(range(len(rows)), [f"{name} (n={len(values)})" for name, values in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "points of audit accuracy; a dot an RNG seed, a diamond their mean with its 95 % BCa interval", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    plt.close(figure)


def _improving(lines: lab.Lines) -> list[Row]:
    peers = sorted({line["arm"] for line in lines.of(part="h1") if not line["arm"].startswith("grown")} - {"host"})
    return [(_named(peer), growth_figures.differences(lines, "h1", "grown", peer)) for peer in peers]


def _named(peer: str) -> str:
    return NAMES.get(peer, peer.replace("continued_", "host continued, rate "))


def _choosing(lines: lab.Lines) -> list[Row]:
    chosen = growth_figures.choices(lines)
    return [(name, [found["gain"] for found in by_seed.values()]) for name, by_seed in chosen.items()]


def _growing_by(lines: lab.Lines) -> list[Row]:
    return list(growth_figures.growing_by(lines).items())


def _ablating(lines: lab.Lines) -> list[Row]:
    return list(growth_figures.ablated(lines).items())


def _triggers(lines: lab.Lines) -> list[Row]:
    return list(growth_figures.further(lines).items())


def _confirming(lines: lab.Lines) -> list[Row]:
    against = growth_figures.confirmed(lines)
    if against is None:
        return []
    peer, part, values = against
    rows = {_named(peer): values}
    for other in growth_figures.confirmed_against(lines) if part == growth_plan.CONFIRM else ():
        earlier = "" if other.startswith("continued") else growth_plan.CONFIRMED_DEFAULTS  # of what those had grown
        name = earlier or growth_figures.latest_defaults(lines)
        rows[_named(other)] = growth_figures.differences(lines, growth_plan.CONFIRM, name, other)
    return list(rows.items())


PANELS: tuple[tuple[str, Callable[[lab.Lines], list[Row]]], ...] = (
    ("H1, on RNG seeds that nothing was tuned or read on: a job's defaults minus ...", _confirming),
    ("H1 before, set by hand: the grown network minus ...", _improving),
    ("H2: one arm grown; gain over the host continued, chosen by ...", _choosing),
    ("Growing by a strategy: gain over the host continued for the same FLOPs", _growing_by),
    ("Ablations: changed minus unchanged", _ablating),
    ("Other triggers than always, minus that; a random birth minus one as zero", _triggers),
)
