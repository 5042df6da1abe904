"""What a machine does to a daemon on a bad day, done from outside to a daemon of :func:`esperd.testing.running_daemon`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from esperd.testing import DaemonProcess

HOLD_S = 1.5
"""How long a process is stopped, or a watcher does not read."""


@dataclass(frozen=True)
class Victim:
    """Where it hurts.

    Args:
        daemon: running.
        job: id of a job that is running or waiting in it.
        rng: draws whatever there is to draw.
    """

    daemon: DaemonProcess
    job: str
    rng: random.Random


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


def _signal(victim: Victim, actor: str, number: signal.Signals) -> None:
    with victim.daemon.sync_client() as esper:
        found = [status.pid for status in esper.actors().actors if status.name.startswith(actor) and status.pid is not None]
    for pid in found:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(pid, number)


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
