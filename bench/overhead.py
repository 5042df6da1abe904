"""What a job costs over a bare script: the same loop, same seed, side by side; the final weights must be equal to the bit.

The bare script (``overhead_bare.py``) and the job (no growth, a real daemon, a worker process of its own) train in turns, now
one first and now the other, each in a fresh process with one thread. Compared are seconds of training: from the first step to
the last gate pass, start-up left out. For the job they contain everything it does besides: counting FLOPs, telling the daemon,
checkpoints. The fastest epoch of each repeat says what a step costs, whatever else the machine did meanwhile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
from neighbours import Neighbours

from esperd.messages.control import ActorState
from esperd.messages.jobs import Budget, Growth, Job, Optimizer
from esperd.messages.telemetry import EpochCompleted
from esperd.sync_client import SyncClient
from esperd.testing import running_daemon

CHANNELS = [12, 16, 24]
"""With three input channels and ten classes: 5,862 parameters."""
MOST_OTHERS = 0.15
"""Processors that other programs may keep busy during a training; above it, in the full form, the repeat is taken again,
whatever it showed. Two processors may be two threads of one core, so that a neighbour slows us without taking our place."""
MOST_RETAKEN = 15
EPOCHS = {"cifar": 4, "digits": 60, "cifar quick": 2, "digits quick": 20}


def job_for(data: Path | None, epochs: int, workdir: Path) -> Job:
    """The job both sides train."""
    return Job(
        name="overhead",
        host="cnn",
        host_options={"channels": CHANNELS, "in_channels": 3 if data is not None else 1, "classes": 10},
        data=str(data) if data is not None else "digits",
        budget=Budget(epochs=epochs),
        optimizer=Optimizer(),
        growth=Growth(enabled=False),
        workdir=str(workdir),
    )


def train_bare(job: Job, data: Path | None, weights: Path) -> dict:
    """Seconds of the bare script; leaves its weights at ``weights``."""
    settings = {
        "data": str(data) if data is not None else None,
        "host_options": job.host_options,
        "epochs": job.budget.epochs,
        "batch_size": job.batch_size,
        "learning_rate": job.optimizer.learning_rate,
        "weight_decay": job.optimizer.weight_decay,
        "rng_seed": job.rng_seed,
        "weights": str(weights),
    }
    script = Path(__file__).with_name("overhead_bare.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"overhead_bare.py failed with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def train_job(esper: SyncClient, job: Job, directory: Path) -> dict:
    """Seconds of the job; leaves its model in ``directory``."""
    handle = esper.submit(job)
    info = handle.wait()
    if info.error is not None or info.attempt != 1:
        raise SystemExit(f"the job ended {info.state} in attempt {info.attempt}: {info.error}")
    handle.export(directory)
    epochs = [event.body.seconds for event in handle.events() if isinstance(event.body, EpochCompleted)]
    return {"seconds": handle.report().grown.training_seconds, "epochs": epochs}


def wait_for_compiler(esper: SyncClient) -> None:
    """A daemon answers before its compiler has imported torch; until then the compiler would disturb the first training."""
    while not any(actor.name == "compiler" and actor.state is ActorState.RUNNING for actor in esper.actors().actors):
        time.sleep(0.1)


def require_equal(bare: Path, directory: Path) -> int:
    """Compare final weights, buffers included.

    Returns:
        How many tensors there are.

    Raises:
        SystemExit: when one differs in a single bit.
    """
    import safetensors.torch
    import torch

    ours = safetensors.torch.load_file(directory / "model.safetensors")
    theirs = torch.load(bare, weights_only=True)
    if set(ours) != {f"host.{name}" for name in theirs}:
        raise SystemExit(f"the job's tensors are {sorted(ours)}, the script's {sorted(theirs)}")
    different = [name for name, tensor in theirs.items() if not torch.equal(ours[f"host.{name}"], tensor)]
    if different:
        raise SystemExit(f"final weights differ between job and bare script: {', '.join(different)}")
    return len(theirs)


def main() -> None:
    """Measure, compare, print, write."""
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=9, quick_repeats=2)
    source = "cifar" if chosen.data is not None else "digits"
    epochs = EPOCHS[f"{source} quick" if chosen.quick else source]
    bare, jobs, retaken = [], [], 0
    with tempfile.TemporaryDirectory(prefix="esperd-bench-") as name:
        scratch = Path(name)
        job = job_for(chosen.data, epochs, scratch)
        with running_daemon(scratch / "state") as daemon, daemon.sync_client() as esper:
            wait_for_compiler(esper)
            while len(jobs) < chosen.repeats:
                repeat = len(jobs)
                runs, shares = {}, {}
                for side in ("bare", "job") if (repeat + retaken) % 2 == 0 else ("job", "bare"):
                    with Neighbours() as others:
                        if side == "bare":
                            runs[side] = train_bare(job, chosen.data, scratch / f"bare{repeat}.pt")
                        else:
                            runs[side] = train_job(esper, job, scratch / f"job{repeat}")
                    shares[side] = others.share
                told = ", ".join(
                    f"{side} {run['seconds']:.3f} s (others {shares[side]:.2f})" for side, run in sorted(runs.items())
                )
                spoilt = max(shares.values()) > MOST_OTHERS and retaken < MOST_RETAKEN and not chosen.quick
                print(f"repeat {repeat + 1} of {chosen.repeats}: {told}{': taken again' if spoilt else ''}", file=sys.stderr)
                if spoilt:
                    retaken += 1
                    continue
                bare.append({**runs["bare"], "others": shares["bare"]})
                jobs.append({**runs["job"], "others": shares["job"]})
        tensors = [require_equal(scratch / f"bare{repeat}.pt", scratch / f"job{repeat}") for repeat in range(chosen.repeats)]
    figures = (
        harness.median_figure(
            "job/bare_wall",
            [run["seconds"] for run in jobs],
            unit="s",
            better="lower",
            against="bare PyTorch script",
            baseline=[run["seconds"] for run in bare],
        ),
        harness.median_figure(
            "job/bare_fastest_epoch",
            [min(run["epochs"]) for run in jobs],
            unit="s",
            better="lower",
            against="bare PyTorch script",
            baseline=[min(run["epochs"]) for run in bare],
        ),
    )
    found = harness.results(
        "overhead",
        figures,
        quick=chosen.quick,
        settings={
            "data": chosen.data.name if chosen.data is not None else "digits",
            "epochs": epochs,
            "batch_size": job.batch_size,
            "parameters": bare[0]["parameters"],
            "repeats": chosen.repeats,
            "checkpoint_every_s": job.checkpoint_every_s,
            "others_processors": round(max(run["others"] for run in (*bare, *jobs)), 2),
            "retaken": retaken,
        },
    )
    print(harness.table(found))
    print(f"\nfinal weights: {tensors[0]} tensors, bit-identical in all {chosen.repeats} repeats")
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
