"""Faults of what surrounds a daemon: plugins, clients' keys, disk, databases, and jobs that kill their workers."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import recovery_daemon
import zmq
from leftovers import left_behind, own_temporary_folder, shared
from recovery_daemon import ANSWER_S, CONFIG, ending, outcome, undisturbed

from esperd.actors.keys import AllowList, create_pair
from esperd.config import Jobs, Network, Storage
from esperd.daemon.backup import back_up
from esperd.daemon.restore import restore
from esperd.daemon.state import QUARANTINE, database_path
from esperd.errors import AuthenticationFailed, DaemonUnreachable, EsperError, ReadOnly, StoreFailed
from esperd.messages.jobs import JobState
from esperd.sync_client import SyncClient
from esperd.testing import DaemonProcess, running_daemon

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugins" / "esperd-chaos" / "src"))
from esperd_chaos import raising

Line = dict[str, Any]
EXPENDABLE = ("kernels", "events")
"""Databases that are begun anew when they are damaged."""
DATABASES = ("jobs", "decisions", *EXPENDABLE)
PAGE_BYTES = 4_096
DEATHS = {
    "kills itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "leaves without a word": "os._exit(1)",
    "reads where nothing is": "ctypes.string_at(0)",
    "aborts": "os.abort()",
}
"""What a poison job does to its worker, in Python."""
TMPFS_MIB = 96
"""Room for what all jobs leave: on a disk that they fill by themselves nothing goes on when the others' file is gone."""
UNTIL_S = 60.0


def raising_hooks(scratch: Path, epochs: int) -> Iterator[Line]:
    """Every hook of a plugin raises an error, or gives up on the process; jobs must end as if it were not there."""
    wanted = recovery_daemon.job(scratch, epochs)
    with running_daemon(scratch / "well", CONFIG, environment=own_temporary_folder(scratch)) as daemon:
        reference, limit_s = undisturbed(daemon, wanted)
    raising.install(scratch / "packages")
    environment = {**own_temporary_folder(scratch), "PYTHONPATH": recovery_daemon.paths(scratch / "packages")}
    before = shared()
    with running_daemon(scratch / "state", CONFIG, environment=environment) as daemon:
        with daemon.sync_client(ANSWER_S) as esper:
            submitted = esper.submit(wanted, idempotency_key="raising").id
            told = outcome(daemon, submitted, wanted, "raising", reference, limit_s)
            listed = {plugin.name: plugin.error or "" for plugin in esper.plugins().plugins}
        for name in raising.names():
            hook, _, kind = name.rpartition("_")
            well = f"chaos: {hook} raises" in listed.get(name, "")
            problem = "" if well else f"its plugin is listed with {listed.get(name)!r}"
            yield {"part": "hooks", "fault": f"{hook} raises: {kind}", "recovered": well, "problem": problem}
        yield {"part": "job", "of": "hooks", "job": 1, **told}
        runtime, pids = daemon.runtime_directory, {daemon.pid}
    yield {"part": "end", "of": "hooks", "leaked": left_behind(runtime, scratch, pids, before)}


