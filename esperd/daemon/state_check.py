"""Everything about a state directory that can be verified: databases, blobs, and whether rows and files belong together."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from esperd.daemon import references
from esperd.daemon.backup import Progress
from esperd.daemon.directories import blob_directory, checkpoint_directory
from esperd.daemon.references import Reference
from esperd.daemon.state import DATABASES, QUARANTINE, RESTORING, StateDatabase, database_path
from esperd.errors import NothingToShow, StoreFailed
from esperd.store import inspection
from esperd.store.blobs import Blobs
from esperd.store.database import RACY_BEFORE
from esperd.store.filesystem import RealFilesystem

LOOKS_AGAIN = 2
"""Times that rows are read again when a file is missing; chosen, not measured."""


class DatabaseFound(msgspec.Struct, frozen=True, kw_only=True):
    """One database as it was found."""

    name: str
    version: int | None
    """Migrations it has seen; None when it cannot be read."""
    known: int
    """Migrations this esperd knows."""
    faults: tuple[str, ...]


class StateFound(msgspec.Struct, frozen=True, kw_only=True):
    """A state directory as it was found."""

    directory: str
    databases: tuple[DatabaseFound, ...]
    blobs: int
    """Files whose bytes were hashed."""
    damaged: tuple[str, ...]
    """Files whose bytes are not those of their name."""
    unreadable: tuple[str, ...] = ()
    """Files that the disk does not hand out and directories it does not list, and what it says."""
    dangling: tuple[str, ...]
    """Rows that refer to a file which is not there."""
    orphans: int
    """Files that no row refers to: what a running job has not reported yet, or garbage that will be collected."""
    quarantined: tuple[str, ...]
    """What was moved aside earlier because it was damaged."""
    notes: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        """Whether nothing acknowledged is damaged or lost. What was set aside earlier is no fault now."""
        return not (self.damaged or self.unreadable or self.dangling or any(database.faults for database in self.databases))


def check_state(state: Path, progress: Progress) -> StateFound:
    """Look at everything; changes nothing, and may run beside a daemon.

    Raises:
        NothingToShow: when there is no state.
    """
    if not any(database_path(state, database.name).exists() for database in DATABASES):
        raise NothingToShow(f"{state} holds no state of esperd; name another with --state-dir", path=str(state))
    named: list[tuple[Path, Reference]] = []
    databases = []
    for number, database in enumerate(DATABASES):
        databases.append(_database(state, database, named))
        progress("databases", number + 1, len(DATABASES))
    unreadable: list[str] = []
    stores = _stores(state, unreadable)
    damaged, seen = _hashed(stores, unreadable, progress)
    quarantined = _quarantined(state, stores, unreadable)
    referred = {Blobs(directory).path(reference.sha256) for directory, reference in named}
    return StateFound(
        directory=str(state),
        databases=tuple(databases),
        blobs=len(seen),
        damaged=tuple(str(path.relative_to(state)) for path in damaged),
        unreadable=tuple(dict.fromkeys(unreadable)),
        dangling=tuple(f"{reference.name} of {reference.owner}: {reference.sha256}" for _, reference in _dangling(state, named)),
        orphans=len(seen - referred),
        quarantined=quarantined,
        notes=_notes(state),
    )


def _stores(state: Path, unreadable: list[str]) -> list[Blobs]:
    """Every directory of blobs that can be found."""
    stores = [Blobs(blob_directory(state))]
    checkpoints = checkpoint_directory(state)
    with _adding(unreadable):
        stores += [Blobs(checkpoints / name) for name in sorted(RealFilesystem().names(checkpoints))]
    return stores


def _database(state: Path, database: StateDatabase, named: list[tuple[Path, Reference]]) -> DatabaseFound:
    path = database_path(state, database.name)
    known = len(database.migrations)
    try:
        with inspection.reading(path) as connection:
            faults = inspection.faults(connection)
            version = inspection.version(connection)
            if not faults:
                named += _references(state, database.name, connection)
    except StoreFailed as error:
        return DatabaseFound(name=database.name, version=None, known=known, faults=(error.message,))
    if version > known:
        faults.append(f"version {version} is newer than the {known} this esperd knows: upgrade esperd")
    return DatabaseFound(name=database.name, version=version, known=known, faults=tuple(faults))


def _dangling(state: Path, named: list[tuple[Path, Reference]]) -> list[tuple[Path, Reference]]:
    """Rows whose file is not there. A daemon that runs may have replaced a checkpoint since the rows were read: a row counts that
    still names the file when the rows are read again.
    """
    missing = [found for found in named if not _is_there(found)]
    for _ in range(LOOKS_AGAIN):
        if not missing:
            break
        again: list[tuple[Path, Reference]] = []
        for database in DATABASES:
            _database(state, database, again)
        missing = [found for found in again if found in missing and not _is_there(found)]
    return missing


def _is_there(found: tuple[Path, Reference]) -> bool:
    directory, reference = found
    try:
        return Blobs(directory).contains(reference.sha256)
    except StoreFailed:  # it is told among those that cannot be read
        return True


def _references(state: Path, name: str, connection: sqlite3.Connection) -> list[tuple[Path, Reference]]:
    blobs = blob_directory(state)
    if name == "kernels":
        return [(blobs, found) for found in references.of_kernels(connection.execute(references.KERNELS))]
    if name == "jobs":
        checkpoints = references.of_rows(connection.execute(references.CHECKPOINTS))
        return [
            *((blobs, found) for found in references.of_rows(connection.execute(references.ARTIFACTS))),
            *((checkpoint_directory(state) / found.owner, found) for found in checkpoints),
        ]
    return []


def _hashed(stores: list[Blobs], unreadable: list[str], progress: Progress) -> tuple[list[Path], set[Path]]:
    """Files whose bytes are not those of their name, and all that were hashed; what cannot be read is added to ``unreadable``."""
    names: list[tuple[Blobs, str]] = []
    for store in stores:
        names += [(store, sha256) for sha256 in store.names(lambda error: unreadable.append(error.message))]
    damaged, seen = [], set()
    for number, (store, sha256) in enumerate(names):
        path = store.path(sha256)
        with _adding(unreadable):
            match store.verified(sha256):  # None: a running daemon has deleted it since it was listed
                case True:
                    seen.add(path)
                case False:
                    seen.add(path)
                    damaged.append(path)
        progress("blobs", number + 1, len(names))
    return damaged, seen


@contextlib.contextmanager
def _adding(unreadable: list[str]) -> Iterator[None]:
    """One file's trouble is said with that file, and the others are looked at."""
    try:
        yield
    except StoreFailed as error:
        unreadable.append(error.message)
    except OSError as error:
        unreadable.append(f"cannot list {error.filename}: {error.strerror or error}")


def _quarantined(state: Path, stores: list[Blobs], unreadable: list[str]) -> tuple[str, ...]:
    aside = state / QUARANTINE
    files: list[str] = []
    with _adding(unreadable):
        files += [str((aside / name).relative_to(state)) for name in sorted(RealFilesystem().names(aside))]
    for store in stores:
        with _adding(unreadable):
            files += [str((store.directory / "quarantine" / name).relative_to(state)) for name in store.quarantined()]
    return tuple(files)


def _notes(state: Path) -> tuple[str, ...]:
    notes = []
    if (state / RESTORING).exists():
        notes.append("a restore was cut short; run `esperd db restore BACKUP --force` again")
    if sqlite3.sqlite_version_info < RACY_BEFORE:
        fixed = ".".join(map(str, RACY_BEFORE))
        notes.append(f"SQLite {sqlite3.sqlite_version}: before {fixed} two connections that checkpoint at once can corrupt a log")
    return tuple(notes)
