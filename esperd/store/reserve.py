"""A file that only holds space: given up when the disk is full, so that what was begun can still be recorded."""

from __future__ import annotations

import contextlib
from pathlib import Path

from esperd.store.filesystem import Filesystem, RealFilesystem

_FILE_MODE = 0o600


class Reserve:
    """Space that is taken in good times.

    Args:
        path: the file.
        size_bytes: how much it holds; 0: there is none, and nothing to give up.
        filesystem: the disk; tests pass one that fails.
    """

    def __init__(self, path: Path, size_bytes: int, filesystem: Filesystem | None = None) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._filesystem: Filesystem = filesystem or RealFilesystem()

    @property
    def held(self) -> bool:
        """True while the space is taken, as a whole."""
        if not self.size_bytes:
            return True
        return self._filesystem.exists(self.path) and self._filesystem.size(self.path) >= self.size_bytes

    def take(self) -> None:
        """Take the space. It is all there on return, or none of it is taken.

        Raises:
            OSError: when the disk refuses.
        """
        if self.held:
            return
        self.give_up()
        descriptor = self._filesystem.create(self.path, _FILE_MODE)
        try:
            try:
                self._filesystem.allocate(descriptor, self.size_bytes)
                self._filesystem.fsync(descriptor)
            finally:
                self._filesystem.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):  # the first error says what is wrong
                self.give_up()
            raise

    def give_up(self) -> None:
        """Give the space back; nothing happens when none is taken.

        Raises:
            OSError: when the disk refuses.
        """
        if self._filesystem.exists(self.path):
            self._filesystem.unlink(self.path)
