"""A backup of a state directory that may be in use: a directory with every database, every blob, and a manifest written last.

Rows refer to files, and files are there before their rows, so databases are copied first and files after them. A checkpoint is
deleted once newer ones are recorded, so the jobs' database is copied again until every checkpoint it names was caught.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

import esperd
from esperd.daemon import references
from esperd.daemon.directories import blob_directory, checkpoint_directory
from esperd.daemon.references import Reference
from esperd.daemon.state import DATABASES, database_path
from esperd.errors import Conflict, NothingToShow, StoreFailed
from esperd.store import inspection
from esperd.store.blobs import Blobs
from esperd.store.filesystem import Filesystem, RealFilesystem

MANIFEST = "manifest.json"
FORMAT = 2
FORMATS_READ = frozenset({1, 2})
"""The first knew no keys of the network."""
KEYS = "keys"
"""Directory of the network's keys in a state directory."""
SEAL = "seal.key"
TRIES = 10
"""Copies of the jobs' database until no checkpoint it names was replaced meanwhile; chosen, not measured."""

Progress = Callable[[str, int, int], None]
"""What is being done, how many bytes of it are done, and of how many."""


class BackupFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a backup."""

    path: str
    """Relative to the backup, as in the state directory."""
    sha256: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds. A directory without one is no backup: it was cut short."""

    format: int
    esperd: str
    created_at: str
    """UTC, ISO 8601."""
    versions: dict[str, int]
    """Migrations that each database has seen."""
    files: tuple[BackupFile, ...]
    missing: tuple[str, ...] = ()
    """Files that rows refer to and that the state directory lacked, all that were damaged in it or could not be read, and
    directories that could not be listed.
    """
    keys: tuple[str, ...] | None = None
    """Those of ``files`` that are keys of the network; None: they were not asked for, and are not in it."""


