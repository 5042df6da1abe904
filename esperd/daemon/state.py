"""What lies in a state directory: its databases, and what is done with one that is damaged when a daemon starts."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import anyio.to_thread
import structlog

from esperd.cache import index as kernel_index
from esperd.daemon import job_tables
from esperd.errors import StoreFailed
from esperd.policy import decision_log
from esperd.store.database import RACY_BEFORE, Database, Synchronous, is_damage
from esperd.store.refusal import Refusal
from esperd.telemetry import log as event_log

QUARANTINE = "quarantine"
RESTORING = "restoring"
"""Marks a state directory in which a restore began and did not end."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class StateDatabase:
    """One database of a daemon."""

    name: str
    migrations: Sequence[str]
    synchronous: Synchronous = "FULL"
    expendable: bool = False
    """True: a damaged one is moved aside and begun anew, because what it holds is made again, or only tells a story."""


DATABASES = (
    StateDatabase(name="jobs", migrations=job_tables.MIGRATIONS),
    StateDatabase(name="kernels", migrations=kernel_index.MIGRATIONS, expendable=True),
    StateDatabase(name="decisions", migrations=decision_log.MIGRATIONS),
    StateDatabase(name="events", migrations=event_log.MIGRATIONS, synchronous="NORMAL", expendable=True),
)
"""Each has one owner and migrations of its own; only events may lag a power cut."""


def database_path(state: Path, name: str) -> Path:
    """Where a database lies."""
    return state / f"{name}.db"


async def open_databases(
    stack: contextlib.AsyncExitStack, state: Path, on_refused: Callable[[Refusal, str], None] | None = None
) -> dict[str, Database]:
    """Open, check and migrate every database of a state directory, by name.

    Args:
        stack: closes them.
        state: the directory.
        on_refused: see :meth:`Database.open`.

    Raises:
        StoreFailed: when one cannot be opened, is of a newer version, or is damaged and cannot be made again; or a restore was
            cut short. Says how to restore.
    """
    if (state / RESTORING).exists():
        raise StoreFailed(
            f"a restore into {state} was cut short; run `esperd db restore BACKUP --force` again", path=str(state / RESTORING)
        )
    if sqlite3.sqlite_version_info < RACY_BEFORE:
        log.warning(
            "this SQLite can corrupt a log that several connections checkpoint at once; esperd uses one: while it runs, open its"
            " databases with nothing else that writes",
            sqlite=sqlite3.sqlite_version,
            fixed_in=".".join(map(str, RACY_BEFORE)),
        )
    return {database.name: await _open(stack, state, database, on_refused) for database in DATABASES}


async def _open(
    stack: contextlib.AsyncExitStack, state: Path, database: StateDatabase, on_refused: Callable[[Refusal, str], None] | None
) -> Database:
    path = database_path(state, database.name)

    def opening() -> contextlib.AbstractAsyncContextManager[Database]:
        return Database.open(path, database.migrations, database.synchronous, on_refused)

    try:
        return await stack.enter_async_context(opening())
    except StoreFailed as error:
        if not (database.expendable and is_damage(error)):
            raise
        moved = await anyio.to_thread.run_sync(set_aside, state, path)
        log.error("a damaged database was moved aside and begun anew", moved_to=str(moved), error=error.message)  # noqa: TRY400 - typed
        return await stack.enter_async_context(opening())


def set_aside(state: Path, path: Path) -> Path:
    """Move a damaged database, with what lies beside it, into the quarantine; returns where it is."""
    quarantine = state / QUARANTINE
    quarantine.mkdir(mode=0o700, exist_ok=True)
    target = quarantine / f"{path.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    # The log goes first: beside a fresh database it would be taken for that one's.
    for suffix in ("-wal", "-shm", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(target.with_name(target.name + suffix))
    return target
