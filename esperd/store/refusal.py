"""Why a disk does not take what is written: there is no room on it, or it fails. Only the first ends when space is freed."""

from __future__ import annotations

import enum
import errno
import sqlite3


class Refusal(enum.StrEnum):
    """What a refused write says of the disk."""

    NO_ROOM = "no_room"
    """Disk or quota is full."""
    FAILING = "failing"
    """It answers with an error of its own, or was mounted read-only."""
    UNCLEAR = "unclear"
    """SQLite does not hand on what the operating system said; a write of one's own tells."""


ERRNOS = {
    errno.ENOSPC: Refusal.NO_ROOM,
    errno.EDQUOT: Refusal.NO_ROOM,
    errno.EIO: Refusal.FAILING,
    errno.EROFS: Refusal.FAILING,
    errno.ENXIO: Refusal.FAILING,
    errno.ENODEV: Refusal.FAILING,
    errno.ESTALE: Refusal.FAILING,
    errno.EUCLEAN: Refusal.FAILING,
}
"""What the operating system says; ``errno(3)``."""

FULL = "SQLITE_FULL"
"""SQLite's word for ENOSPC on a database or its log, and for a database that may not grow."""
UNCLEAR = frozenset(
    {
        "SQLITE_IOERR_WRITE",
        "SQLITE_IOERR_FSYNC",
        "SQLITE_IOERR_DIR_FSYNC",
        "SQLITE_IOERR_TRUNCATE",
        "SQLITE_IOERR_SHMOPEN",
        "SQLITE_IOERR_SHMSIZE",
        "SQLITE_IOERR_SHMMAP",
    }
)
"""Writing was refused, for EIO and EROFS as for EDQUOT, and beside the database also for ENOSPC (``os_unix.c``)."""


def refusal_of(error: OSError | sqlite3.Error) -> Refusal | None:
    """What a failed write says of the disk; None: nothing."""
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", None)
        if name == FULL:
            return Refusal.NO_ROOM
        return Refusal.UNCLEAR if name in UNCLEAR else None
    return ERRNOS.get(error.errno) if error.errno is not None else None