def back_up(
    state: Path,
    target: Path,
    progress: Progress,
    *,
    copy: bool = False,
    with_keys: bool = False,
    filesystem: Filesystem | None = None,
) -> Manifest:
    """Write a backup.

    Args:
        state: the state directory, in use or not.
        target: made; must not exist, or be empty.
        progress: told how far it is.
        copy: copy blobs even where a second name for the same file would do (same file system).
        with_keys: also the daemon's own secret key, and who is allowed: whoever reads the backup can then pass for the daemon.
        filesystem: the disk; tests pass one that fails.

    Raises:
        Conflict: when ``target`` holds something.
        NothingToShow: when there is no state.
        StoreFailed: when a database or the disk refuses; no manifest is written then.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Conflict(f"{target} is there already; name a directory that is not", path=str(target))
    present = [database for database in DATABASES if database_path(state, database.name).exists()]
    if not present:
        raise NothingToShow(f"{state} holds no state of esperd; name another with --state-dir", path=str(state))
    try:
        return _Backup(state, target, progress, copy=copy, filesystem=filesystem or RealFilesystem()).write(
            [database.name for database in present], with_keys=with_keys
        )
    except OSError as error:
        raise StoreFailed(f"the backup {target} could not be written: {error}", path=str(target)) from error


class _Unread(Exception):
    """The disk of the state directory does not hand out a file."""


class _Backup:
    def __init__(self, state: Path, target: Path, progress: Progress, *, copy: bool, filesystem: Filesystem) -> None:
        self._state = state
        self._target = target
        self._progress = progress
        self._copy = copy
        self._filesystem = filesystem
        self._files: dict[str, BackupFile] = {}
        self._damaged: list[str] = []

    def write(self, databases: list[str], *, with_keys: bool) -> Manifest:
        self._filesystem.make_directory(self._target, 0o700)
        missing = self._jobs_with_checkpoints() if "jobs" in databases else []
        for name in databases:
            if name != "jobs":
                self._database(name)
        self._blobs(blob_directory(self._state))
        missing += [wanted for wanted in self._wanted_blobs(databases) if wanted not in self._files]
        if (self._state / SEAL).exists():
            self._written(SEAL, (self._state / SEAL).read_bytes())
        keys = self._keys() if with_keys else None
        manifest = Manifest(
            format=FORMAT,
            esperd=esperd.__version__,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={name: self._version(name) for name in databases},
            files=tuple(self._files[path] for path in sorted(self._files)),
            missing=tuple(sorted({*missing, *self._damaged})),
            keys=keys,
        )
        self._finish(msgspec.json.format(msgspec.json.encode(manifest)))
        return manifest

    def _jobs_with_checkpoints(self) -> list[str]:
        """Copy jobs and checkpoints; returns those that are named and were nowhere."""
        missing: list[str] = []
        for _ in range(TRIES):
            self._checkpoints()
            self._database("jobs")
            self._checkpoints()
            with inspection.reading(self._target / "jobs.db") as connection:
                named = references.of_rows(connection.execute(references.CHECKPOINTS))
            missing = [path for path in map(_checkpoint_path, named) if path not in self._files]
            if not missing:
                break
        return missing

    def _database(self, name: str) -> None:
        path = database_path(self._target, name)
        if path.exists():
            self._filesystem.unlink(path)
        inspection.copy_database(
            database_path(self._state, name), path, lambda done, total: self._progress(f"{name}.db", done, total)
        )
        path.chmod(0o600)
        self._sync(path)
        self._files[path.name] = self._described(path.name)

    def _checkpoints(self) -> None:
        directory = checkpoint_directory(self._state)
        try:
            jobs = self._filesystem.names(directory)
        except OSError:  # named in the manifest, and what rows name of it too
            self._damaged.append(str(directory.relative_to(self._state)))
            return
        for job in sorted(jobs):
            self._blobs(directory / job)

    def _blobs(self, directory: Path) -> None:
        """Take every blob of a directory that is not taken yet, where it can be listed."""
        blobs = Blobs(directory, self._filesystem)
        unlisted: list[StoreFailed] = []
        names = sorted(blobs.names(unlisted.append))
        self._damaged += [str(Path(str(error.fields["path"])).relative_to(self._state)) for error in unlisted]
        for number, sha256 in enumerate(names):
            source = blobs.path(sha256)
            relative = str(source.relative_to(self._state))
            if relative not in self._files and relative not in self._damaged:
                self._blob(source, relative, sha256)
            self._progress(str(directory.relative_to(self._state)), number + 1, len(names))

    def _blob(self, source: Path, relative: str, sha256: str) -> None:
        target = self._target / relative
        self._filesystem.make_directory(target.parent, 0o700)
        try:
            if self._copy or not self._linked(source, target):
                pieces = self._of_state(source)
                first = next(pieces, b"")  # before anything is made: the source may be gone
                write_file(self._filesystem, target, itertools.chain([first], pieces))
            described = self._described(relative, self._of_state(target))
        except FileNotFoundError:  # a checkpoint that was replaced meanwhile
            return
        except _Unread:
            described = None
        if described is not None and described.sha256 == sha256:
            self._files[relative] = described
            return
        if self._filesystem.exists(target):
            self._filesystem.unlink(target)
        self._damaged.append(relative)

    def _of_state(self, path: Path) -> Iterator[bytes]:
        """A file of the state directory: a backup of a disk that fails takes what can still be read.

        Raises:
            _Unread: when the disk does not hand it out.
        """
        try:
            yield from self._filesystem.pieces(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _Unread from error

    def _keys(self) -> tuple[str, ...]:
        """Copy the keys of the network, never under a second name: a file is theirs alone. Returns their paths."""
        taken = []
        for source in sorted((self._state / KEYS).rglob("*")):
            relative = str(source.relative_to(self._state))
            if source.is_symlink() or not source.is_file() or source.name.startswith("."):  # one that is being written
                continue
            self._filesystem.make_directory((self._target / relative).parent, 0o700)
            try:
                self._written(relative, self._filesystem.read(source))
            except FileNotFoundError:  # revoked meanwhile
                continue
            taken.append(relative)
        return tuple(taken)

    def _linked(self, source: Path, target: Path) -> bool:
        """Give the file a second name; False where that is not possible, as between two file systems."""
        try:
            self._filesystem.link(source, target)
        except FileNotFoundError:
            raise
        except OSError:
            return False
        return True

    def _wanted_blobs(self, databases: list[str]) -> list[str]:
        named: list[Reference] = []
        if "jobs" in databases:
            with inspection.reading(self._target / "jobs.db") as connection:
                named += references.of_rows(connection.execute(references.ARTIFACTS))
        if "kernels" in databases:
            with inspection.reading(self._target / "kernels.db") as connection:
                named += references.of_kernels(connection.execute(references.KERNELS))
        blobs = Blobs(blob_directory(self._state), self._filesystem)
        return [str(blobs.path(reference.sha256).relative_to(self._state)) for reference in named]

    def _version(self, name: str) -> int:
        with inspection.reading(database_path(self._target, name)) as connection:
            return inspection.version(connection)

    def _written(self, relative: str, data: bytes) -> None:
        write_file(self._filesystem, self._target / relative, [data])
        self._files[relative] = self._described(relative)

    def _described(self, relative: str, pieces: Iterable[bytes] | None = None) -> BackupFile:
        """A file of the backup as it was written. Read piece by piece: a log of events may be larger than the memory."""
        sha256, size_bytes = hash_of(pieces or self._filesystem.pieces(self._target / relative))
        return BackupFile(path=relative, sha256=sha256, size_bytes=size_bytes)

    def _sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._filesystem.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _finish(self, manifest: bytes) -> None:
        """Bring every name to the disk, then the manifest that vouches for them."""
        for directory in sorted({(self._target / path).parent for path in self._files}):
            self._filesystem.fsync_directory(directory)
        partial = self._target / f".{MANIFEST}"
        write_file(self._filesystem, partial, [manifest])
        self._filesystem.rename(partial, self._target / MANIFEST)
        self._filesystem.fsync_directory(self._target)


def read_manifest(backup: Path) -> Manifest:
    """What a backup holds.

    Raises:
        StoreFailed: when the directory is no backup, or of another format.
    """
    try:
        manifest = msgspec.json.decode((backup / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError as error:
        raise StoreFailed(f"{backup} is no backup: it has no {MANIFEST}, so it was cut short or never begun") from error
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"{backup / MANIFEST} cannot be read: {error}", path=str(backup)) from error
    if manifest.format not in FORMATS_READ:
        read = ", ".join(map(str, sorted(FORMATS_READ)))
        raise StoreFailed(f"{backup} has format {manifest.format}; this esperd reads {read}", path=str(backup))
    return manifest


def write_file(filesystem: Filesystem, path: Path, pieces: Iterable[bytes]) -> None:
    """Write a new file and bring its bytes to the disk.

    Raises:
        OSError: when the disk refuses.
    """
    descriptor = filesystem.create(path, 0o600)
    try:
        for piece in pieces:
            filesystem.write(descriptor, piece)
        filesystem.fsync(descriptor)
    finally:
        filesystem.close(descriptor)


def hash_of(pieces: Iterable[bytes]) -> tuple[str, int]:
    """SHA-256 in hexadecimal, and how many bytes there were."""
    digest, size_bytes = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        size_bytes += len(piece)
    return digest.hexdigest(), size_bytes


def _checkpoint_path(reference: Reference) -> str:
    return str(Blobs(checkpoint_directory(Path()) / reference.owner).path(reference.sha256))
