"""Run the quick forms of all benches and fail when a ratio leaves the spread recorded in ``results/baseline.json``.

``python bench/check.py`` compares; ``python bench/check.py --record 5`` measures the spread anew: each bench five times, and a
margin of half the range (at least 5 %) on either side, because five runs do not show the extremes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import msgspec

BENCHES = ("overhead",)
BASELINE = Path(__file__).with_name("results") / "baseline.json"
SMALLEST_MARGIN = 0.05
"""Of the ratio; chosen, not measured."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Between which ratios a figure was seen, margin included."""

    low: float
    high: float
    seen: tuple[float, ...]


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """``baseline.json``: spreads by bench and figure, and where they were measured."""

    date: str
    commit: str
    machine: dict[str, str | int | float]
    spreads: dict[str, dict[str, Spread]]


def spread(ratios: list[float]) -> Spread:
    """Range of the ratios with its margin."""
    low, high = min(ratios), max(ratios)
    margin = max((high - low) / 2, SMALLEST_MARGIN * high)
    return Spread(low=round(max(low - margin, 0.0), 4), high=round(high + margin, 4), seen=tuple(round(r, 4) for r in ratios))


def problems(found: harness.Results, spreads: dict[str, Spread]) -> list[str]:
    """What left its spread, or is missing on either side."""
    told = []
    ratios = {figure.name: figure.ratio for figure in found.figures}
    for name, ratio in ratios.items():
        if name not in spreads:
            told.append(f"{found.bench} {name}: no spread is recorded; run bench/check.py --record")
        elif not spreads[name].low <= ratio <= spreads[name].high:
            recorded = spreads[name]
            told.append(f"{found.bench} {name}: ratio {ratio:.4f} is outside {recorded.low:.4f} to {recorded.high:.4f}")
    told += [f"{found.bench} {name}: was not measured" for name in spreads if name not in ratios]
    return told


def run_quick(bench: str) -> harness.Results:
    """One quick run; its table goes to the terminal.

    Raises:
        SystemExit: when the bench fails.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{bench}.json"
        script = Path(__file__).with_name(f"{bench}.py")
        status = subprocess.run([sys.executable, str(script), "--quick", "--json", str(file)], check=False).returncode
        if status != 0:
            raise SystemExit(f"bench/{bench}.py failed with status {status}")
        return harness.read(file)


def record(runs: int) -> None:
    """Measure every bench's spread and write it down."""
    spreads = {}
    for bench in BENCHES:
        results = [run_quick(bench) for _ in range(runs)]
        names = [figure.name for figure in results[0].figures]
        by_name = [{figure.name: figure.ratio for figure in result.figures} for result in results]
        spreads[bench] = {name: spread([ratios[name] for ratios in by_name]) for name in names}
    recorded = Recorded(date=results[-1].date, commit=harness.commit(), machine=harness.machine(), spreads=spreads)
    BASELINE.write_bytes(msgspec.json.format(msgspec.json.encode(recorded), indent=2) + b"\n")
    print(f"written: {BASELINE}")


def compare() -> int:
    """Measure every bench once.

    Returns:
        0 when every ratio lies in its spread, otherwise 1.
    """
    recorded = msgspec.json.decode(BASELINE.read_bytes(), type=Recorded)
    told = [line for bench in BENCHES for line in problems(run_quick(bench), recorded.spreads.get(bench, {}))]
    print("\n" + ("\n".join(told) if told else f"every ratio lies in the spread of {recorded.date}"))
    return 1 if told else 0


def main() -> int:
    """Compare or record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--record", type=int, metavar="RUNS", help="measure the spread anew, with so many runs of each bench")
    chosen = parser.parse_args()
    if chosen.record is None:
        return compare()
    if chosen.record < 3:
        parser.error("--record needs at least 3 runs")
    record(chosen.record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
