"""What the demo's job does over RNG seeds: does it grow, does it refuse, does growing pay. Every run is kept, losses included.

Each run goes through a real daemon. One JSON line a run is appended to ``bench/results/demo.jsonl``; a run whose line stands
there for this job file is not run again, so an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

import harness
import msgspec

from esperd.cli.demo import demo_job
from esperd.growth.interval import mean_interval
from esperd.messages.growth import Stage
from esperd.messages.reports import Report
from esperd.testing import running_daemon

LINES = Path(__file__).parent / "results" / "demo.jsonl"
REQUIRED_SHARE = 0.9
CONFIDENCE = 0.95


def line_of(report: Report, job_sha256: str) -> dict:
    """What is kept of a run."""
    kept = [seed.blueprint for seed in report.seeds if seed.stage is Stage.FOSSILIZED]
    culled = [seed.blueprint for seed in report.seeds if seed.stage is not Stage.FOSSILIZED]
    return {
        "job_sha256": job_sha256,
        "rng_seed": report.rng_seed,
        "fossilized": kept,
        "culled": culled,
        "refused": [f"{arm.slot} {arm.blueprint} by {arm.by}" for arm in report.refused],
        "grown": {"accuracy": report.grown.metric, "loss": report.grown.loss, "parameters": report.grown.parameters},
        "control": {"accuracy": report.control.metric, "loss": report.control.loss},
        "training_flops": [report.grown.training_flops, report.control.training_flops],
        "training_seconds": [report.grown.training_seconds, report.control.training_seconds],
        "accuracy_difference": [
            report.comparison.metric,
            report.comparison.metric_lower,
            report.comparison.metric_upper,
        ],
    }


def known_lines(path: Path, job_sha256: str) -> dict[int, dict]:
    """Lines of this very job, by RNG seed."""
    if not path.exists():
        return {}
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    return {line["rng_seed"]: line for line in lines if line["job_sha256"] == job_sha256}


def summary(lines: list[dict]) -> tuple[harness.Figure, ...]:
    """The figures over all runs."""
    grew = [float(bool(line["fossilized"])) for line in lines]
    chose = [float(bool(line["fossilized"]) and bool(line["culled"] or line["refused"])) for line in lines]
    return (
        share("demo/grew_share", grew),
        share("demo/kept_and_refused_share", chose),
        harness.median_figure(
            "demo/audit_accuracy",
            [line["grown"]["accuracy"] for line in lines],
            unit="share",
            better="higher",
            against="control",
            baseline=[line["control"]["accuracy"] for line in lines],
        ),
        harness.median_figure(
            "demo/audit_loss",
            [line["grown"]["loss"] for line in lines],
            unit="nats",
            better="lower",
            against="control",
            baseline=[line["control"]["loss"] for line in lines],
        ),
    )


def share(name: str, values: list[float]) -> harness.Figure:
    """A share of runs against the share the issue asks for."""
    value = statistics.mean(values)
    return harness.Figure(
        name=name,
        value=value,
        unit="of runs",
        better="higher",
        repeats=tuple(values),
        baseline=harness.Baseline(name="required", value=REQUIRED_SHARE, repeats=(REQUIRED_SHARE,)),
        ratio=value / REQUIRED_SHARE,
    )


def main() -> None:
    """Run what is missing, print, write."""
    import torch

    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=2)
    # defaults included: another default is another job
    job_sha256 = hashlib.sha256(msgspec.json.encode(demo_job(Path("/"), rng_seed=0), order="sorted")).hexdigest()
    lines = {} if chosen.quick else known_lines(LINES, job_sha256)
    with tempfile.TemporaryDirectory(prefix="esperd-bench-") as name:
        scratch = Path(name)
        with running_daemon(scratch / "state") as daemon, daemon.sync_client() as esper:
            for rng_seed in range(chosen.repeats):
                if rng_seed in lines:
                    continue
                job = esper.submit(demo_job(scratch, rng_seed=rng_seed))
                job.wait()
                line = line_of(job.report(), job_sha256)
                lines[rng_seed] = line
                print(json.dumps(line), file=sys.stderr)
                if not chosen.quick:
                    LINES.parent.mkdir(exist_ok=True)
                    with LINES.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(line) + "\n")
    runs = [lines[rng_seed] for rng_seed in sorted(lines)]
    settings = {"runs": len(runs), "job_sha256": job_sha256}
    found = harness.results("demo", summary(runs), quick=chosen.quick, settings=settings)
    print(harness.table(found))
    points = torch.tensor([100 * line["accuracy_difference"][0] for line in runs])
    mean, lower, upper = mean_interval(points, CONFIDENCE)
    paid = sum(line["accuracy_difference"][1] > 0 for line in runs)
    lost = sum(line["accuracy_difference"][2] < 0 for line in runs)
    print(
        f"\ngrown minus control at equal FLOPs, accuracy in points over {len(runs)} RNG seeds: {mean:+.2f} "
        f"[{lower:+.2f}, {upper:+.2f}]; paid in {paid}, did not in {lost}, no difference shown in {len(runs) - paid - lost}"
    )
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
