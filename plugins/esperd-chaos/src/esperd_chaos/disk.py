"""A disk that fails at its n-th call."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from esperd.store.filesystem import RealFilesystem


class FailingFilesystem(RealFilesystem):
    """The operating system's, until the n-th call that changes or syncs something, or where that is asked for, reads.

    Args:
        fail_at: which call fails, counted from 1; None: none, calls are only counted.
        code: what it fails with.
        reads: count, and fail, also calls that only ask (``stat``) or read.
    """

    def __init__(self, fail_at: int | None = None, code: int = errno.EIO, *, reads: bool = False) -> None:
        self.calls: list[str] = []
        self._fail_at = fail_at
        self._code = code
        self._reads = reads

    def create(self, path: Path, mode: int) -> int:
        """May fail."""
        self._count("create")
        return super().create(path, mode)

    def write(self, descriptor: int, data: bytes) -> None:
        """May fail half-way: half of the bytes are written first."""
        if len(self.calls) + 1 == self._fail_at:
            super().write(descriptor, data[: len(data) // 2])
        self._count("write")
        super().write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """May fail."""
        self._count("fsync")
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """May fail."""
        self._count("rename")
        super().rename(source, target)

    def fsync_directory(self, path: Path) -> None:
        """May fail."""
        self._count("fsync_directory")
        super().fsync_directory(path)

    def make_directory(self, path: Path, mode: int) -> None:
        """May fail."""
        self._count("make_directory")
        super().make_directory(path, mode)

    def unlink(self, path: Path) -> None:
        """May fail."""
        self._count("unlink")
        super().unlink(path)

    def exists(self, path: Path) -> bool:
        """May fail."""
        self._count_read("stat")
        return super().exists(path)

    def changed_ns(self, path: Path) -> int:
        """May fail."""
        self._count_read("stat")
        return super().changed_ns(path)

    def size(self, path: Path) -> int:
        """May fail."""
        self._count_read("stat")
        return super().size(path)

    def read(self, path: Path, offset: int = 0, length: int | None = None) -> bytes:
        """May fail."""
        self._count_read("read")
        return super().read(path, offset, length)

    def pieces(self, path: Path) -> Iterator[bytes]:
        """May fail at each piece."""
        for piece in super().pieces(path):
            self._count_read("read")
            yield piece

    def names(self, path: Path) -> list[str]:
        """May fail."""
        self._count_read("readdir")
        return super().names(path)

    def _count_read(self, name: str) -> None:
        if self._reads:
            self._count(name)

    def _count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._fail_at:
            raise OSError(self._code, os.strerror(self._code), name)
