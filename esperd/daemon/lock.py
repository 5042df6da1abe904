"""One daemon for each state and runtime directory: file locks that name their owner, in directories nobody else can write."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from esperd.errors import StateDirectoryLocked, StateDirectoryUnusable, StoreFailed
from esperd.store.refusal import refusal_of

LOCK_FILE = "daemon.lock"
RUNTIME_LOCK_FILE = "runtime.lock"
"""Named apart, so that one directory can be both."""

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def prepare_state_directory(path: Path) -> None:
    """Create the directory for databases and blobs with mode 0700, or check that it can be written and is ours.

    Raises:
        StateDirectoryUnusable: it cannot be created or written, or belongs to somebody else.
        StoreFailed: the disk refuses: there is no room on it, or it fails.
    """
    option = "daemon.state_directory or --state-dir"
    _require_ours(path, _writable(path, option), option)


def prepare_runtime_directory(path: Path) -> None:
    """Create the directory for sockets with mode 0700, or check that nobody else can put sockets into it. One that was there
    is never changed: it may serve others as well.

    Raises:
        StateDirectoryUnusable: it cannot be created or written, belongs to somebody else, or others may write it.
        StoreFailed: the disk refuses: there is no room on it, or it fails.
    """
    option = "daemon.runtime_directory"
    found = _writable(path, option)
    _require_ours(path, found, option)
    if found.st_mode & OTHERS_MAY_WRITE:
        raise StateDirectoryUnusable(
            f"others may write {path} (mode {stat.S_IMODE(found.st_mode):04o}), so they could take the place of the daemon's "
            f"sockets; choose a directory of your own with {option}, or run `chmod go-w {path}`",
            path=str(path),
        )


def _writable(path: Path, option: str) -> os.stat_result:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        return path.stat()
    except OSError as error:
        raise _unusable(path, error, option) from error


def _require_ours(path: Path, found: os.stat_result, option: str) -> None:
    if found.st_uid != os.geteuid():
        raise StateDirectoryUnusable(
            f"{path} belongs to user {found.st_uid}, and this daemon runs as user {os.geteuid()}; choose a directory of your own "
            f"with {option}",
            path=str(path),
        )


def _unusable(path: Path, error: OSError, option: str) -> StateDirectoryUnusable | StoreFailed:
    if refusal_of(error) is not None:
        # No mistake in a configuration: it may pass, and a service manager is to try again.
        sandbox = ", let the service write it (ReadWritePaths=)" if error.errno == errno.EROFS else ""
        return StoreFailed(
            f"{path} cannot be written, the disk refuses: {error.strerror}; free or mend it{sandbox}, or choose another with"
            f" {option}",
            path=str(path),
            errno=errno.errorcode.get(error.errno or 0, "unknown"),
        )
    return StateDirectoryUnusable(f"{path} cannot be written: {error.strerror}; choose another with {option}", path=str(path))


@contextlib.contextmanager
def locked(state_directory: Path, runtime_directory: Path) -> Iterator[None]:
    """Hold both directories. Taken before any socket is bound: a second bind to a live ipc path would steal it.

    Raises:
        StateDirectoryLocked: a live daemon holds one of them; names its process id.
        StateDirectoryUnusable: a lock file cannot be opened.
        StoreFailed: the disk refuses one.
    """
    with (
        _held(state_directory, LOCK_FILE, "daemon.state_directory or --state-dir"),
        _held(runtime_directory, RUNTIME_LOCK_FILE, "daemon.runtime_directory"),
    ):
        yield


@contextlib.contextmanager
def state_locked(state_directory: Path) -> Iterator[None]:
    """Hold a state directory alone, for work on it that no daemon may see.

    Raises:
        StateDirectoryLocked: a live daemon holds it; names its process id.
        StateDirectoryUnusable: the lock file cannot be opened.
        StoreFailed: the disk refuses it.
    """
    with _held(state_directory, LOCK_FILE, "--state-dir"):
        yield


@contextlib.contextmanager
def _held(directory: Path, name: str, option: str) -> Iterator[None]:
    try:
        descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _unusable(directory / name, error, option) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StateDirectoryLocked(
                f"{directory} belongs to a running daemon, process {owner}; stop it, or choose another with {option}",
                path=str(directory),
                pid=owner,
            ) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise _unusable(directory / name, error, option) from error
        yield
    finally:
        os.close(descriptor)
