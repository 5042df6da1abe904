"""Does it recover? Faults by the hundred, and what was lost, wrong or left behind over them.

Protocol: ``bench/PROTOCOL.md``. One JSON line a fault is appended to ``bench/results/recovery.jsonl``; an interrupted bench goes
on with what is missing. ``--part`` runs some of the parts.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import harness
import recovery_daemon
import recovery_network
import recovery_parts
import recovery_service

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"))
from esperd_chaos.faults import FAULTS, STRANGE

LINES = Path(__file__).parent / "results" / "recovery.jsonl"
PARTS = ("disk", "bits", "line", "power", "clients", "daemon", "strange", "hooks", "keys", "pages", "poison", "full", "cut")
FULL = {
    "bits": 300,
    "line": 350,
    "power": 150,
    "daemon": 160,
    "strange": 60,
    "keys": 40,
    "pages": 24,
    "poison": 8,
    "full": 8,
    "cut": 16,
}
SINGLE = ("disk", "bits", "line", "power")
"""Parts of the bench that hurt a single part of esperd; the others hurt daemons, what surrounds them, or their clients."""
CLIENTS = {False: 1_000, True: 50}
"""Faults; ``disk`` has as many as there are calls to fail, ``hooks`` as there are hooks and ways to raise."""
QUICK = {
    "bits": 10,
    "line": 10,
    "power": 2,
    "daemon": 2,
    "strange": 5,
    "keys": 5,
    "pages": 4,
    "poison": 4,
    "full": 1,
    "cut": 2,
}
QUICK_FAULTS = {"daemon": ("kill_trainer", "kill_daemon"), "strange": tuple(STRANGE)}
EPOCHS = 40
FAULTS_A_JOB = 4
VERSIONS = {"cut": 2, "full": 2}
"""Of the protocol of each part; 1 where it is not said."""


def run(part: str, scratch: Path, wanted: dict[str, int], *, quick: bool, number: int, until: float) -> Iterator[dict]:
    """Lines of a part.

    Args:
        part: one of :data:`PARTS`.
        scratch: a folder of its own, short enough for sockets.
        wanted: how many faults each part has.
        quick: the short form.
        number: of faults that are known; they are not drawn again.
        until: no job of a daemon is begun after this time of the monotonic clock.
    """
    rng = random.Random(1_000 + number)
    epochs = 12 if quick else EPOCHS
    match part:
        case "disk":
            yield from recovery_parts.failing_disk(scratch)
        case "bits":
            yield from recovery_parts.turned_bits(scratch, wanted[part] - number, rng)
        case "line":
            yield from recovery_parts.bad_lines(scratch, wanted[part] - number, rng)
        case "power":
            yield from recovery_parts.power_cuts(scratch, wanted[part] - number, rng)
        case "clients":
            yield from recovery_daemon.crowd(scratch, CLIENTS[quick])
        case "daemon" | "strange":
            kinds = list(FAULTS if part == "daemon" else STRANGE)
            names = list(QUICK_FAULTS[part]) if quick else [rng.choice(kinds) for _ in range(wanted[part] - number)]
            yield from recovery_daemon.campaign(
                scratch, part=part, faults=names, epochs=epochs, faults_a_job=FAULTS_A_JOB, seed=1_000 + number, until=until
            )
        case "hooks":
            yield from recovery_service.raising_hooks(scratch, epochs)
        case "keys":
            yield from recovery_service.wrong_keys(scratch, wanted[part] - number, rng)
        case "pages":
            yield from recovery_service.damaged_pages(scratch, wanted[part] - number, rng)
        case "poison":
            yield from recovery_service.poison(scratch, wanted[part] - number, epochs)
        case "full":
            yield from recovery_service.full_disk(scratch, wanted[part] - number, epochs)
        case "cut":
            yield from recovery_network.cut_lines(scratch, wanted[part] - number, epochs, rng)


def figures(lines: list[dict], older: list[dict]) -> tuple[harness.Figure, ...]:
    """Over all lines: the share recovered, of faults around a daemon, and with lines of older protocols; how much was lost,
    wrong, left behind.
    """
    faults = [line for line in lines if "fault" in line]
    recovered = [float(line["recovered"]) for line in faults]
    around = [float(line["recovered"]) for line in faults if line["part"] not in SINGLE]
    every = [*recovered, *(float(line["recovered"]) for line in older if "fault" in line)]
    leaked = [float(len(line["leaked"])) for line in lines if line["part"] == "end"]
    told = [
        _figure("recovered/share", statistics.fmean(recovered), "share", "higher", recovered, 0.999),
        _figure("lost/acknowledged", sum(line.get("lost", 0) for line in lines), "jobs, rows and blobs", "lower", recovered, 0.0),
        _figure("wrong/results", sum(line.get("wrong", 0) for line in lines), "results", "lower", recovered, 0.0),
    ]
    if around:
        told.append(_figure("recovered/around_daemons", statistics.fmean(around), "share", "higher", around, 0.999))
    if older:
        told.append(_figure("recovered/with_older_protocols", statistics.fmean(every), "share", "higher", every, 0.999))
    if leaked:  # only at a daemon's end is there anything to look for
        told.append(_figure("leaked/resources", sum(leaked), "processes, sockets, files", "lower", leaked, 0.0))
    return tuple(told)


def _figure(name: str, value: float, unit: str, better: str, repeats: list[float], aim: float) -> harness.Figure:
    return harness.Figure(
        name=name,
        value=float(value),
        unit=unit,
        better="higher" if better == "higher" else "lower",
        repeats=(float(value),),
        baseline=harness.Baseline(name=f"aim, over {len(repeats)}", value=aim, repeats=(aim,)),
        ratio=float(value) / aim if aim else float(value),
    )


def version(line: dict) -> int:
    """Of the protocol that is in force for the part that a line belongs to."""
    return VERSIONS.get(line.get("of", line["part"]), 1)


def table(lines: list[dict], older: list[dict]) -> str:
    """What happened, by fault; lines of an older protocol are told and not counted."""
    faults = [line for line in lines if "fault" in line]
    kinds = Counter(_kind(line) for line in faults)
    told = [f"{len(faults)} faults", ""]
    for kind, count in sorted(kinds.items()):
        mine = [line for line in faults if _kind(line) == kind]
        seconds = [line["seconds"] for line in mine if "seconds" in line]
        wait = f", {statistics.median(seconds):.1f} s until work went on (longest {max(seconds):.1f} s)" if seconds else ""
        told.append(f"  {kind:32} {sum(line['recovered'] for line in mine)} of {count} recovered{wait}")
    jobs = [line for line in lines if line["part"] == "job"]
    if jobs:
        right = sum(not line["lost"] and not line["wrong"] for line in jobs)
        told.append(f"  jobs: {right} of {len(jobs)} ended once, and bit-identical to the one that nobody hurt")
    told += [f"  {line['part']}: {line.get('fault', '')} {line['problem']}" for line in lines if line.get("problem")]
    told += [f"  left behind: {', '.join(line['leaked'])}" for line in lines if line["part"] == "end" and line["leaked"]]
    if older:
        not_recovered = sum(not line.get("recovered", True) for line in older)
        told.append(f"  {len(older)} lines of an older protocol are not counted; {not_recovered} of them did not recover")
    return "\n".join(told)


def _kind(line: dict) -> str:
    return {"disk": "disk: n-th call fails", "bits": "bit turned in a blob", "power": "power: kill -9 of a writer"}.get(
        line["part"], f"{line['part']}: {line['fault']}"
    )


def main() -> None:
    """Run what is missing, print, write."""
    parser = harness.parser(__doc__.partition("\n")[0], repeats=1, quick_repeats=1, known=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="run only this part; may be repeated")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the faults on a daemon after so many seconds")
    chosen = harness.parsed(parser)
    wanted = QUICK if chosen.quick else FULL
    lines: list[dict] = []
    older: list[dict] = []
    if not chosen.quick and LINES.exists():
        read = [json.loads(text) for text in LINES.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in read if line["version"] == version(line)]
        older = [line for line in read if line["version"] != version(line)]
    until = time.monotonic() + chosen.seconds
    for part in () if chosen.known else chosen.part or PARTS:
        known = sum(line["part"] == part for line in lines)
        if known >= wanted.get(part, 1):
            continue
        with tempfile.TemporaryDirectory(prefix="esperd-r-") as name:
            for line in run(part, Path(name), wanted, quick=chosen.quick, number=known, until=until):
                told = {"version": version(line), "commit": harness.commit(), **line}
                lines.append(told)
                print(json.dumps(told), file=sys.stderr, flush=True)
                if not chosen.quick:
                    LINES.parent.mkdir(exist_ok=True)
                    with LINES.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(told) + "\n")
    found = harness.results(
        "recovery", figures(lines, older), quick=chosen.quick, settings={"faults": sum("fault" in line for line in lines)}
    )
    print(table(lines, older))
    print()
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)
    told = {figure.name: figure.value for figure in found.figures}
    if told.pop("recovered/share") < 1.0 or any(value > 0 for name, value in told.items() if not name.startswith("recovered/")):
        sys.exit("something was lost, wrong, left behind, or did not recover")


if __name__ == "__main__":
    main()
