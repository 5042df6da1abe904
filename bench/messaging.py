"""What a request and its answer cost, beside xoscar, pykka, Thespian and Ray: in-process, ipc, tcp, tcp with CURVE.

Each system runs in a fresh process, in turns, a round after the other (``messaging_side.py``). Requests carry 100 B or 1 MB,
answers next to nothing; 1 or 64 are in flight. A peer that is not installed is reported as absent. What the peers promise
differs: see ``docs/benches.md``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import harness
from messaging_side import IN_FLIGHT, SIDES, SIZES

SECONDS, QUICK_SECONDS = 1.0, 0.15
LIMIT_S = 120.0
PATHS = {"curve": "tcp"}
"""What a path without peers of its own is compared with: the same path in the clear."""


def measure(system: str, path: str, seconds: float) -> dict[str, dict[str, float]]:
    """One system on one path, in a fresh process."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "messaging_side.py"), system, path, str(seconds)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        cwd=here,  # peers import their actor by name in processes of theirs
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{system} over {path} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def figures(runs: dict[tuple[str, str], list[dict[str, dict[str, float]]]]) -> list[harness.Figure]:
    """Ours beside each peer, case by case. ``ipc/xoscar_ipc``: median of 100 B, one in flight."""
    found = []
    for (system, path), ours in runs.items():
        if system != "esperd":
            continue
        peers = [(peer, over) for peer, over in runs if peer != "esperd" and over == path]
        if path == "ipc" and ("ray", "tcp") in runs:
            peers.append(("ray", "tcp"))
        if path in PATHS:
            peers = [("esperd", PATHS[path])]
        for peer, over in peers:
            theirs = runs[peer, over]
            for case in (f"{size}/{in_flight}" for size in SIZES for in_flight in IN_FLIGHT):
                for unit in ("p50_us", "p99_us", "rate"):
                    name = f"{path}/{peer}_{over}"
                    headline = (name, case, unit) == ("ipc/xoscar_ipc", "100B/1", "p50_us")
                    found.append(
                        harness.median_figure(
                            name if headline else f"{name} {case} {unit}",
                            [run[case][unit] for run in ours],
                            unit="1/s" if unit == "rate" else "us",
                            better="higher" if unit == "rate" else "lower",
                            against=f"{peer} over {over}",
                            baseline=[run[case][unit] for run in theirs],
                        )
                    )
    return found


def main() -> None:
    """Measure, compare, print, write."""
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=5, quick_repeats=1)
    seconds = QUICK_SECONDS if chosen.quick else SECONDS
    absent = sorted({peer for peer, _ in SIDES if importlib.util.find_spec(peer) is None})
    runs: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
    failed: set[str] = set()
    for repeat in range(chosen.repeats):
        for system, path in list(SIDES) if repeat % 2 == 0 else reversed(SIDES):
            if system in absent:
                continue
            try:
                run = measure(system, path, seconds)
            except (SystemExit, subprocess.TimeoutExpired) as failure:
                if system == "esperd":
                    raise
                failed.add(f"{system} over {path} in round {repeat + 1}")
                print(failure, file=sys.stderr)
                continue
            runs.setdefault((system, path), []).append(run)
            small = run["100B/1"]
            print(f"round {repeat + 1}: {system} over {path}: p50 {small['p50_us']:.0f} us", file=sys.stderr)
    found = harness.results(
        "messaging",
        figures(runs),
        quick=chosen.quick,
        settings={
            "seconds": seconds,
            "rounds": chosen.repeats,
            "absent": ", ".join(absent) or "nobody",
            "failed": "; ".join(sorted(failed)) or "nobody",
        },
    )
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
