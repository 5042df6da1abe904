"""The one seam for disks: every call that can fail half-way, so that tests can fail the n-th one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol


class Filesystem(Protocol):
    """What the blob store asks of a disk. Every method raises ``OSError`` as the operating system does."""

    def create(self, path: Path, mode: int) -> int:
        """Create a file that must not exist, for writing; returns its descriptor."""
        ...

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of ``data``."""
        ...

    def fsync(self, descriptor: int) -> None:
        """Bring the file's bytes to the disk."""
        ...

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        ...

    def rename(self, source: Path, target: Path) -> None:
        """Replace ``target`` by ``source`` atomically."""
        ...

    def fsync_directory(self, path: Path) -> None:
        """Bring a directory's entries to the disk: without it a rename may be forgotten."""
        ...

    def make_directory(self, path: Path, mode: int) -> None:
        """Create a directory and its parents where they are missing; ``mode`` is for those created."""
        ...

    def read(self, path: Path, offset: int = 0, length: int | None = None) -> bytes:
        """Up to ``length`` bytes from ``offset`` (None: to the end)."""
        ...

    def pieces(self, path: Path) -> Iterator[bytes]:
        """The bytes of the file that is there when the first piece is asked for, in pieces that fit into memory: all of them
        of this one file, also when another one takes its name, or it is deleted, meanwhile.
        """
        ...

    def size(self, path: Path) -> int:
        """Size of a file in bytes."""
        ...

    def exists(self, path: Path) -> bool:
        """True when the path is there, False when it is not; ``OSError`` when that cannot be told."""
        ...

    def names(self, path: Path) -> list[str]:
        """What lies in a directory; empty when there is none."""
        ...

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        ...

    def touch(self, path: Path) -> None:
        """Set a file's time of change to now."""
        ...

    def changed_ns(self, path: Path) -> int:
        """A file's time of change, in nanoseconds since the epoch."""
        ...

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, on the same file system."""
        ...

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Take so many bytes of the disk for an open file."""
        ...

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the path's file system."""
        ...


PIECE_BYTES = 4 * 1024 * 1024
"""Read at once; chosen, not measured."""


class RealFilesystem:
    """The operating system's."""

    def create(self, path: Path, mode: int) -> int:
        """Create with ``O_EXCL``."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write until nothing is left: one ``write`` call moves at most 2 GiB."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def fsync(self, descriptor: int) -> None:
        """``fsync(2)``."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """``close(2)``."""
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """``rename(2)``."""
        source.replace(target)

    def fsync_directory(self, path: Path) -> None:
        """``fsync(2)`` on the directory."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_directory(self, path: Path, mode: int) -> None:
        """``mkdir -p``; unlike ``Path.mkdir(parents=True)`` the mode also holds for parents."""
        missing = [level for level in (path, *path.parents) if not level.is_dir()]
        for level in reversed(missing):
            level.mkdir(mode, exist_ok=True)

    def read(self, path: Path, offset: int = 0, length: int | None = None) -> bytes:
        """Seek and read."""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)

    def pieces(self, path: Path) -> Iterator[bytes]:
        """One descriptor for all of them."""
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def size(self, path: Path) -> int:
        """``stat(2)``."""
        return path.stat().st_size

    def exists(self, path: Path) -> bool:
        """``stat(2)``. Not ``Path.exists``, which hides from Python 3.14 on that the disk did not answer."""
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, path: Path) -> list[str]:
        """``readdir(3)``."""
        try:
            return [entry.name for entry in path.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def unlink(self, path: Path) -> None:
        """``unlink(2)``."""
        path.unlink()

    def touch(self, path: Path) -> None:
        """``utimensat(2)``."""
        os.utime(path)

    def changed_ns(self, path: Path) -> int:
        """``stat(2)``."""
        return path.stat().st_mtime_ns

    def link(self, source: Path, target: Path) -> None:
        """``link(2)``."""
        os.link(source, target)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """``posix_fallocate(3)``, which writes zeros where the file system cannot do better."""
        os.posix_fallocate(descriptor, 0, size_bytes)

    def free_bytes(self, path: Path) -> int:
        """``statvfs(3)``: blocks for unprivileged users."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize
