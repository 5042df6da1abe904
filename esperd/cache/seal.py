"""The seal on what this installation compiled: HMAC-SHA256 under a key that only this user can read.

It tells a manifest that this daemon stored from one that somebody else put into the database. It does not protect from
whoever can read the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from esperd.errors import StoreFailed
from esperd.store.filesystem import Filesystem, RealFilesystem

KEY_BYTES = 32


class Seal:
    """Seals and checks. Made by :meth:`open`."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, path: Path, filesystem: Filesystem | None = None) -> Seal:
        """Read the key file, or make it at first use; two processes that make it at once agree on one key.

        Args:
            path: the key file; its directory must exist.
            filesystem: the disk; tests pass one that fails.

        Raises:
            StoreFailed: when the file cannot be read or made, others may read or write it, or it is no key.
        """
        disk = filesystem or RealFilesystem()
        try:
            if not disk.exists(path):
                _make_key(path, disk)
            mode = stat.S_IMODE(path.stat().st_mode)
            key = disk.read(path)
        except OSError as error:
            raise StoreFailed(f"the key of kernel seals at {path} cannot be used: {error.strerror}", path=str(path)) from error
        if mode & 0o077:
            raise StoreFailed(
                f"the key of kernel seals at {path} has mode {mode:04o}: others may use it; remove it, and every kernel is"
                " compiled again under a new one",
                path=str(path),
                mode=f"{mode:04o}",
            )
        if len(key) != KEY_BYTES:
            raise StoreFailed(
                f"the key of kernel seals at {path} has {len(key)} bytes instead of {KEY_BYTES}; remove it, and every kernel"
                " is compiled again under a new one",
                path=str(path),
                size_bytes=len(key),
            )
        return cls(key)

    def sign(self, manifest: bytes) -> bytes:
        """The seal of a manifest's canonical bytes, 32 bytes."""
        return hmac.digest(self._key, manifest, hashlib.sha256)

    def is_intact(self, manifest: bytes, seal: bytes) -> bool:
        """True when ``seal`` was made by :meth:`sign` for exactly these bytes under this key."""
        return hmac.compare_digest(self.sign(manifest), seal)


def _make_key(path: Path, disk: Filesystem) -> None:
    """Write a new key under another name, then link it: the file appears whole, and only if there is none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = disk.create(temporary, 0o600)
    try:
        try:
            disk.write(descriptor, secrets.token_bytes(KEY_BYTES))
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)
        with contextlib.suppress(FileExistsError):  # another process was first; its key is ours too
            path.hardlink_to(temporary)
    finally:
        disk.unlink(temporary)
    disk.fsync_directory(path.parent)
