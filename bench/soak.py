"""Is memory flat? Ten thousand small jobs through the front door, or an hour of them, whichever is first.

Protocol: ``bench/PROTOCOL.md``. Every job is a real one: submitted by a client, leased to a worker process, trained, reported,
its events and its report read back. Once a minute a line says what the daemon holds: ``bench/results/soak.jsonl``.
``--dying`` soaks the way of a job whose worker ends at once, which costs so little that an hour has thousands of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import msgspec
from leftovers import left_behind, resident_mib, shared

from esperd.config import Config, Jobs, Workers
from esperd.messages.jobs import FINAL_JOB_STATES, JobState
from esperd.sync_client import SyncClient, SyncJobHandle
from esperd.testing import DaemonProcess, running_daemon

LINES = Path(__file__).parent / "results" / "soak.jsonl"
JOBS = 10_000
SECONDS = 3_600.0
QUICK_SECONDS = 30.0
LOOK_S = 60.0
QUICK_LOOK_S = 0.0
AT_ONCE = 2
WAITING = {False: 4, True: 20}
"""Jobs that are submitted and not done; of those that die."""
POLL_S = 0.5
PATIENCE_S = 900.0
"""For one answer: on a machine that gives its time to others, a daemon at the lowest priority may wait for minutes."""
GROWING_EVERY = 10
"""Every so many jobs one grows, so that policy, compiler and cache have something to do."""
VERSION = 1
CONFIG = Config(jobs=Jobs(max_running=AT_ONCE), workers=Workers(heartbeat_interval_s=1.0, heartbeat_timeout_s=60.0))
PROJECT = """
import numpy as np
from torch import nn


def small():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))


def clouds(count=60):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, size=count)
    return (rng.normal(size=(count, 4)) + y[:, None]).astype(np.float32), y
