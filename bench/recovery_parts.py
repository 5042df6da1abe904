"""Faults on single parts, by the hundred: a disk that fails at its n-th call, power cuts, bad lines, turned bits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"))
from esperd_chaos.disk import FailingFilesystem
from esperd_chaos.faults import turn_a_bit
from esperd_chaos.proxy import BadLine, bad_line

from esperd.actors.requests import RequestClient, RequestServer
from esperd.config import endpoint
from esperd.daemon.job_store import JobStore
from esperd.daemon.job_tables import MIGRATIONS
from esperd.errors import EsperError, StoreFailed
from esperd.messages.base import Message, Reply
from esperd.messages.jobs import Budget, Job, JobSubmitted, SubmitJob
from esperd.store.blobs import Blobs
from esperd.store.database import Database

Line = dict[str, Any]


def failing_disk(scratch: Path) -> Iterator[Line]:
    """Every call of every operation of the blob store fails once, with each of three codes; then the disk is well again."""
    content = b"what was there before", b"something new"

    def put(blobs: Blobs) -> None:
        blobs.put(content[1])

    def sweep(blobs: Blobs) -> None:
        blobs.sweep([Blobs(scratch / "hash").put(content[0])])

    operations: dict[str, Callable[[Blobs], None]] = {"put": put, "sweep": sweep}
    for name, operation in operations.items():
        for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            for call in range(1, 100):
                folder = scratch / f"{name}-{code}-{call}"
                kept = Blobs(folder).put(content[0])
                if name == "sweep":
                    Blobs(folder).put(b"of no use any more")
                disk = FailingFilesystem(call, code)
                with contextlib.suppress(StoreFailed):
                    operation(Blobs(folder, disk))
                if len(disk.calls) < call:
                    break
                blobs = Blobs(folder)
                problem = ""
                try:
                    lost = int(blobs.get(kept) != content[0])
                    operation(blobs)
                    blobs.remove_temporaries()
                except EsperError as error:
                    lost, problem = 1, f"{error.code}: {error}"
                told = f"{errno.errorcode[code]} at call {call} ({disk.calls[-1]}) of {name}"
                yield {"part": "disk", "fault": told, "recovered": not problem, "lost": lost, "wrong": 0, "problem": problem}


WRITER = """
import asyncio, sys
from pathlib import Path
from esperd.store.blobs import Blobs
from esperd.store.database import Database

async def main(folder):
    blobs = Blobs(folder / "blobs")
    table = "CREATE TABLE kept (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL) STRICT"
    async with Database.open(folder / "a.db", [table]) as database:
        number = 0
        while True:
            number += 1
            sha256 = blobs.put(b"blob %d of %s" % (number, sys.argv[2].encode()))
            await database.write(lambda c: c.execute("INSERT INTO kept (sha256) VALUES (?)", (sha256,)) and None)
            print(sha256, flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


def power_cuts(scratch: Path, count: int, rng: random.Random) -> Iterator[Line]:
    """A process that acknowledges rows and blobs is killed at some moment: whatever it acknowledged must be there."""
    folder = scratch / "power"
    folder.mkdir()
    acknowledged: list[str] = []
    for number in range(count):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(number)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            acknowledged.append(process.stdout.readline().strip())
            time.sleep(rng.uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
            acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        rows, sound = asyncio.run(_rows(folder / "a.db"))
        blobs = Blobs(folder / "blobs")
        lost = len(set(acknowledged) - rows)
        wrong = 0 if sound else 1
        for sha256 in acknowledged[-50:]:
            try:
                blobs.get(sha256)
            except StoreFailed:
                lost += 1
        yield {"part": "power", "fault": "kill -9 of a writer", "recovered": sound, "lost": lost, "wrong": wrong, "problem": ""}


async def _rows(path: Path) -> tuple[set[str], bool]:
    async with Database.open(path, ["CREATE TABLE kept (id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL) STRICT"]) as database:
        rows = {row["sha256"] for row in await database.read("SELECT sha256 FROM kept")}
        (sound,) = await database.read("PRAGMA integrity_check")
        return rows, sound[0] == "ok"


def turned_bits(scratch: Path, count: int, rng: random.Random) -> Iterator[Line]:
    """One bit of a stored blob turns: it must be noticed, set aside, and stored anew."""
    blobs = Blobs(scratch / "bits")
    for number in range(count):
        content = rng.randbytes(rng.choice((1, 100, 10_000)))
        sha256 = blobs.put(content)
        turn_a_bit(blobs.path(sha256), rng)
        wrong, problem = 0, ""
        with contextlib.suppress(StoreFailed):
            blobs.get(sha256)
            wrong = 1  # whatever came back, the file is not what it should be
        try:
            blobs.put(content)
            lost = int(blobs.get(sha256) != content)
        except StoreFailed as error:
            lost, problem = 1, str(error)
        yield {
            "part": "bits",
            "fault": f"bit turned in blob {number}",
            "recovered": not problem,
            "lost": lost,
            "wrong": wrong,
            "problem": problem,
        }


def bad_lines(scratch: Path, count: int, rng: random.Random) -> Iterator[Line]:
    """Frames between a client and a daemon are dropped, doubled, swapped and cut short; the client asks again with its key."""
    found = asyncio.run(_bad_lines(scratch, count, rng))
    yield from found


async def _bad_lines(scratch: Path, count: int, rng: random.Random) -> list[Line]:
    behind, front = endpoint(scratch, "behind"), endpoint(scratch, "front")
    line = BadLine(rng, share=0.35)
    told: list[Line] = []
    async with Database.open(scratch / "jobs.db", MIGRATIONS) as database:
        store = JobStore(database, time.time)

        async def answer(_client: bytes, message: Message) -> Reply:
            assert isinstance(message, SubmitJob)
            submitted = await store.submit(message.job, message.idempotency_key)
            return JobSubmitted(id=submitted.info.id, duplicate=submitted.duplicate)

        async with RequestServer(behind, answer), bad_line(front, behind, line):
            job, keys = Job(host="mlp", data="digits", workdir="/", budget=Budget(epochs=1)), dict[str, str]()
            while len(line.injected) < count:
                before, key = len(line.injected), f"key {len(keys)}"
                for _ in range(50):
                    async with RequestClient(front, timeout_s=0.2) as client:
                        try:
                            reply = await client.request(SubmitJob(job=job, idempotency_key=key))
                        except EsperError:
                            continue
                    if isinstance(reply, JobSubmitted):
                        keys[key] = reply.id
                        break
                told += [
                    {"part": "line", "fault": fault, "recovered": key in keys, "lost": 0, "wrong": 0, "problem": ""}
                    for fault in line.injected[before:]
                ]
        rows = await database.read("SELECT id FROM jobs")
        known = [row["id"] for row in rows]
        lost = [job_id for job_id in keys.values() if job_id not in known]
        if told:
            told[-1] = {**told[-1], "lost": len(lost), "wrong": len(keys) - len(set(keys.values()))}
    return told
