"""Faults on a real daemon with real workers: a job at a time, hurt again and again, must end as one that nobody hurt."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leftovers import left_behind, own_temporary_folder, resident_mib, shared

from esperd.config import Config, Jobs, Workers
from esperd.errors import EsperError
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted, JobStateChanged, TrainingStarted
from esperd.sync_client import SyncJobHandle
from esperd.testing import DaemonProcess, running_daemon

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"))
from esperd_chaos.faults import FAULTS, STRANGE, PromiseBroken, Victim
from esperd_chaos.orders import Orders

CHAOS = Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"
CONFIG = Config(
    jobs=Jobs(max_attempts=10_000, backoff_s=0.05, backoff_max_s=0.2),
    workers=Workers(heartbeat_interval_s=0.3, heartbeat_timeout_s=4.0),
)
"""A lost worker is replaced at once, a silent one after four seconds: what is measured is whether, not when."""
ANSWER_S = 120.0
"""For one answer where nothing is hurt."""
FAULTS_A_DAEMON = 12
"""After so many a daemon ends, and it is looked at what it left behind."""
RECOVERY_S = 90.0
"""A fault that takes longer than this to be over counts as not recovered,"""
UNDISTURBED_TIMES = 6.0
"""or than so many times what the undisturbed job of the same daemon took, where that is more: a busy machine is slow."""
PROJECT = '''
import time

import numpy as np
import torch
from torch import nn


class Slow(nn.Module):
    """Two stages that seeds can stand behind; takes its time, so that there is a middle to be hit in."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            time.sleep(0.004)
        return self.head(self.second(self.first(x)))


def clouds(seed=0, count=480):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, 12))
    y = rng.integers(0, 3, size=count)
    return (centres[y] + rng.normal(size=(count, 12)) * 1.2).astype(np.float32), y