def wrong_keys(scratch: Path, count: int, rng: random.Random) -> Iterator[Line]:
    """Clients with wrong keys are refused, and those with right ones served, at the same moment."""
    state, keys = scratch / "state", scratch / "keys"
    keys.mkdir()
    server, mine, stranger, other = (create_pair(keys / f"{name}.key") for name in ("server", "mine", "stranger", "other"))
    (state / "keys").mkdir(parents=True)
    shutil.copy(keys / "server.key", state / "keys" / "server.key")
    allowed = AllowList(state / "keys" / "allowed")
    allowed.allow("mine", mine.public)
    listen, events = (f"tcp://127.0.0.1:{port}" for port in _free_ports(2))
    config = msgspec.structs.replace(CONFIG, network=Network(listen=listen, events=events))
    before = shared()

    def refused(server_key: bytes, client: str) -> str:
        try:
            with SyncClient(listen, 5.0, 0.0, server_key=server_key.hex(), client_key=keys / f"{client}.key"):
                return "it was let in"
        except (AuthenticationFailed, DaemonUnreachable):
            return ""

    def unknown() -> str:
        return refused(server.public, "stranger")

    def meant_for_another() -> str:
        return refused(other.public, "mine")

    def revoked() -> str:
        allowed.allow("other", other.public)
        with SyncClient(listen, 10.0, server_key=server.public.hex(), client_key=keys / "other.key") as esper:
            allowed.revoke("other")
            try:
                for _ in range(50):
                    esper.jobs()
                    time.sleep(0.1)
            except AuthenticationFailed:
                return ""
        return "a revoked key was served for five seconds"

    def no_keys() -> str:
        with contextlib.closing(zmq.Context.instance().socket(zmq.DEALER)) as plain:
            plain.linger = 0
            plain.connect(listen)
            plain.send_multipart([b"hello", b"is anybody there?"])
            return "it was answered" if plain.poll(500) else ""

    def garbage() -> str:
        host, _, port = listen.removeprefix("tcp://").partition(":")
        with socket.create_connection((host, int(port)), 5.0) as raw:
            raw.sendall(rng.randbytes(rng.randint(1, 5_000)))
        return ""

    with running_daemon(state, config, environment=own_temporary_folder(scratch)) as daemon:
        faults: list[Callable[[], str]] = [unknown, meant_for_another, revoked, no_keys, garbage]
        for number in range(count):
            fault = faults[number % len(faults)]
            began = time.monotonic()
            problem = fault()
            try:
                with SyncClient(listen, 10.0, server_key=server.public.hex(), client_key=keys / "mine.key") as esper:
                    esper.jobs()
            except EsperError as error:
                problem += f" whoever is allowed was refused: {error}"
            name = f"key: {fault.__name__.replace('_', ' ')}"
            seconds = round(time.monotonic() - began, 2)
            yield {"part": "keys", "fault": name, "recovered": not problem, "seconds": seconds, "problem": problem}
        secrets = [pair.secret.hex() for pair in (server, mine, stranger, other) if pair.secret.hex() in daemon.log()]
        runtime, pids = daemon.runtime_directory, {daemon.pid}
    leaked = left_behind(runtime, scratch, pids, before) + ["a secret key in the log" for _ in secrets]
    yield {"part": "end", "of": "keys", "leaked": leaked}


def damaged_pages(scratch: Path, count: int, rng: random.Random) -> Iterator[Line]:
    """A page of a database is written over while its daemon is away. What is expendable is begun anew, what is not is refused
    until a backup is restored; the job that was done is there afterwards.
    """
    wanted = recovery_daemon.job(scratch, 6)
    state = scratch / "state"
    before = shared()
    with running_daemon(state, CONFIG, environment=own_temporary_folder(scratch)) as daemon:
        reference, _ = undisturbed(daemon, wanted)
        with daemon.sync_client(ANSWER_S) as esper:
            done = esper.submit(wanted, idempotency_key="undisturbed").id
        back_up(state, scratch / "backup", lambda _what, _done, _all: None)
    for number in range(count):
        name = DATABASES[number % len(DATABASES)]
        began = time.monotonic()
        _write_over_a_page(database_path(state, name), rng)
        problem, lost, refused = "", 0, ""
        daemon = DaemonProcess(state, CONFIG, environment=own_temporary_folder(scratch))
        try:
            with contextlib.closing(daemon):
                try:
                    daemon.start()
                except StoreFailed as error:
                    refused = str(error)
                    restore(scratch / "backup", state, lambda _what, _done, _all: None, force=True)
                    daemon.start()
                if bool(refused) == (name in EXPENDABLE) or (refused and "restore" not in refused):
                    problem = f"{name}.db was damaged and the daemon said {refused!r}"
                if not refused and not list((state / QUARANTINE).glob(f"{name}.db.*")):
                    problem = f"{name}.db was damaged and not moved aside"
                with daemon.sync_client(ANSWER_S) as esper:
                    handle = esper.job(done)
                    lost = int(handle.info().state is not JobState.SUCCEEDED or ending(handle) != reference)
        except EsperError as error:
            problem = f"{error.code}: {error}"
        shutil.rmtree(state / QUARANTINE, ignore_errors=True)
        told = {"recovered": not problem, "seconds": round(time.monotonic() - began, 2), "lost": lost, "problem": problem}
        yield {"part": "pages", "fault": f"page of {name}.db written over", **told}
        yield {
            "part": "end",
            "of": "pages",
            "leaked": left_behind(daemon.runtime_directory, scratch, {daemon.pid}, before),
        }


def _write_over_a_page(database: Path, rng: random.Random) -> None:
    """Any page but those that hold nothing: what nobody reads is no damage."""
    pages = database.stat().st_size // PAGE_BYTES
    with database.open("r+b") as file:
        filled = [page for page in range(pages) if _page(file, page).strip(b"\0")]
        file.seek(rng.choice(filled) * PAGE_BYTES)
        file.write(rng.randbytes(PAGE_BYTES))


