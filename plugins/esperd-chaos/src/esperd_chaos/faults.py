"""What a machine does to a daemon on a bad day, done from outside to a daemon of :func:`esperd.testing.running_daemon`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

from esperd.actors.codec import Codec, Kind
from esperd.actors.incarnation import GENERATION, TOKEN, Incarnation
from esperd.errors import EsperError
from esperd.messages.control import Ready
from esperd.messages.leases import (
    JobStopped,
    JobSucceeded,
)
from esperd.testing import DaemonProcess
from esperd_chaos.orders import Orders

HOLD_S = 1.5
"""How long a process is stopped, or a watcher does not read."""


@dataclass(frozen=True)
class Victim:
    """Where it hurts.

    Args:
        daemon: running.
        job: id of a job that is running or waiting in it.
        rng: draws whatever there is to draw.
        orders: what the daemon's ``ESPERD_CHAOS`` names; faults inside of its processes need it.
    """

    daemon: DaemonProcess
    job: str
    rng: random.Random
    orders: Orders | None = None


class PromiseBroken(Exception):
    """A fault did not only interrupt: somebody was told what is wrong."""


def kill_daemon(victim: Victim) -> None:
    """SIGKILL to the daemon; somebody starts it again."""
    victim.daemon.kill()
    victim.daemon.start()


def restart_daemon(victim: Victim) -> None:
    """SIGTERM to the daemon in the middle of work; somebody starts it again."""
    victim.daemon.terminate()
    victim.daemon.wait()
    victim.daemon.start()


def stop_daemon(victim: Victim) -> None:
    """The daemon's process stands still for a while, as under a debugger or on a machine that swaps."""
    os.kill(victim.daemon.pid, signal.SIGSTOP)
    time.sleep(HOLD_S)
    os.kill(victim.daemon.pid, signal.SIGCONT)


def kill_trainer(victim: Victim) -> None:
    """SIGKILL to the job's worker."""
    _signal(victim, "trainer/", signal.SIGKILL)


def kill_compiler(victim: Victim) -> None:
    """SIGKILL to the compiler."""
    _signal(victim, "compiler", signal.SIGKILL)


def hang_trainer(victim: Victim) -> None:
    """The job's worker stops for good: only heartbeats can tell."""
    _signal(victim, "trainer/", signal.SIGSTOP)


def hang_compiler(victim: Victim) -> None:
    """The compiler stops for good."""
    _signal(victim, "compiler", signal.SIGSTOP)


def corrupt_checkpoint(victim: Victim) -> None:
    """One bit of the job's newest checkpoint turns, then its worker dies, so that the checkpoint is needed."""
    folder = victim.daemon.state_directory / "checkpoints" / victim.job
    files = [file for file in folder.rglob("*") if file.is_file() and len(file.name) == 64]
    if files:
        with contextlib.suppress(FileNotFoundError):  # a newer one took its place just now
            turn_a_bit(max(files, key=lambda file: file.stat().st_mtime), victim.rng)
    kill_trainer(victim)


def turn_a_bit(file: os.PathLike[str], rng: random.Random) -> None:
    """Change one bit of a file in place."""
    with open(file, "r+b") as handle:  # noqa: PTH123 - a PathLike
        size = handle.seek(0, os.SEEK_END)
        place = rng.randrange(size)
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << rng.randrange(8)]))


def shout_garbage(victim: Victim) -> None:
    """Frames that are no messages, at every socket."""
    for name in ("control", "workers", "events"):
        with contextlib.closing(zmq.Context.instance().socket(zmq.DEALER)) as socket:
            socket.linger = 200
            socket.connect(f"ipc://{victim.daemon.runtime_directory / name}.sock")
            for _ in range(20):
                frames = [victim.rng.randbytes(victim.rng.choice((0, 1, 7, 60, 4_000))) for _ in range(victim.rng.randint(1, 5))]
                socket.send_multipart(frames)


def watch_without_reading(victim: Victim) -> None:
    """A watcher subscribes to everything and reads nothing."""
    with contextlib.closing(zmq.Context.instance().socket(zmq.SUB)) as socket:
        socket.linger = 0
        socket.rcvhwm = 1
        socket.subscribe(b"")
        socket.connect(f"ipc://{victim.daemon.runtime_directory / 'events'}.sock")
        time.sleep(HOLD_S)


def set_clock_forward(victim: Victim) -> None:
    """The wall clock of every process jumps ahead, by minutes or years; then a worker is lost and must be replaced."""
    _jump(victim, 1.0)


def set_clock_back(victim: Victim) -> None:
    """The wall clock of every process jumps back; then a worker is lost and must be replaced."""
    _jump(victim, -1.0)


