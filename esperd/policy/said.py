"""What people said about coming decisions: durable before it is acknowledged, taken by exactly one decision point."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.policy import Decision
from esperd.store.clock import Clock
from esperd.store.database import Database

Words = tuple[Decision, ...]
"""What was said at once: several decisions where several proposals were approved."""

_DECODER = msgspec.msgpack.Decoder(Words)


class Said:
    """The table ``overrules``.

    Args:
        database: opened with :data:`esperd.policy.decision_log.MIGRATIONS`.
        clock: for the record only.
    """

    def __init__(self, database: Database, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    async def keep(self, job: str, words: Words) -> None:
        """Keep what was said for the next decision point; durable on return.

        Raises:
            StoreFailed: when it cannot be written; then nothing was said.
        """
        row = (job, msgspec.msgpack.encode(words), self._clock())
        sql = "INSERT INTO overrules (job, decisions, said_at) VALUES (?, ?, ?)"
        await self._database.write(lambda connection: connection.execute(sql, row))

    async def waiting(self, job: str) -> tuple[Words, ...]:
        """What no decision point has taken yet, oldest first."""
        sql = "SELECT decisions FROM overrules WHERE job = ? AND point IS NULL ORDER BY number"
        return _decoded(await self._database.read(sql, (job,)), job)

    async def taken(self, job: str, point: int) -> tuple[Words, ...]:
        """What this decision point took, oldest first."""
        sql = "SELECT decisions FROM overrules WHERE job = ? AND point = ? ORDER BY number"
        return _decoded(await self._database.read(sql, (job, point)), job)


def take(connection: sqlite3.Connection, job: str, point: int) -> tuple[Words, ...]:
    """Within a transaction: what waits, oldest first. From now on it belongs to this decision point and to no other."""
    rows = connection.execute(
        "SELECT decisions FROM overrules WHERE job = ? AND point IS NULL ORDER BY number", (job,)
    ).fetchall()
    connection.execute("UPDATE overrules SET point = ? WHERE job = ? AND point IS NULL", (point, job))
    return _decoded(rows, job)


def _decoded(rows: Sequence[sqlite3.Row], job: str) -> tuple[Words, ...]:
    try:
        return tuple(_DECODER.decode(row["decisions"]) for row in rows)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"what was said about job {job} cannot be read: {error}", job=job) from error