def _page(file: Any, number: int) -> bytes:
    file.seek(number * PAGE_BYTES)
    return file.read(PAGE_BYTES)


def poison(scratch: Path, count: int, epochs: int) -> Iterator[Line]:
    """A job whose workers die, whatever they do: after its attempts it is dead, with the reason, and the next one is well."""
    wanted = recovery_daemon.job(scratch, epochs)
    config = msgspec.structs.replace(CONFIG, jobs=Jobs(max_attempts=2, backoff_s=0.05, backoff_max_s=0.1))
    before = shared()
    with running_daemon(scratch / "state", config, environment=own_temporary_folder(scratch)) as daemon:
        reference, limit_s = undisturbed(daemon, wanted)
        for number in range(count):
            name, death = list(DEATHS.items())[number % len(DEATHS)]
            module = f"poison{number}"
            code = f"import ctypes, os, signal\n\n\ndef host(**_options):\n    {death}\n"
            (scratch / f"{module}.py").write_text(code, encoding="utf-8")
            began, key = time.monotonic(), f"beside {number}"
            with daemon.sync_client(ANSWER_S) as esper:
                bad = esper.submit({**wanted, "host": f"{module}:host"}, idempotency_key=f"poison {number}")
                good = esper.submit(wanted, idempotency_key=key)
                info = bad.wait()
                analysis = bad.failure() if info.state is JobState.DEAD else None
                told = outcome(daemon, good.id, wanted, key, reference, limit_s)
            well = info.state is JobState.DEAD and info.attempt == 2 and analysis is not None and bool(analysis.advice)
            problem = "" if well else f"it is {info.state} after {info.attempt} attempts: {info.error}"
            yield {
                "part": "poison",
                "fault": f"job that {name}",
                "recovered": well,
                "seconds": round(time.monotonic() - began, 2),
                "problem": problem,
            }
            yield {"part": "job", "of": "poison", "job": number, **told}
        runtime, pids = daemon.runtime_directory, {daemon.pid}
    yield {"part": "end", "of": "poison", "leaked": left_behind(runtime, scratch, pids, before)}


def full_disk(scratch: Path, count: int, epochs: int) -> Iterator[Line]:
    """A small disk of its own fills up, and is emptied again: read-only meanwhile, and the job ends as if nothing had been."""
    wanted = recovery_daemon.job(scratch, epochs)
    place = scratch / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(place)]
    mounted = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if mounted.returncode:
        print(f"no small disk here: {mounted.stderr.strip()}", file=sys.stderr)
        return
    before = shared()
    try:
        config = msgspec.structs.replace(CONFIG, storage=Storage(min_free_bytes=4 * 2**20, reserve_bytes=2**20))
        with running_daemon(place / "state", config, environment=own_temporary_folder(scratch)) as daemon:
            reference, limit_s = undisturbed(daemon, wanted)
            for number in range(count):
                key, began = f"full {number}", time.monotonic()
                with daemon.sync_client(ANSWER_S) as esper:
                    handle = esper.submit(wanted, idempotency_key=key)
                    time.sleep(random.Random(number).uniform(0.0, 6.0))
                    _fill(place / "others")
                    problem = _until_read_only(esper, wanted)
                    (place / "others").unlink()
                    told = outcome(daemon, handle.id, wanted, key, reference, limit_s)
                problem = problem or told["problem"]
                seconds = round(time.monotonic() - began, 2)
                yield {"part": "full", "fault": "disk full", "recovered": not problem, "seconds": seconds, "problem": problem}
                yield {"part": "job", "of": "full", "job": number, **told}
            runtime, pids = daemon.runtime_directory, {daemon.pid}
        yield {"part": "end", "of": "full", "leaked": left_behind(runtime, scratch, pids, before)}
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))


def _until_read_only(esper: SyncClient, wanted: Line) -> str:
    """A full disk must be said to whoever submits; returns what was said instead."""
    give_up_at = time.monotonic() + UNTIL_S
    said = "every job was taken"
    while time.monotonic() < give_up_at:
        try:
            esper.submit({**wanted, "name": "one too many"}).cancel()
        except ReadOnly:
            return ""
        except EsperError as error:
            said = f"{error.code}: {error}"
        time.sleep(0.2)
    return f"a full disk was not said within {UNTIL_S:g} s: {said}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
