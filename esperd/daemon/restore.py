"""A backup back into a state directory: verified first, nothing of what is there deleted, and a marker while it is half done."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from esperd.daemon.backup import KEYS, SEAL, Manifest, Progress, hash_of, read_manifest, write_file
from esperd.daemon.directories import blob_directory, checkpoint_directory
from esperd.daemon.lock import prepare_state_directory, state_locked
from esperd.daemon.state import DATABASES, RESTORING, database_path
from esperd.errors import Conflict, StoreFailed
from esperd.store.filesystem import Filesystem, RealFilesystem


def restore(
    backup: Path, state: Path, progress: Progress, *, force: bool = False, filesystem: Filesystem | None = None
) -> tuple[Manifest, Path | None]:
    """Put a backup into a state directory.

    Args:
        backup: as :func:`~esperd.daemon.backup.back_up` wrote it.
        state: the state directory; no daemon may run on it.
        progress: told how far it is.
        force: move what is there aside, into ``replaced-TIME`` below the state directory.
        filesystem: the disk; tests pass one that fails.

    Returns:
        What was restored, and where the former state is now; None when there was none.

    Raises:
        StoreFailed: when the backup is none, is damaged, or of a newer esperd: the state is untouched then; or the disk
            refuses half-way: no daemon starts on the state then, and restoring again mends it.
        StateDirectoryLocked: when a daemon runs.
        StateDirectoryUnusable: when the directory cannot be written.
        Conflict: when there is state already, without ``force``.
    """
    filesystem = filesystem or RealFilesystem()
    manifest = read_manifest(backup)
    _verify(backup, manifest, progress, filesystem)
    prepare_state_directory(state)
    with state_locked(state):
        present = _present(state, manifest)
        if present and not force:
            raise Conflict(
                f"{state} holds state already ({', '.join(path.name for path in present)}); --force moves it aside",
                path=str(state),
            )
        try:
            return manifest, _replace(backup, state, manifest, present, progress, filesystem)
        except OSError as error:
            raise StoreFailed(
                f"the restore into {state} was cut short: {error}; run it again with --force", path=str(state)
            ) from error


def _present(state: Path, manifest: Manifest) -> list[Path]:
    """What a restore would replace; keys stay where they are when the backup has none."""
    databases = [database_path(state, database.name) for database in DATABASES]
    beside = [path.with_name(path.name + suffix) for path in databases for suffix in ("-wal", "-shm")]
    known = [*beside, *databases, blob_directory(state), checkpoint_directory(state), state / SEAL]
    if manifest.keys is not None:
        known.append(state / KEYS)
    return [path for path in known if path.exists()]


def _verify(backup: Path, manifest: Manifest, progress: Progress, filesystem: Filesystem) -> None:
    """Raises: StoreFailed: when a file is not what the manifest says, or of a newer esperd."""
    known = {database.name: len(database.migrations) for database in DATABASES}
    for name, version in manifest.versions.items():
        if version > known.get(name, -1):
            raise StoreFailed(
                f"{name}.db of the backup has version {version}, newer than this esperd knows; it needs esperd {manifest.esperd}",
                path=str(backup),
                found=version,
            )
    for number, file in enumerate(manifest.files):
        relative = PurePosixPath(file.path)
        if relative.is_absolute() or ".." in relative.parts:
            raise StoreFailed(f"the manifest of {backup} names {file.path}, which lies outside", path=str(backup))
        try:
            sha256, _ = hash_of(filesystem.pieces(backup / relative))
        except OSError as error:
            raise StoreFailed(f"the backup lacks {file.path}: {error}", path=str(backup), file=file.path) from error
        if sha256 != file.sha256:
            raise StoreFailed(
                f"{backup / relative} is damaged: its bytes are not those its manifest names; use another backup",
                path=str(backup),
                file=file.path,
            )
        progress("verify", number + 1, len(manifest.files))


def _replace(
    backup: Path, state: Path, manifest: Manifest, present: list[Path], progress: Progress, filesystem: Filesystem
) -> Path | None:
    marker = state / RESTORING
    if not marker.exists():
        write_file(filesystem, marker, ())
        filesystem.fsync_directory(state)
    aside = None
    if present:
        aside = state / f"replaced-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
        filesystem.make_directory(aside, 0o700)
        for path in present:
            filesystem.rename(path, aside / path.name)
        filesystem.fsync_directory(aside)
    for number, file in enumerate(manifest.files):
        target = state / file.path
        filesystem.make_directory(target.parent, 0o700)
        write_file(filesystem, target, filesystem.pieces(backup / file.path))
        progress("restore", number + 1, len(manifest.files))
    for directory in sorted({(state / file.path).parent for file in manifest.files}):
        filesystem.fsync_directory(directory)
    filesystem.fsync_directory(state)
    filesystem.unlink(marker)
    filesystem.fsync_directory(state)
    return aside
