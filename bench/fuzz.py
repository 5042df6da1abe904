"""Does the front door stand? Real requests, mutated a million times, thrown at a real daemon; it must live and answer.

One JSON line a round of 10,000 frames is appended to ``bench/results/fuzz.jsonl``; an interrupted bench goes on with what is
missing.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import harness
import zmq

from esperd.actors.codec import Codec, Kind
from esperd.config import Config, Limits
from esperd.messages import PROTOCOL_VERSION, Message
from esperd.messages.control import Hello, ListActors, ListPlugins
from esperd.messages.evidence import ListEvidence
from esperd.messages.jobs import Budget, FetchArtifact, GetJob, Job, ListArtifacts, ListJobs, PauseJob, SubmitJob
from esperd.messages.kernels import ListKernels
from esperd.messages.overruling import ExplainDecision, Overrule
from esperd.messages.telemetry import GetEvents
from esperd.testing import DaemonProcess, running_daemon

LINES = Path(__file__).parent / "results" / "fuzz.jsonl"
FULL, QUICK = 1_000_000, 20_000
ROUND = 10_000
VERSION = 1
REAL: tuple[Message, ...] = (
    Hello(protocol=PROTOCOL_VERSION, version="0"),
    ListActors(),
    ListPlugins(),
    ListJobs(limit=10),
    GetJob(id="j0"),
    PauseJob(id="j0"),
    ListArtifacts(id="j0"),
    FetchArtifact(id="j0", name="report.json", offset=0),
    GetEvents(job="j0", after=0),
    ListKernels(),
    ListEvidence(),
    ExplainDecision(id="j0", point=1),
    Overrule(id="j0", wish="wait", by="fuzz"),
    SubmitJob(job=Job(host="no_such_host", data="no_such_data", budget=Budget(epochs=1), workdir="/"), idempotency_key="k"),
)
"""What clients send. The job's host does not exist, so that no mutant is a job that trains."""


def mutated(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """One to four changes: a byte, a cut, bytes more, a frame more, a frame less, frames swapped."""
    changed = [bytearray(frame) for frame in frames]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed))
        frame = changed[at]
        match rng.randrange(7):
            case 0 | 1 if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 2:
                del frame[rng.randint(0, len(frame)) :]
            case 3:
                place = rng.randint(0, len(frame))
                frame[place:place] = rng.randbytes(rng.randint(1, 64))
            case 4:
                changed.append(bytearray(rng.randbytes(rng.randint(0, 64))))
            case 5 if len(changed) > 1:
                del changed[at]
            case _:
                rng.shuffle(changed)
    return [bytes(frame) for frame in changed]


def one_round(daemon: DaemonProcess, number: int) -> dict:
    """Throw a round at the daemon, then ask it something."""
    rng, codec = random.Random(number), Codec()
    real = [
        codec.encode(codec.head(Kind.ASK, place + 1, to="daemon", sender="fuzz"), message) for place, message in enumerate(REAL)
    ]
    begun, replies = time.monotonic(), 0
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(daemon.endpoint)
    with contextlib.closing(dealer):
        for sent in range(ROUND):
            dealer.send_multipart(mutated(rng.choice(real), rng))
            while sent - replies > 200 and dealer.poll(2_000):
                dealer.recv_multipart()
                replies += 1
        while replies < ROUND and dealer.poll(500):
            dealer.recv_multipart()
            replies += 1
        dealer.setsockopt(zmq.LINGER, 0)
    alive = daemon.process.poll() is None
    answers = False
    if alive:
        with daemon.sync_client() as esper:
            answers = all(actor.state != "failed" and not actor.restarts for actor in esper.actors().actors)
    return {
        "round": number,
        "frames": ROUND,
        "replies": replies,
        "answers": answers,
        "seconds": round(time.monotonic() - begun, 2),
        "resident_mib": _resident_mib(daemon.pid) if alive else None,
    }


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * 4096 / 2**20, 1)


def figures(lines: list[dict]) -> tuple[harness.Figure, ...]:
    """Frames thrown, rounds the daemon answered after, replies a frame."""
    frames = sum(line["frames"] for line in lines)
    standing = sum(line["answers"] for line in lines) / len(lines)
    told = sum(line["replies"] for line in lines) / frames
    return (
        _figure("frames/thrown", float(frames), "frames", FULL),
        _figure("answering/after", standing, "share of rounds", 1.0),
        _figure("replies/frame", told, "share", 1.0),
    )


def _figure(name: str, value: float, unit: str, aim: float) -> harness.Figure:
    baseline = harness.Baseline(name="aim", value=aim, repeats=(aim,))
    return harness.Figure(
        name=name, value=value, unit=unit, better="higher", repeats=(value,), baseline=baseline, ratio=value / aim
    )


def main() -> None:
    """Run what is missing, print, write."""
    chosen = harness.parsed(harness.parser(__doc__.partition("\n")[0], repeats=1, quick_repeats=1, known=True))
    lines: list[dict] = []
    if not chosen.quick and LINES.exists():
        read = [json.loads(text) for text in LINES.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in read if line["version"] == VERSION]
    wanted = (QUICK if chosen.quick else FULL) // ROUND
    config = Config(limits=Limits(requests_per_s=1e9, burst=10**9))
    if not chosen.known and len(lines) < wanted:
        with tempfile.TemporaryDirectory(prefix="esperd-f-") as name, running_daemon(Path(name) / "state", config) as daemon:
            for number in range(len(lines), wanted):
                line = {"version": VERSION, "commit": harness.commit(), **one_round(daemon, number)}
                lines.append(line)
                print(json.dumps(line), file=sys.stderr, flush=True)
                if not chosen.quick:
                    LINES.parent.mkdir(exist_ok=True)
                    with LINES.open("a", encoding="utf-8") as log:
                        log.write(json.dumps(line) + "\n")
                if not line["answers"]:
                    sys.exit(f"the daemon did not answer after round {number}:\n{daemon.log()[-3000:]}")
    if not lines:
        sys.exit("nothing is known yet")
    found = harness.results("fuzz", figures(lines), quick=chosen.quick, settings={"rounds": len(lines), "frames_a_round": ROUND})
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
