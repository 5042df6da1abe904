"""One daemon for each state directory: a file lock that names its owner, and directories only the owner can read."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from esperd.errors import StateDirectoryLocked, StateDirectoryUnusable

LOCK_FILE = "daemon.lock"


def prepare_directory(path: Path) -> None:
    """Create a directory with mode 0700, or check that it can be written.

    Raises:
        StateDirectoryUnusable: it cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StateDirectoryUnusable(
            f"{path} cannot be written: {error.strerror}; choose another with daemon.state_directory or --state-dir",
            path=str(path),
        ) from error


@contextlib.contextmanager
def locked(state_directory: Path) -> Iterator[None]:
    """Hold the state directory. Taken before any socket is bound: a second bind to a live ipc path would steal it.

    Raises:
        StateDirectoryLocked: a live daemon holds it; names its process id.
    """
    path = state_directory / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StateDirectoryLocked(
                f"{state_directory} belongs to a running daemon, process {owner}; stop it, or choose another --state-dir",
                path=str(state_directory),
                pid=owner,
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
