"""Finished jobs on disk, as retention sees them: when they ended, how much they left, and how they are forgotten."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from esperd.messages.jobs import FINAL_JOB_STATES
from esperd.store.database import Database

_FINAL = tuple(sorted(state.value for state in FINAL_JOB_STATES))
# Question marks and nothing else is put together with these statements.
_IS_FINAL = f"state IN ({', '.join('?' * len(_FINAL))}) AND finished_at IS NOT NULL"


class FinishedJob(NamedTuple):
    """A job that is over."""

    id: str
    ended_at: float
    """Seconds since the epoch."""
    size_bytes: int
    """Of its artifacts."""


class FinishedJobs:
    """The finished ones among the jobs.

    Args:
        database: of the jobs.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(self) -> tuple[FinishedJob, ...]:
        """All of them; the one that ended first first.

        Raises:
            StoreFailed: when the database refuses.
        """
        rows = await self._database.read(
            "SELECT id, finished_at, (SELECT coalesce(sum(size_bytes), 0) FROM artifacts WHERE job = jobs.id) AS size_bytes"  # noqa: S608
            f" FROM jobs WHERE {_IS_FINAL} ORDER BY finished_at, number",
            _FINAL,
        )
        return tuple(FinishedJob(row["id"], row["finished_at"], row["size_bytes"]) for row in rows)

    async def all_ids(self) -> frozenset[str]:
        """Every job there is, finished or not.

        Raises:
            StoreFailed: when the database refuses.
        """
        return frozenset(row["id"] for row in await self._database.read("SELECT id FROM jobs"))

    async def forget(self, job: FinishedJob) -> bool:
        """Delete a job's row and every row that refers to it; False when it is not finished any more, or was finished anew.

        Raises:
            StoreFailed: when the database refuses.
        """

        def transaction(connection: sqlite3.Connection) -> bool:
            row = connection.execute(
                f"SELECT 1 FROM jobs WHERE id = ? AND finished_at = ? AND {_IS_FINAL}",  # noqa: S608
                (job.id, job.ended_at, *_FINAL),
            ).fetchone()
            if row is None:
                return False
            for table, column in _referring(connection):
                connection.execute(f'DELETE FROM "{table}" WHERE "{column}" = ?', (job.id,))  # noqa: S608 - our own schema
            connection.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
            return True

        return await self._database.write(transaction)


def _referring(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Tables, and the columns in them, that refer to a job by its id."""
    rows = connection.execute(
        'SELECT tables.name, keys."from" FROM sqlite_master AS tables, pragma_foreign_key_list(tables.name) AS keys'
        " WHERE tables.type = 'table' AND keys.\"table\" = 'jobs'"
    )
    return [(row[0], row[1]) for row in rows]
