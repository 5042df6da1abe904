"""A daemon of a command's own: started as a process, waited for, stopped with SIGTERM when the command ends."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.abc

from esperd.client import Client
from esperd.config import endpoint
from esperd.errors import AskTimeout, ConfigError, DaemonUnreachable, EsperError, WorkerFailed, error_from_code

START_TIMEOUT_S = 60.0
"""Chosen, not measured: importing everything from a cold disk is slow."""
STOP_TIMEOUT_S = 45.0
"""Longer than the daemon's own drain timeout."""
RETRY_S = 0.05
LOG_FILE = "daemon.log"


@contextlib.asynccontextmanager
async def own_daemon(state_directory: Path) -> AsyncIterator[Client]:
    """Run a daemon on this state directory as long as the block lasts, with a client of it.

    It takes any free HTTP port and logs to ``daemon.log`` in the state directory. It runs in a session of its own, so that
    Ctrl-C reaches this program only, which then stops it in order.

    Raises:
        StateDirectoryLocked: when another daemon owns the state directory.
        EsperError: whatever else the daemon ended with.
        WorkerFailed: when it ended without a word, or does not answer in time.
    """
    state_directory = Path(await anyio.Path(state_directory).absolute())
    await anyio.Path(state_directory).mkdir(parents=True, exist_ok=True)
    log_file = state_directory / LOG_FILE
    with contextlib.ExitStack() as directories:
        runtime_directory = _runtime_directory(state_directory, directories)
        environment = {
            **os.environ,
            "ESPERD__HTTP__PORT": "0",
            "ESPERD__DAEMON__RUNTIME_DIRECTORY": json.dumps(str(runtime_directory)),
        }
        command = [sys.executable, "-m", "esperd.cli.daemon", "run", "--json", "--state-dir", str(state_directory)]
        with log_file.open("wb") as log:
            process = await anyio.open_process(
                command, stdin=None, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        try:
            client = await _connect(process, endpoint(runtime_directory, "control"), log_file)
            try:
                yield client
            finally:
                with anyio.CancelScope(shield=True):
                    await client.__aexit__(None, None, None)
        finally:
            await _stop(process)


def _runtime_directory(state_directory: Path, directories: contextlib.ExitStack) -> Path:
    """``run`` under the state directory, or a temporary one where that is too long for a socket."""
    wanted = state_directory / "run"
    try:
        endpoint(wanted, "control")
    except ConfigError:
        return Path(directories.enter_context(tempfile.TemporaryDirectory(prefix="esperd-")))
    return wanted


async def _connect(process: anyio.abc.Process, control: str, log_file: Path) -> Client:
    """A client of this very process: on a locked state directory another daemon may answer."""
    with anyio.move_on_after(START_TIMEOUT_S):
        while process.returncode is None:
            client = Client(control)
            try:
                await client.__aenter__()
            except (DaemonUnreachable, AskTimeout):
                await anyio.sleep(RETRY_S)
                continue
            if client.daemon.pid == process.pid:
                return client
            await client.__aexit__(None, None, None)
            await anyio.sleep(RETRY_S)
        raise daemon_failure(process.returncode, log_file)
    raise WorkerFailed(f"the daemon did not answer within {START_TIMEOUT_S:g} s; its log is {log_file}", log=str(log_file))


def daemon_failure(exit_status: int, log_file: Path) -> EsperError:
    """What the daemon said before it ended: its typed error where there is one."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    with contextlib.suppress(ValueError, IndexError, KeyError, TypeError):
        error = json.loads(lines[-1])["error"]
        return error_from_code(error["code"], error["message"], error["fields"])
    tail = "\n".join(lines[-20:])
    return WorkerFailed(
        f"the daemon ended with exit status {exit_status}; its log is {log_file}"
        + (f", which ends with:\n{tail}" if tail else ""),
        log=str(log_file),
        exit_status=exit_status,
    )


async def _stop(process: anyio.abc.Process) -> None:
    """SIGTERM, then wait; kill what does not end. Not disturbed by a cancellation of the command."""
    with anyio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
        with anyio.move_on_after(STOP_TIMEOUT_S) as waiting:
            await process.wait()
        if waiting.cancelled_caught:
            process.kill()
            await process.wait()
