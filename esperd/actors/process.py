"""A worker process: its own session, its output relayed and the end of it remembered, ended as a whole group."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from typing import TYPE_CHECKING

import anyio
import anyio.abc
import anyio.lowlevel
import structlog

from esperd.errors import WorkerFailed

if TYPE_CHECKING:
    from esperd.actors.incarnation import Incarnation
    from esperd.actors.spec import ProcessSpec

TAIL_BYTES = 8 * 1024
"""Output kept for the error message of a worker that dies."""
PIPE_BYTES = 1024 * 1024
"""Room for what a worker prints after its daemon was killed, while it writes its last checkpoint."""
READ_BYTES = 64 * 1024
READS = 2 * PIPE_BYTES // READ_BYTES
"""Reads before the event loop gets its turn: more than a full pipe, less than a worker that prints without end."""
STDERR = 2

log = structlog.get_logger(__name__)


class WorkerProcess:
    """A spawned process. Made by :func:`spawn`; end it with :meth:`kill`, then :meth:`wait` and :meth:`close`."""

    def __init__(self, name: str, command: list[str], process: anyio.abc.Process, output: int) -> None:
        self.name = name
        self.command = command
        self._process = process
        self._output = output
        self._tail = b""
        self._relays = True

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.returncode

    def tail(self) -> str:
        """The end of what it wrote to stdout and stderr."""
        return self._tail.decode(errors="replace").strip()

    async def wait(self) -> int:
        """Exit status, as soon as there is one."""
        status: int = await self._process.wait()
        self._read_available()
        return status

    async def relay_output(self) -> None:
        """Copy what it prints to our stderr until it is gone, and with it the last writing end."""
        open_end = True
        while open_end:
            await anyio.wait_readable(self._output)
            open_end = self._read_available()
            # An end that stays readable would starve its own cancellation: a wait that is over at once is never cancelled.
            await anyio.lowlevel.checkpoint()

    def terminate(self) -> None:
        """Ask its whole group to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its whole group now."""
        self._signal(signal.SIGKILL)

    async def close(self) -> None:
        """Release what its end leaves behind. Only after :meth:`wait`."""
        await self._process.aclose()
        os.close(self._output)

    def failure(self, why: str) -> WorkerFailed:
        """The error that tells what became of it."""
        tail = self.tail()
        output = f"; its output ended with:\n{tail}" if tail else "; it printed nothing"
        return WorkerFailed(
            f"{self.name} (pid {self.pid}, {' '.join(self.command)}) {why}{output}",
            actor=self.name,
            pid=self.pid,
            command=self.command,
            status=self.status,
            output=tail,
        )

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # the group is gone: what was wanted
            os.killpg(self.pid, number)

    def _read_available(self) -> bool:
        """Take in what is there; False at the end of the pipe, which stays readable for ever."""
        try:
            for _ in range(READS):
                chunk = os.read(self._output, READ_BYTES)
                if not chunk:
                    return False
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                self._relay(chunk)
        except BlockingIOError:
            return True
        return True

    def _relay(self, chunk: bytes) -> None:
        if not self._relays:
            return
        try:
            os.write(STDERR, chunk)
        except OSError as error:
            self._relays = False
            log.warning("cannot relay a worker's output any more", actor=self.name, error=str(error))


async def spawn(spec: ProcessSpec, incarnation: Incarnation) -> WorkerProcess:
    """Start a process actor.

    The child holds the reading end of its output pipe, too: printing does not kill it after its daemon died, so that it
    can write its last checkpoint.

    Raises:
        WorkerFailed: when the command cannot be started.
    """
    command = list(spec.command)
    try:
        reading, writing = os.pipe()
    except OSError as error:  # no descriptor is left
        raise _not_started(spec, command, error) from error
    try:
        with contextlib.suppress(OSError):  # beyond the user's pipe quota: the default size serves as well, for shorter
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(reading, False)
        process = await anyio.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            cwd=spec.working_directory,
            env={**os.environ, **spec.environment, **incarnation.to_environment()},
            start_new_session=True,
            pass_fds=(reading, *(incarnation.shared or ())),
        )
    except OSError as error:
        os.close(reading)
        raise _not_started(spec, command, error) from error
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    worker = WorkerProcess(spec.name, command, process, reading)
    if spec.nice:
        # Gone already: wait() will say how. Refused: it inherited a higher niceness, and may not lower it, nor need it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpriority(os.PRIO_PGRP, worker.pid, spec.nice)
    return worker


def _not_started(spec: ProcessSpec, command: list[str], error: OSError) -> WorkerFailed:
    return WorkerFailed(
        f"{spec.name} could not be started: {' '.join(command)}: {error.strerror or error}", actor=spec.name, command=command
    )


def describe_status(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