def block_loop(victim: Victim) -> None:
    """The daemon's event loop stands still for longer than a worker may be silent, while its sockets go on taking in."""
    orders, seconds = _orders(victim), victim.rng.uniform(1.0, 6.0)
    orders.block(seconds)
    give_up_at = time.monotonic() + SLOW_S
    while orders.blocks and time.monotonic() < give_up_at:  # it is heard once a job has begun
        time.sleep(0.05)
    time.sleep(seconds / 2)


def say_what_a_stale_worker_says(victim: Victim) -> None:
    """Whoever held the job's lease before, or an earlier incarnation of who holds it, says that the job has ended."""
    for pid in _pids(victim, "trainer/"):
        try:
            environment = dict(
                variable.partition("=")[::2]
                for variable in Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
                if "=" in variable
            )
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        holder = Incarnation.from_environment(environment)
        job, _, lease = holder.actor.removeprefix("trainer/").rpartition(".")
        earlier = {**environment, "ESPERD_ACTOR": f"trainer/{job}.{int(lease) - 1}"}
        older = {**environment, GENERATION: str(holder.generation - 1)}
        another_run = {**environment, TOKEN: "0" * len(holder.token)}
        for claimed in (earlier, older, another_run):
            _claim_the_end(Incarnation.from_environment(claimed), job, int(lease))


def read_slowly(victim: Victim) -> None:
    """A watcher of the job that takes its time over every event; it must see all of them, in order, and hold nobody up."""
    seen: list[int] = []
    failures: list[str] = []

    def watch() -> None:
        try:
            with victim.daemon.sync_client() as esper:
                for event in esper.job(victim.job).watch():
                    seen.append(event.sequence)
                    time.sleep(0.05)
                    if len(seen) >= SLOWLY_READ:
                        return
        except EsperError as error:
            failures.append(f"{error.code}: {error}")

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    watching.join(SLOW_S)
    if failures or seen != list(range(1, len(seen) + 1)) or not seen:
        raise PromiseBroken(f"a slow watcher saw events {seen[:5]} to {seen[-5:]}: {failures}")


SLOWLY_READ = 60
"""Events after which a slow watcher has seen enough."""
SLOW_S = 30.0
"""How long it may take over them."""
JUMPS_S = (60.0, 3_600.0, 86_400.0, 3.0e8)
"""Of the wall clock: a minute, an hour, a day, ten years."""
FARTHEST_S = 1.2e9
"""From the truth; beyond it the clock would stand before 1970 one day."""


def _jump(victim: Victim, sign: float) -> None:
    orders = _orders(victim)
    off_s = orders.clock() + sign * victim.rng.choice(JUMPS_S)
    orders.set_clock(min(max(off_s, -FARTHEST_S), FARTHEST_S))
    kill_trainer(victim)


def _orders(victim: Victim) -> Orders:
    if victim.orders is None:
        raise ValueError("this fault needs a daemon whose ESPERD_CHAOS names a folder for orders")
    return victim.orders


def _claim_the_end(who: Incarnation, job: str, lease: int) -> None:
    codec = Codec()
    words = (
        Ready(actor=who.actor, generation=who.generation, pid=os.getpid(), protocol=codec.protocol, version="0"),
        JobSucceeded(job_id=job, generation=lease - 1, epoch=1, artifacts=()),
        JobStopped(job_id=job, generation=lease - 1, why="cancel"),
    )
    with contextlib.closing(zmq.Context.instance().socket(zmq.DEALER)) as socket:
        socket.linger = 200
        socket.setsockopt(zmq.IDENTITY, who.identity)
        socket.connect(who.hub)
        for number, message in enumerate(words, 1):
            to = "supervisor" if isinstance(message, Ready) else "jobs"
            socket.send_multipart(codec.encode(codec.head(Kind.ASK, number, to=to, sender=who.actor), message))
        socket.poll(500)


def _signal(victim: Victim, actor: str, number: signal.Signals) -> None:
    for pid in _pids(victim, actor):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(pid, number)


def _pids(victim: Victim, actor: str) -> list[int]:
    with victim.daemon.sync_client() as esper:
        return [status.pid for status in esper.actors().actors if status.name.startswith(actor) and status.pid is not None]


FAULTS: dict[str, Callable[[Victim], None]] = {
    made.__name__: made
    for made in (
        kill_daemon,
        restart_daemon,
        stop_daemon,
        kill_trainer,
        kill_compiler,
        hang_trainer,
        hang_compiler,
        corrupt_checkpoint,
        shout_garbage,
        watch_without_reading,
    )
}
"""What happens to a process, or at a socket."""
STRANGE: dict[str, Callable[[Victim], None]] = {
    made.__name__: made for made in (set_clock_forward, set_clock_back, block_loop, say_what_a_stale_worker_says, read_slowly)
}
"""Rarer things; some of them need :attr:`Victim.orders`."""
