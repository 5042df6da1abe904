"""What every bench shares: its arguments, the machine, repeated figures against a baseline, JSON out, a table to read."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS = ("gromo", "xoscar", "pykka", "thespian", "ray")
PACKAGES = ("esperd", "torch", "numpy", "msgspec", "pyzmq", "safetensors", "uvloop", *PEERS)


class Baseline(msgspec.Struct, frozen=True, kw_only=True):
    """What a figure is compared with, measured in the same run."""

    name: str
    value: float
    repeats: tuple[float, ...]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number. ``ratio`` is value ÷ baseline, always."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    repeats: tuple[float, ...]
    baseline: Baseline
    ratio: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What a bench found, where and when."""

    bench: str
    quick: bool
    date: str
    commit: str
    settings: dict[str, str | int | float | bool]
    """What was measured: data, sizes, repeats."""
    machine: dict[str, str | int | float]
    versions: dict[str, str | None]
    """None: not installed."""
    figures: tuple[Figure, ...]


def arguments(
    description: str, *, repeats: int, quick_repeats: int, devices: Sequence[str] = (), known: bool = False
) -> argparse.Namespace:
    """Parse what every bench takes: ``--quick``, ``--data PATH``, ``--repeats N``, ``--json FILE``; ``--device`` where several
    can be measured; ``--known`` where runs are kept and can be told without running.
    """
    return parsed(parser(description, repeats=repeats, quick_repeats=quick_repeats, devices=devices, known=known))


def parser(
    description: str, *, repeats: int, quick_repeats: int, devices: Sequence[str] = (), known: bool = False
) -> argparse.ArgumentParser:
    """What every bench takes, for one that takes more; see :func:`parsed`."""
    parser = argparse.ArgumentParser(description=description)
    parser.set_defaults(full_repeats=repeats, quick_repeats=quick_repeats)
    parser.add_argument("--quick", action="store_true", help="a short form, under 45 s on two cores")
    parser.add_argument("--data", type=Path, help="an .npz file to train on; without it, scikit-learn's digits")
    parser.add_argument("--repeats", type=int, help=f"repeats of everything (default {repeats}, quick {quick_repeats})")
    parser.add_argument("--json", type=Path, help="where results are written")
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="where it is measured")
    if known:
        parser.add_argument("--known", action="store_true", help="run nothing: tell what is known so far")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, checked. From here on SIGTERM ends a bench as Ctrl-C does: its daemon must not outlive it."""
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    if chosen.repeats is None:
        chosen.repeats = chosen.quick_repeats if chosen.quick else chosen.full_repeats
    if chosen.repeats < 1:
        parser.error("--repeats must be at least 1")
    if chosen.data is not None:
        chosen.data = chosen.data.absolute()
        if not chosen.data.is_file():
            parser.error(f"--data {chosen.data} is not a file")
    return chosen


def median_figure(
    name: str, values: Sequence[float], *, unit: str, better: Literal["lower", "higher"], against: str, baseline: Sequence[float]
) -> Figure:
    """The median of repeats against the median of a baseline's, all repeats kept."""
    value, peer = statistics.median(values), statistics.median(baseline)
    return Figure(
        name=name,
        value=value,
        unit=unit,
        better=better,
        repeats=tuple(values),
        baseline=Baseline(name=against, value=peer, repeats=tuple(baseline)),
        ratio=value / peer,
    )


def results(bench: str, figures: Sequence[Figure], *, quick: bool, settings: dict[str, str | int | float | bool]) -> Results:
    """Figures with the machine, the versions, the commit and the hour they were measured at."""
    return Results(
        bench=bench,
        quick=quick,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        commit=commit(),
        settings=settings,
        machine=machine(),
        versions=versions(),
        figures=tuple(figures),
    )


def machine() -> dict[str, str | int | float]:
    """The machine as far as its numbers depend on it."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }


def versions() -> dict[str, str | None]:
    """Versions of what is measured; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The commit that was measured; ``-dirty`` when files of the product or the benches differ from it."""
    told = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if told.returncode != 0:
        return "unknown: not a git checkout"
    changed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "status", "--porcelain", "--", "esperd", "bench/*.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def write(found: Results, path: Path) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def read(path: Path) -> Results:
    """Read results back."""
    return msgspec.json.decode(path.read_bytes(), type=Results)


def table(found: Results) -> str:
    """Results as a table a person can read."""
    rows = [("figure", "median", "range", "baseline", "median", "range", "ratio")]
    rows += [
        (
            figure.name,
            f"{figure.value:.4g} {figure.unit}",
            _spread(figure.repeats),
            figure.baseline.name,
            f"{figure.baseline.value:.4g} {figure.unit}",
            _spread(figure.baseline.repeats),
            f"{figure.ratio:.4f}",
        )
        for figure in found.figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    about = ", ".join(f"{key} {value}" for key, value in found.settings.items())
    where = f"{found.machine['cpu']}, {found.machine['cores']} cores, torch {found.versions['torch']}"
    return "\n".join([f"{found.bench}: {about}", where, "", *lines])


def _spread(repeats: Sequence[float]) -> str:
    return f"{min(repeats):.4g} to {max(repeats):.4g} of {len(repeats)}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
