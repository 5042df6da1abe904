"""Content-addressed files: a blob's name is the SHA-256 of its bytes, and bytes are checked whenever a whole blob is read.

Synchronous: a trainer worker calls it directly, asynchronous code through ``anyio.to_thread``. Several processes may use
one directory at the same time, because a name says what must be under it. Writers share a lock, collectors of garbage take it
alone, so that nothing is deleted between the moment its writer finds it and the moment it says so.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from esperd.errors import StoreFailed
from esperd.store.filesystem import Filesystem, RealFilesystem
from esperd.store.refusal import Refusal, refusal_of

_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{64}\.(?P<pid>[0-9]+)\.[0-9a-f]{8}")
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o600


class Blobs:
    """A blob directory: ``objects/ab/abcdef…`` for what is good, ``quarantine/`` for what was found damaged.

    Args:
        directory: made at the first :meth:`put`, readable by its owner only.
        filesystem: the disk; tests pass one that fails.
        on_refused: called, in the thread that writes, whenever the disk did not take something, with what it said.
    """

    def __init__(
        self,
        directory: Path,
        filesystem: Filesystem | None = None,
        on_refused: Callable[[Refusal, str], None] | None = None,
    ) -> None:
        self.directory = directory
        self._on_refused = on_refused
        self._filesystem: Filesystem = filesystem or RealFilesystem()
        self._durable_shards: set[Path] = set()

    def path(self, sha256: str) -> Path:
        """Where a blob lies, whether or not it is there.

        Raises:
            StoreFailed: when ``sha256`` is not 64 lower-case hexadecimal digits (so no name can leave the directory).
        """
        if not _NAME.fullmatch(sha256):
            raise StoreFailed(f"{sha256!r} is not the name of a blob: 64 lower-case hexadecimal digits", name=sha256)
        return self.directory / "objects" / sha256[:2] / sha256

    def put(self, data: bytes) -> str:
        """Store bytes and return their SHA-256 in hexadecimal. When it returns, they survive a power loss.

        Putting what is there already changes nothing. A copy that is damaged is quarantined and replaced. One that cannot be read
        keeps its name until another takes it: it may be whole, and only this process out of descriptors.

        Raises:
            StoreFailed: when the disk refuses; nothing is left half-written under the blob's name then.
        """
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.path(sha256)
        with self._reporting("store", target):
            self._ensure_shard(target.parent)
            with self._among_writers():
                found = self._holds(target, data) if self._filesystem.exists(target) else None
                if found is False:
                    self._quarantine(sha256)
                if found:
                    self._filesystem.touch(target)  # a collector that saw it before leaves it now
                else:
                    self._write(target, data)
                # Also for a blob that was there: whoever renamed it may have died before this call.
                self._filesystem.fsync_directory(target.parent)
        return sha256

    def get(self, sha256: str) -> bytes:
        """A blob's bytes, after checking that they are the ones named.

        Raises:
            StoreFailed: when there is no such blob, the disk refuses, or the bytes have another hash: the file is then
                moved to ``quarantine/``.
        """
        path = self.path(sha256)
        with self._reporting("read", path):
            data = self._filesystem.read(path)
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            with self._reporting("quarantine", path):
                quarantined = self._quarantine(sha256)
            raise StoreFailed(
                f"blob {sha256} is damaged: its bytes hash to {found}; it was moved to {quarantined}",
                sha256=sha256,
                found=found,
                quarantined=str(quarantined),
            )
        return data

    def verified(self, sha256: str) -> bool | None:
        """Whether the bytes are those of the name; None when there is no such blob. Moves nothing, and may run while others
        delete: one that is deleted meanwhile is read to its end.

        Raises:
            StoreFailed: when the disk refuses.
        """
        path = self.path(sha256)
        digest = hashlib.sha256()
        with self._reporting("read", path):
            try:
                for piece in self._filesystem.pieces(path):
                    digest.update(piece)
            except FileNotFoundError:
                return None
        return digest.hexdigest() == sha256

    def is_good(self, sha256: str) -> bool:
        """Whether a blob is there, whole; a damaged one is moved to ``quarantine/``.

        Raises:
            StoreFailed: when the disk refuses.
        """
        found = self.verified(sha256)
        if found is False:
            with self._reporting("quarantine", self.path(sha256)):
                self._quarantine(sha256)
        return found is True

    def read_range(self, sha256: str, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``, unchecked: a part has no hash. Empty at or beyond the end.

        Raises:
            StoreFailed: when there is no such blob, the range is negative, or the disk refuses.
        """
        path = self.path(sha256)
        if offset < 0 or length < 0:
            raise StoreFailed(f"no bytes can be read at offset {offset}, length {length}", offset=offset, length=length)
        with self._reporting("read", path):
            return self._filesystem.read(path, offset, length)

    def size(self, sha256: str) -> int:
        """Size of a blob in bytes.

        Raises:
            StoreFailed: when there is no such blob or the disk refuses.
        """
        path = self.path(sha256)
        with self._reporting("measure", path):
            return self._filesystem.size(path)

    def contains(self, sha256: str) -> bool:
        """True when a blob of this name is there; its bytes are not checked.

        Raises:
            StoreFailed: when ``sha256`` is not the name of a blob, or the disk does not tell.
        """
        path = self.path(sha256)
        with self._reporting("look for", path):
            return self._filesystem.exists(path)

    def names(self, on_unlisted: Callable[[StoreFailed], None] | None = None) -> list[str]:
        """The name of every blob.

        Args:
            on_unlisted: told of each directory that cannot be listed, its path among the error's fields; the others' blobs are
                named then.

        Raises:
            StoreFailed: when the disk refuses and nobody is to be told.
        """
        return [path.name for path in self._files(on_unlisted) if _NAME.fullmatch(path.name)]

    def changes(self, on_unlisted: Callable[[StoreFailed], None] | None = None) -> dict[str, int]:
        """Blobs' names, and when each was last put, in nanoseconds since the epoch. One whose file the disk tells nothing of is
        not among them: whether anybody wants it cannot be found out, and the others are not to wait for that.

        Args:
            on_unlisted: as for :meth:`names`.

        Raises:
            StoreFailed: when the disk refuses to list them and nobody is to be told.
        """
        found = {}
        for sha256 in self.names(on_unlisted):
            with suppress(OSError):  # also one that was quarantined meanwhile
                found[sha256] = self._filesystem.changed_ns(self.path(sha256))
        return found

    def discard(self, unwanted: Mapping[str, int]) -> tuple[str, ...]:
        """Delete blobs that nobody has put again since they were looked at. Never waits: while somebody writes, nothing is
        deleted.

        Args:
            unwanted: names, with what :meth:`changes` said of them.

        Returns:
            The names of those that were deleted.

        Raises:
            StoreFailed: when the disk refuses; whatever it did not refuse is deleted.
        """
        deleted: list[str] = []
        refused: list[StoreFailed] = []
        with self._reporting("collect", self.directory):
            if not self._filesystem.exists(self.directory / "objects"):
                return ()
            with self._without_writers() as alone:
                for sha256, changed_ns in unwanted.items() if alone else ():
                    try:
                        if self._discarded(self.path(sha256), changed_ns):
                            deleted.append(sha256)
                    except StoreFailed as error:
                        refused.append(error)
        if refused:
            raise refused[0]
        return tuple(deleted)

    def quarantined(self) -> tuple[str, ...]:
        """Names of the files that were moved away because they are damaged.

        Raises:
            StoreFailed: when the disk refuses.
        """
        quarantine = self.directory / "quarantine"
        with self._reporting("list", quarantine):
            return tuple(sorted(self._filesystem.names(quarantine)))

    def sweep(self, keep: Collection[str]) -> int:
        """Delete every blob that is not named here, and what dead writers left. Nobody may be putting a blob meanwhile that is
        to stay. What is in quarantine stays there.

        Returns:
            How many files were deleted.

        Raises:
            StoreFailed: when the disk refuses; whatever it did not refuse is deleted.
        """
        refused: list[StoreFailed] = []
        files = self._files(refused.append)
        unwanted = [path for path in files if _NAME.fullmatch(path.name) and path.name not in keep]
        return self._delete([*unwanted, *filter(_is_left, files)], refused)

    def remove_temporaries(self) -> int:
        """Delete files whose writers died before they were whole; those of living processes stay.

        Returns:
            How many files were deleted.

        Raises:
            StoreFailed: when the disk refuses; whatever it did not refuse is deleted.
        """
        refused: list[StoreFailed] = []
        return self._delete([*filter(_is_left, self._files(refused.append))], refused)

    def remove(self) -> None:
        """Delete the whole directory, quarantine included; nothing happens when there is none.

        Raises:
            StoreFailed: when the disk refuses.
        """
        with self._reporting("delete", self.directory):
            if self._filesystem.exists(self.directory):
                shutil.rmtree(self.directory)
        self._durable_shards.clear()

    def _discarded(self, path: Path, changed_ns: int) -> bool:
        """Delete a file unless it is gone or was put again; returns whether it was deleted."""
        with self._reporting("collect", path):
            if not self._filesystem.exists(path) or self._filesystem.changed_ns(path) != changed_ns:
                return False
            self._filesystem.unlink(path)
            return True

    def _delete(self, unwanted: Sequence[Path], refused: list[StoreFailed]) -> int:
        """Delete all that can be deleted: one file that cannot must not keep the others on the disk, nor one directory that could
        not be listed (``refused``).
        """
        for path in unwanted:
            try:
                with self._reporting("delete", path):
                    self._filesystem.unlink(path)
            except StoreFailed as error:
                refused.append(error)
        if refused:
            raise refused[0]
        return len(unwanted)

    def _holds(self, path: Path, data: bytes) -> bool | None:
        """Whether a file holds this; None when it cannot be read, which says nothing about it."""
        try:
            return self._filesystem.read(path) == data
        except OSError:
            return None

    def _files(self, on_unlisted: Callable[[StoreFailed], None] | None) -> list[Path]:
        """All that lies where blobs do, as far as it can be listed. What another process deletes meanwhile may be among it."""
        shards = [path for path in self._listed(self.directory / "objects", on_unlisted) if len(path.name) == len("ab")]
        return [path for shard in shards for path in self._listed(shard, on_unlisted)]

    def _listed(self, directory: Path, on_unlisted: Callable[[StoreFailed], None] | None) -> list[Path]:
        try:
            with self._reporting("list", directory):
                return [directory / name for name in self._filesystem.names(directory)]
        except StoreFailed as error:
            if on_unlisted is None:
                raise
            on_unlisted(error)
            return []

    def _write(self, target: Path, data: bytes) -> None:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = self._filesystem.create(temporary, _FILE_MODE)
        try:
            try:
                self._filesystem.write(descriptor, data)
                self._filesystem.fsync(descriptor)
            finally:
                self._filesystem.close(descriptor)
            self._filesystem.rename(temporary, target)
        except OSError as error:
            try:
                self._filesystem.unlink(temporary)
            except OSError as second:
                error.add_note(f"{temporary} could not be removed either: {second}")
            raise

    def _ensure_shard(self, shard: Path) -> None:
        """Make ``objects/ab`` and bring the entries on the way to it to the disk, once per process."""
        if shard in self._durable_shards:
            return
        self._filesystem.make_directory(shard, _DIRECTORY_MODE)
        for level in (shard.parent, self.directory, self.directory.parent):
            self._filesystem.fsync_directory(level)
        self._durable_shards.add(shard)

    def _quarantine(self, sha256: str) -> Path:
        quarantine = self.directory / "quarantine"
        self._filesystem.make_directory(quarantine, _DIRECTORY_MODE)
        target = quarantine / f"{sha256}.{secrets.token_hex(4)}"
        self._filesystem.rename(self.path(sha256), target)
        return target

    @contextmanager
    def _among_writers(self) -> Iterator[None]:
        """While this is held, no collector deletes."""
        descriptor = os.open(self.directory / "objects", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _without_writers(self) -> Iterator[bool]:
        """Yields whether nobody writes; while True, nobody begins to."""
        descriptor = os.open(self.directory / "objects", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    @contextmanager
    def _reporting(self, verb: str, path: Path) -> Iterator[None]:
        what = "directory" if verb == "list" else "blob"
        try:
            yield
        except FileNotFoundError as error:
            raise StoreFailed(f"cannot {verb} {what} {path.name}: {error.filename} is not there", path=str(path)) from error
        except OSError as error:
            code = errno.errorcode.get(error.errno, str(error.errno)) if error.errno is not None else "unknown"
            failed = StoreFailed(
                f"cannot {verb} {what} {path.name} at {path}: {error.strerror or error} ({code})", path=str(path), errno=code
            )
            # One file that cannot be read is that file's trouble.
            if verb == "store" and self._on_refused is not None and (refusal := refusal_of(error)) is not None:
                self._on_refused(refusal, failed.message)
            raise failed from error


def _is_left(path: Path) -> bool:
    """Whether a writer died before the file was whole."""
    found = _TEMPORARY.fullmatch(path.name)
    return found is not None and not _lives(int(found["pid"]))


def _lives(pid: int) -> bool:
    """Whether there is a process of this id, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
