"""Looking at a database from outside: reading what another process may be writing, without ever writing itself."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from esperd.errors import StoreFailed

BUSY_TIMEOUT_S = 5.0
"""How long a statement waits for the daemon's lock; chosen, not measured."""
PAGES_AT_ONCE = 1_024
"""Pages copied between two reports of progress: 4 MiB; chosen, not measured."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write, and therefore never checkpoints beside the daemon's.

    Raises:
        StoreFailed: when the file is not there, or SQLite refuses; also what happens inside the block.
    """
    try:
        with contextlib.closing(_open(path)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA query_only = ON")
            yield connection
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", None)
        raise StoreFailed(f"{path}: {error}{f' ({name})' if name else ''}", path=str(path), sqlite=name) from error


def faults(connection: sqlite3.Connection) -> list[str]:
    """What ``integrity_check`` and ``foreign_key_check`` find wrong; nothing when all is well."""
    found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
    dangling = [f"row {row[1]} of {row[0]} refers to no {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")]
    return [fault for fault in found if fault != "ok"] + dangling


def version(connection: sqlite3.Connection) -> int:
    """How many migrations the database has seen."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def copy_database(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """A consistent copy of a database that may be written meanwhile; one file, nothing beside it.

    Args:
        source: the file.
        target: must not exist.
        progress: told how many bytes are copied, and of how many.

    Raises:
        StoreFailed: when SQLite refuses, or what was copied is damaged.
    """
    with reading(source) as connection:
        connection.execute("BEGIN")  # one snapshot: a commit beside this must not start the copy over
        size = int(connection.execute("PRAGMA page_size").fetchone()[0])
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            connection.backup(
                copy, pages=PAGES_AT_ONCE, progress=lambda _, left, total: progress((total - left) * size, total * size)
            )
            copy.execute("PRAGMA journal_mode = DELETE")
            wrong = faults(copy)
    if wrong:
        raise StoreFailed(f"{source} is damaged: {'; '.join(wrong)}; it is not copied", path=str(source), faults=wrong)


def _open(path: Path) -> sqlite3.Connection:
    place = f"file:{quote(str(path))}"
    connection = sqlite3.connect(f"{place}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if getattr(error, "sqlite_errorname", "") != "SQLITE_CANTOPEN" or not path.exists():
            raise
        # Nobody has it open: what lies beside a database in WAL mode must be made, which takes the right to write.
        return sqlite3.connect(f"{place}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    return connection
