"""What plugin authors and our own tests use: a real daemon for the length of a block, and time that moves when told to."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import anyio
import anyio.lowlevel
import msgspec

from esperd.actors.sockets import require_listener
from esperd.cli.own_daemon import daemon_failure
from esperd.cli.settings import as_toml
from esperd.client import Client, JobHandle
from esperd.config import Config, endpoint
from esperd.errors import DaemonUnreachable, NothingToShow, WorkerFailed
from esperd.messages.telemetry import Event, EventBody
from esperd.sync_client import SyncClient

START_TIMEOUT_S = 60.0
"""From spawn to the first answer; chosen, not measured."""
DRAIN_S = 5.0
"""At the end of the block, how long jobs that still run may checkpoint before the daemon is told to stop at once."""
STOP_TIMEOUT_S = 15.0
"""How long it may then take before it is killed; chosen, not measured."""
RETRY_S = 0.02
PROC = Path("/proc")


class ProcessId(NamedTuple):
    """A process, told apart from a later one with the same number."""

    pid: int
    started_at: int
    """In clock ticks since the machine started."""

    @property
    def is_alive(self) -> bool:
        """Whether it runs; a zombie that nobody has waited for yet does not."""
        found = _status(self.pid)
        return found is not None and found.identity == self and found.state != "Z"


def process_id(pid: int) -> ProcessId:
    """The process that has this number now.

    Raises:
        ProcessLookupError: when there is none.
    """
    found = _status(pid)
    if found is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return found.identity


def children_of(pid: int) -> tuple[ProcessId, ...]:
    """Processes whose parent is ``pid``; zombies, which ended and were not waited for, included."""
    found = (_status(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return tuple(status.identity for status in found if status is not None and status.parent == pid)


class DaemonProcess:
    """A real daemon as a process of its own; see :func:`running_daemon`.

    Args:
        state_directory: its state; made when it does not exist. A second daemon on the same one goes on where this ended.
        config: its configuration. State and runtime directory are set here, and the HTTP port is any free one.
        environment: variables set in addition to this process's.
        python: interpreter it runs under; None: this process's own.
    """

    def __init__(
        self,
        state_directory: Path,
        config: Config | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        self.state_directory = state_directory.absolute()
        # Not under the state directory: that may be too long for a socket's path.
        self.runtime_directory = Path(tempfile.mkdtemp(prefix="esperd-"))
        self.endpoint = endpoint(self.runtime_directory, "control")
        self.log_file = self.runtime_directory / "daemon.log"
        self._config = self._complete(config or Config())
        self._environment = {**os.environ, **(environment or {})}
        self._python = str(python or sys.executable)
        self._process: subprocess.Popen[bytes] | None = None
        self._orphans: set[ProcessId] = set()

    def _complete(self, config: Config) -> Config:
        daemon = msgspec.structs.replace(
            config.daemon, state_directory=str(self.state_directory), runtime_directory=str(self.runtime_directory)
        )
        return msgspec.structs.replace(config, daemon=daemon, http=msgspec.structs.replace(config.http, port=0))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The daemon's process, running or ended.

        Raises:
            RuntimeError: when it was never started.
        """
        if self._process is None:
            raise RuntimeError("the daemon was not started")
        return self._process

    @property
    def pid(self) -> int:
        """Of the daemon itself; its workers have their own, see ``client.actors()``."""
        return self.process.pid

    @property
    def http_url(self) -> str:
        """Where /livez, /readyz and /metrics are."""
        port = (self.runtime_directory / "http.port").read_text(encoding="ascii").strip()
        return f"http://{self._config.http.host}:{port}"

    def log(self) -> str:
        """Everything the daemon and its workers wrote so far, over all starts."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def client(self, timeout_s: float = 30.0) -> Client:
        """A client of this daemon: ``async with daemon.client() as esper``."""
        return Client(self.endpoint, timeout_s)

    def sync_client(self, timeout_s: float = 30.0) -> SyncClient:
        """A blocking client of this daemon: ``with daemon.sync_client() as esper``."""
        return SyncClient(self.endpoint, timeout_s)

    def start(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            EsperError: whatever the daemon ended with instead.
            WorkerFailed: when it ended without a word, or does not answer in time.
        """
        self.state_directory.mkdir(parents=True, exist_ok=True)
        file = self.runtime_directory / "esperd.toml"
        file.write_text(as_toml(self._config), encoding="utf-8")
        command = [self._python, "-m", "esperd.cli.daemon", "run", "--json", "--config", str(file)]
        with self.log_file.open("ab") as log:
            # A session of its own: Ctrl-C in a test run reaches the test, which then ends the daemon in order.
            self._process = subprocess.Popen(  # noqa: S603 - the interpreter the caller named, by default this one
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_until_it_answers(self) -> None:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up_at:
            if (status := self.process.poll()) is not None:
                raise daemon_failure(status, self.log_file)
            with contextlib.suppress(DaemonUnreachable):
                require_listener(self.endpoint)
                with self.sync_client() as esper:
                    if esper.daemon.pid == self.pid:
                        return
            time.sleep(RETRY_S)
        raise WorkerFailed(f"the daemon did not answer within {START_TIMEOUT_S:g} s:\n{self.log()}", log=self.log())

    def terminate(self) -> None:
        """Send SIGTERM: the first one drains, the second one stops at once."""
        self._remember_children()
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Wait for its end; returns the exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: when it still runs.
        """
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Send SIGKILL, as a power cut would, and wait for the end. Workers notice by themselves, or at :meth:`close`."""
        self._remember_children()
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End the daemon, in order where it can, and every process it started; remove its sockets. Safe to call twice."""
        if self._process is not None:
            self._end()
        for orphan in self._orphans:
            if orphan.is_alive:
                os.kill(orphan.pid, signal.SIGKILL)
        shutil.rmtree(self.runtime_directory, ignore_errors=True)

    def _end(self) -> None:
        for patience_s in (DRAIN_S, STOP_TIMEOUT_S):
            if self.process.poll() is not None:
                return
            self.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(patience_s)
        if self.process.poll() is None:
            self.kill()

    def _remember_children(self) -> None:
        if self.process.poll() is None:
            self._orphans.update(children_of(self.pid))


@contextlib.contextmanager
def running_daemon(
    state_directory: Path,
    config: Config | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> Iterator[DaemonProcess]:
    """A real daemon that runs as long as the block lasts, and leaves no process behind.

    ::

        with running_daemon(tmp_path / "state") as daemon:
            async with daemon.client() as esper:
                job = await esper.submit(...)

    Args:
        state_directory: see :class:`DaemonProcess`.
        config: see :class:`DaemonProcess`.
        environment: see :class:`DaemonProcess`.
        python: see :class:`DaemonProcess`.

    Raises:
        EsperError: whatever the daemon ended with before it answered.
    """
    daemon = DaemonProcess(state_directory, config, environment=environment, python=python)
    try:
        yield daemon.start()
    finally:
        daemon.close()


async def until(holds: Callable[[], Awaitable[bool]], timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for a state that nobody announces.

    Args:
        holds: asked again and again.
        timeout_s: how long; far more than it takes, since it only bounds a failure.

    Raises:
        TimeoutError: when it did not come about.
    """
    with anyio.fail_after(timeout_s):
        while not await holds():  # noqa: ASYNC110 - what other processes do sets no event of ours
            await anyio.sleep(RETRY_S)


async def first_event(
    job: JobHandle, kind: type[EventBody], where: Callable[[Event], bool] | None = None, *, after: int = 0
) -> Event:
    """Wait for an event of a job, logged or still to come.

    Args:
        job: whose.
        kind: class of the event's body.
        where: what must hold of the event; None: nothing more.
        after: skip events up to this sequence.

    Raises:
        NothingToShow: when the job ended without it.
    """
    async with contextlib.aclosing(job.watch(after)) as events:
        async for event in events:
            if isinstance(event.body, kind) and (where is None or where(event)):
                return event
    info = await job.info()
    raise NothingToShow(f"job {job.id} is {info.state} and no such {kind.__name__} came: {info.error}", job=job.id)


class _Status(NamedTuple):
    identity: ProcessId
    state: str
    parent: int


def _status(pid: int) -> _Status | None:
    """What ``/proc`` says of a process; None when there is none."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # a program's name may hold blanks and parentheses
    return _Status(ProcessId(pid, int(fields[19])), fields[0], int(fields[1]))


class FakeClock:
    """A clock that stands still until :meth:`advance`.

    Args:
        monotonic: first reading, in seconds.
        wall: first reading, in seconds since the epoch.
    """

    def __init__(self, monotonic: float = 0.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._sleepers: list[tuple[float, anyio.Event]] = []

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return self._monotonic

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self._wall

    async def sleep(self, seconds: float) -> None:
        """Return once the clock has been advanced by ``seconds``."""
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        sleeper = (self._monotonic + seconds, anyio.Event())
        self._sleepers.append(sleeper)
        try:
            await sleeper[1].wait()
        finally:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)

    def advance(self, seconds: float) -> None:
        """Move both readings forward and wake whoever has slept long enough, in the order of their waking."""
        self._monotonic += seconds
        self._wall += seconds
        due = sorted((sleeper for sleeper in self._sleepers if sleeper[0] <= self._monotonic), key=lambda item: item[0])
        for sleeper in due:
            self._sleepers.remove(sleeper)
            sleeper[1].set()

    @property
    def sleeping(self) -> int:
        """How many wait for time to pass."""
        return len(self._sleepers)