'''


def job(folder: Path, epochs: int) -> dict[str, Any]:
    """A job that grows, and checkpoints at every epoch."""
    (folder / "recovered.py").write_text(PROJECT, encoding="utf-8")
    return {
        "host": "recovered:Slow",
        "data": "recovered:clouds",
        "workdir": str(folder),
        "batch_size": 16,
        "checkpoint_every_s": 0.0,
        "budget": {"epochs": epochs},
        "policy": {"strategy": "ucb", "warmup_epochs": 1},
        "growth": {
            "blueprints": ["mlp_low*"],
            "incubation_epochs": 2,
            "blending_epochs": 1,
            "shadowing_epochs": 1,
            "probation_epochs": 2,
            "embargo_epochs": 0,
        },
    }


def ending(handle: SyncJobHandle) -> str:
    """What a finished job left, as the hash of its grown model."""
    return next(artifact.sha256 for artifact in handle.artifacts() if artifact.name.endswith("model.safetensors"))


def campaign(
    scratch: Path,
    *,
    part: str,
    faults: list[str],
    epochs: int,
    faults_a_job: int,
    seed: int,
    until: float = float("inf"),
) -> Iterator[dict[str, Any]]:
    """Inject faults, a few a job, a few jobs a daemon; a line a fault, one a job, and two at the end of each daemon.

    Args:
        scratch: a folder of its own.
        part: ``daemon``, or ``strange``: its faults need the chaos plugin in the daemon.
        faults: names, in order.
        epochs: of each job.
        faults_a_job: how often a job is hurt.
        seed: draws when, and what.
        until: no daemon and no job is begun after this time of the monotonic clock.
    """
    rng = random.Random(seed)
    for number, start in enumerate(range(0, len(faults), FAULTS_A_DAEMON)):
        if time.monotonic() >= until:
            return
        few, folder = faults[start : start + FAULTS_A_DAEMON], scratch / str(number)
        folder.mkdir()
        yield from one_daemon(folder, part=part, faults=few, epochs=epochs, faults_a_job=faults_a_job, rng=rng, until=until)


def one_daemon(
    scratch: Path, *, part: str, faults: list[str], epochs: int, faults_a_job: int, rng: random.Random, until: float
) -> Iterator[dict[str, Any]]:
    """The faults of one daemon; see :func:`campaign`."""
    before = shared()
    orders = Orders(scratch / "orders") if part == "strange" else None
    environment = dict(own_temporary_folder(scratch))
    if orders is not None:
        environment |= chaos_environment(scratch, f"orders={orders.folder}")
    with running_daemon(scratch / "state", CONFIG, environment=environment) as daemon:
        wanted = job(scratch, epochs)
        reference, limit_s = undisturbed(daemon, wanted)
        for number, start in enumerate(range(0, len(faults), faults_a_job), 1):
            if time.monotonic() >= until:
                break
            with daemon.sync_client() as esper:
                submitted = esper.submit(wanted, idempotency_key=f"job {number}").id
            victim = Victim(daemon=daemon, job=submitted, rng=rng, orders=orders)
            for name in faults[start : start + faults_a_job]:
                time.sleep(rng.uniform(0.0, 2.5))
                yield {"part": part, "fault": name, "job": number, **_hurt(victim, name, limit_s)}
            ended = outcome(daemon, submitted, wanted, f"job {number}", reference, limit_s)
            yield {"part": "job", "of": part, "job": number, **ended}
        runtime, pids = daemon.runtime_directory, {daemon.pid}
        yield {"part": "memory", "leaked": 0, "daemon_rss_mib": resident_mib(daemon.pid)}
    yield {"part": "end", "of": part, "leaked": left_behind(runtime, scratch, pids, before)}


def undisturbed(daemon: DaemonProcess, wanted: dict[str, Any]) -> tuple[str, float]:
    """What the job leaves when nobody hurts it, and after how many seconds a fault counts as not recovered."""
    began = time.monotonic()
    with daemon.sync_client(ANSWER_S) as esper:
        handle = esper.submit(wanted, idempotency_key="undisturbed")
        handle.wait()
        return ending(handle), max(RECOVERY_S, UNDISTURBED_TIMES * (time.monotonic() - began))


def chaos_environment(scratch: Path, words: str) -> dict[str, str]:
    """Variables under which the chaos plugin is installed in a daemon and its workers, and does what the words say."""
    metadata = scratch / "packages" / "esperd_chaos-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: esperd-chaos\nVersion: 0.1\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[esperd]\nchaos = esperd_chaos\n", encoding="utf-8")
    return {"ESPERD_CHAOS": words, "PYTHONPATH": paths(metadata.parent)}


def paths(packages: Path) -> str:
    """``PYTHONPATH`` with the chaos plugin's modules, and packages of a folder."""
    return os.pathsep.join(filter(None, (str(CHAOS), str(packages), os.environ.get("PYTHONPATH", ""))))


def _hurt(victim: Victim, name: str, limit_s: float) -> dict[str, Any]:
    """Inject one fault, and wait until work goes on."""
    with victim.daemon.sync_client() as esper:
        before = esper.job(victim.job).events()[-1].sequence
    began = time.monotonic()
    problem, wrong = "", 0
    try:
        (FAULTS | STRANGE)[name](victim)
        problem = wait_until_it_goes_on(victim.daemon, victim.job, before, began, limit_s)
    except EsperError as error:
        problem = f"{error.code}: {error}"
    except PromiseBroken as broken:
        problem, wrong = str(broken), 1
    told = {"recovered": not problem, "seconds": round(time.monotonic() - began, 2), "problem": problem}
    return {**told, "wrong": wrong} if wrong else told


def wait_until_it_goes_on(daemon: DaemonProcess, submitted: str, before: int, began: float, limit_s: float) -> str:
    """Return once the job trained an epoch after an event, or is done; otherwise what is wrong."""
    while not _goes_on(daemon, submitted, before):
        if time.monotonic() - began > limit_s:
            return f"no progress within {limit_s:.0f} s"
        time.sleep(0.1)
    return ""


def _goes_on(daemon: DaemonProcess, submitted: str, after: int) -> bool:
    with contextlib.suppress(EsperError), daemon.sync_client(timeout_s=5.0) as esper:
        handle = esper.job(submitted)
        if handle.info().state is JobState.SUCCEEDED:
            return True
        seen = [event.body for event in handle.events(after)]
        lost = [place for place, body in enumerate(seen) if isinstance(body, JobStateChanged | TrainingStarted)]
        return any(isinstance(body, EpochCompleted) for body in seen[lost[-1] if lost else 0 :])
    return False


def outcome(
    daemon: DaemonProcess, submitted: str, wanted: dict[str, Any], key: str, reference: str, limit_s: float
) -> dict[str, Any]:
    """Whether a job that was acknowledged is there, ended once, and ended right."""
    give_up_at = time.monotonic() + 2 * limit_s
    with daemon.sync_client(ANSWER_S) as esper:
        handle = esper.job(submitted)
        while (info := handle.info()).state not in (JobState.SUCCEEDED, JobState.FAILED, JobState.DEAD):
            if time.monotonic() > give_up_at:
                return {"lost": 1, "wrong": 0, "problem": f"it is {info.state} after {2 * limit_s:.0f} s"}
            time.sleep(0.2)
        if info.state is not JobState.SUCCEEDED:
            return {"lost": 1, "wrong": 0, "problem": str(info.error)}
        again = esper.submit(wanted, idempotency_key=key)
        same = again.duplicate and again.id == submitted
        problem = story(handle)
        right = ending(handle) == reference and not problem
        return {"lost": 0 if same else 1, "wrong": 0 if right else 1, "attempts": info.attempt, "problem": problem}


def story(handle: SyncJobHandle) -> str:
    """What is wrong with the events of a job: none may be missing or come twice, nor may two workers have trained at once."""
    events = handle.events()
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        return "events are missing, or come twice"
    last: int | None = None
    for event in events:
        if isinstance(event.body, TrainingStarted):
            last = None  # another worker, which goes on from a checkpoint
        elif isinstance(event.body, EpochCompleted):
            if last is not None and event.body.epoch != last + 1:
                return f"epoch {event.body.epoch} came after epoch {last}: two workers trained at once"
            last = event.body.epoch
    return ""


CLIENTS = """
import asyncio, json, resource, sys
from esperd.client import Client
from esperd.errors import Busy, EsperError

async def one(endpoint, rounds):
    told = {"answered": 0, "busy": 0, "other": []}
    try:
        async with Client(endpoint, timeout_s=60.0) as esper:
            for _ in range(rounds):
                try:
                    await esper.jobs()
                    told["answered"] += 1
                except Busy:
                    told["busy"] += 1
    except Busy:
        told["busy"] += rounds
    except EsperError as error:
        told["other"].append(f"{error.code}: {error}"[:200])
    return told

async def main(endpoint, clients, rounds):
    print(json.dumps(await asyncio.gather(*(one(endpoint, rounds) for _ in range(clients)))))

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def crowd(scratch: Path, clients: int, *, processes: int = 5, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Many clients at once: each is answered or told to come back, and none hangs."""
    with running_daemon(scratch / "state", CONFIG) as daemon:
        began = time.monotonic()
        command = [sys.executable, "-c", CLIENTS, daemon.endpoint, str(clients // processes), str(rounds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        told = [line for process in running for line in json.loads(process.communicate(timeout=600)[0])]
        with daemon.sync_client() as esper:
            alive = bool(esper.actors().actors)
        problems = sorted({problem for line in told for problem in line["other"]})
        yield {
            "part": "clients",
            "fault": f"{clients} clients at once",
            "recovered": alive and not problems,
            "seconds": round(time.monotonic() - began, 2),
            "answered": sum(line["answered"] for line in told),
            "busy": sum(line["busy"] for line in told),
            "problem": "; ".join(problems),
            "daemon_rss_mib": resident_mib(daemon.pid),
        }