"""


DYING = """#!/bin/sh
case "$*" in *esperd.trainer.worker*) exit 3;; esac
exec {python} "$@"
"""
"""An interpreter that has esperd, as the daemon finds when it looks, and whose workers end at once."""
DYING_CONFIG = msgspec.structs.replace(CONFIG, jobs=Jobs(max_running=AT_ONCE, max_attempts=1))


def job(folder: Path, number: int, *, dying: bool) -> dict[str, Any]:
    """One step of training; every tenth job grows for three epochs. Or a job that dies."""
    grows = number % GROWING_EVERY == 0
    interpreter = {"python": str(folder / "python")} if dying else {}
    return {
        **interpreter,
        "host": "soaked:small",
        "data": "soaked:clouds",
        "workdir": str(folder),
        "batch_size": 64,
        "budget": {"epochs": 3 if grows else 1},
        "growth": {"enabled": grows, "blueprints": ["mlp_low*"]},
        "rng_seed": number,
    }


def soak(scratch: Path, *, jobs: int, seconds: float, look_s: float, dying: bool) -> Iterator[dict[str, Any]]:
    """A line a look, and one at the end.

    Args:
        scratch: a folder of its own, short enough for sockets.
        jobs: after so many it ends,
        seconds: or after this time.
        look_s: between two looks.
        dying: jobs whose worker ends at once.
    """
    (scratch / "soaked.py").write_text(PROJECT, encoding="utf-8")
    (scratch / "python").write_text(DYING.format(python=sys.executable), encoding="utf-8")
    (scratch / "python").chmod(0o755)
    before = shared()
    with running_daemon(scratch / "state", DYING_CONFIG if dying else CONFIG) as daemon:
        began = looked = time.monotonic()
        waiting: deque[SyncJobHandle] = deque()
        submitted = done = 0
        unsound: list[str] = []
        with daemon.sync_client(timeout_s=PATIENCE_S) as esper:
            while done < jobs and time.monotonic() - began < seconds:
                while len(waiting) < WAITING[dying] and submitted < jobs:
                    submitted += 1
                    waiting.append(esper.submit(job(scratch, submitted, dying=dying), idempotency_key=f"soak {submitted}"))
                if _is_over(waiting[0]):
                    unsound += _problems(waiting.popleft(), dying=dying)
                    done += 1
                else:
                    time.sleep(POLL_S)
                if time.monotonic() - looked >= look_s:
                    looked = time.monotonic()
                    yield {"part": "look", "seconds": round(looked - began, 1), "jobs": done, **held(daemon, esper)}
            while waiting:
                unsound += _problems(waiting.popleft(), dying=dying)
                done += 1
        took, runtime, pids = time.monotonic() - began, daemon.runtime_directory, {daemon.pid}
    leaked = left_behind(runtime, scratch, pids, before)
    yield {"part": "end", "seconds": round(took, 1), "jobs": done, "unsound": unsound, "leaked": leaked}


def _is_over(handle: SyncJobHandle) -> bool:
    return handle.info().state in FINAL_JOB_STATES


def _problems(handle: SyncJobHandle, *, dying: bool) -> list[str]:
    """A job must succeed at its first attempt, or die in it, and what it left must be readable."""
    info = handle.wait()
    if info.state is not (JobState.DEAD if dying else JobState.SUCCEEDED) or info.attempt != 1:
        return [f"job {info.id} ended {info.state} in attempt {info.attempt}: {info.error}"]
    handle.events()
    if dying:
        handle.failure()
    else:
        handle.report()
    return []


def held(daemon: DaemonProcess, esper: SyncClient) -> dict[str, Any]:
    """What a daemon and its compiler hold now."""
    actors = esper.actors()
    compiler = next((actor.pid for actor in actors.actors if actor.name == "compiler" and actor.pid is not None), None)
    tasks, threads = told(daemon)
    state = daemon.state_directory
    return {
        "rss_mib": resident_mib(daemon.pid),
        "anonymous_mib": _anonymous_mib(daemon.pid),
        "compiler_rss_mib": None if compiler is None else resident_mib(compiler),
        "client_rss_mib": resident_mib(os.getpid()),
        "open_files": len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())),
        "threads": threads,
        "tasks": tasks,
        "actors": len(actors.actors),
        "mailbox_bytes": sum(actor.mailbox_bytes for actor in actors.actors),
        "dead_letters": sum(actors.dead_letters.values()),
        "database_mib": {file.name: round(file.stat().st_size / 2**20, 2) for file in sorted(state.glob("*.db*"))},
        "blobs": sum(1 for file in (state / "blobs").rglob("*") if file.is_file()),
        "checkpoints": sum(1 for file in (state / "checkpoints").rglob("*") if file.is_file()),
        "shared_memory": len(list(Path("/dev/shm").iterdir())),
    }


def told(daemon: DaemonProcess) -> tuple[int, int]:
    """Tasks and threads, as the daemon tells on SIGUSR1."""
    start = daemon.log_file.stat().st_size
    os.kill(daemon.pid, signal.SIGUSR1)
    give_up_at = time.monotonic() + 60.0
    while time.monotonic() < give_up_at:
        with daemon.log_file.open("rb") as log:
            log.seek(start)
            records = [json.loads(line) for line in log.read().decode().splitlines() if '"dump: ' in line and line.endswith("}")]
        done = next((record for record in records if record["event"] == "dump: done"), None)
        if done is not None:
            return sum(record["event"] == "dump: task" for record in records), len(done["threads"])
        time.sleep(0.1)
    raise SystemExit("the daemon did not tell its tasks within 60 s")


def _anonymous_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024, 1)


def figures(lines: list[dict[str, Any]], name: str) -> tuple[harness.Figure, ...]:
    """How much more the daemon holds in the last quarter than in the second one, and the slope after the first."""
    looks = [line for line in lines if line["part"] == "look"]
    if len(looks) < 4:
        raise SystemExit(f"{len(looks)} looks are too few to say whether memory is flat")
    quarter = len(looks) // 4
    second, last = looks[quarter : 2 * quarter], looks[-quarter:]
    told = [
        harness.median_figure(
            f"{name}/{of}",
            [line[key] for line in last],
            unit=unit,
            better="lower",
            against="second quarter",
            baseline=[line[key] for line in second],
        )
        for of, key, unit in (
            ("daemon_memory", "rss_mib", "MiB"),
            ("compiler_memory", "compiler_rss_mib", "MiB"),
            ("open_files", "open_files", "files"),
            ("tasks", "tasks", "tasks"),
            ("threads", "threads", "threads"),
        )
    ]
    after = looks[quarter:]
    slope = statistics.linear_regression([line["seconds"] / 3600 for line in after], [line["rss_mib"] for line in after]).slope
    median = statistics.median(line["rss_mib"] for line in second)
    told.append(
        harness.Figure(
            name=f"{name}/slope",
            value=slope,
            unit="MiB/hour",
            better="lower",
            repeats=(slope,),
            baseline=harness.Baseline(name="memory in second quarter", value=median, repeats=(median,)),
            ratio=slope / median,
        )
    )
    return tuple(told)


def main() -> None:
    """Soak, print, write."""
    parser = harness.parser(__doc__.partition("\n")[0], repeats=1, quick_repeats=1, known=True)
    parser.add_argument("--seconds", type=float, help=f"how long at most (default {SECONDS:g}, quick {QUICK_SECONDS:g})")
    parser.add_argument("--dying", action="store_true", help="jobs whose worker ends at once: thousands an hour")
    chosen = harness.parsed(parser)
    name = "soak_dying" if chosen.dying else "soak"
    lines: list[dict[str, Any]] = []
    if chosen.known:
        lines = [json.loads(text) for text in LINES.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line["version"] == VERSION and line.get("dying", False) is chosen.dying]
        if not lines:
            sys.exit("no run of this kind is known")
        lines = [line for line in lines if line["run"] == lines[-1]["run"]]
    else:
        seconds = chosen.seconds or (QUICK_SECONDS if chosen.quick else SECONDS)
        run = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {harness.commit()[:12]}"
        scratch = Path(tempfile.mkdtemp(prefix="esperd-s-"))
        try:
            look_s = QUICK_LOOK_S if chosen.quick else LOOK_S
            for line in soak(scratch, jobs=JOBS, seconds=seconds, look_s=look_s, dying=chosen.dying):
                told = {"version": VERSION, "commit": harness.commit(), "run": run, "dying": chosen.dying, **line}
                lines.append(told)
                print(json.dumps(told), file=sys.stderr, flush=True)
                if not chosen.quick:
                    with LINES.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(told) + "\n")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    ended = next((line for line in lines if line["part"] == "end"), None)
    counted = max(line["jobs"] for line in lines)
    found = harness.results(
        name, figures(lines, name), quick=chosen.quick, settings={"jobs": counted, "seconds": lines[-1]["seconds"]}
    )
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)
    if ended is not None and (ended["leaked"] or ended["unsound"]):
        sys.exit(f"left behind: {', '.join(ended['leaked'])}; unsound: {'; '.join(ended['unsound'])}")


if __name__ == "__main__":
    main()
