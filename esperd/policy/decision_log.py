"""Every answer of the policy, durable before it is given: a job that comes back to a point hears the same again."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.policy import Decide, Decided
from esperd.policy.evidence import TABLES
from esperd.store.clock import Clock
from esperd.store.database import Database

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE decisions (
        job TEXT NOT NULL,
        point INTEGER NOT NULL,
        request_hash TEXT NOT NULL,
        answer BLOB NOT NULL,
        decided_at REAL NOT NULL,
        PRIMARY KEY (job, point)
    ) STRICT
    """,
    TABLES,
)
"""Schema of the log, oldest first; appended to, never changed."""


class DecisionLog:
    """The table ``decisions``.

    Args:
        database: holds the tables of :data:`MIGRATIONS`.
        clock: for the record only.
    """

    def __init__(self, database: Database, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    async def find(self, job: str, point: int) -> Decided | None:
        """The answer once given at this point, marked as replayed; None when there is none.

        Raises:
            StoreFailed: when the row holds something that is no answer.
        """
        rows = await self._database.read("SELECT answer FROM decisions WHERE job = ? AND point = ?", (job, point))
        return _replayed(rows[0]["answer"], job, point) if rows else None

    async def append(
        self, request: Decide, answer: Decided, beside: Callable[[sqlite3.Connection, Decide, Decided], None] | None = None
    ) -> Decided:
        """Keep an answer; returns once it is durable.

        Args:
            request: the question.
            answer: to it.
            beside: writes what belongs to this answer, in the same transaction; not called when another one stands already.

        Returns:
            ``answer``; or the first answer, replayed, when one was logged for this point in the meantime.

        Raises:
            StoreFailed: when it cannot be written.
        """
        encoded = msgspec.msgpack.encode(answer)
        row = (request.job, request.point, request_hash(request), encoded, self._clock())

        def insert(connection: sqlite3.Connection) -> bytes:
            inserted = connection.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row).rowcount
            if inserted and beside is not None:
                beside(connection, request, answer)
            found = connection.execute("SELECT answer FROM decisions WHERE job = ? AND point = ?", row[:2]).fetchone()
            return bytes(found["answer"])

        kept = await self._database.write(insert)
        return answer if kept == encoded else _replayed(kept, request.job, request.point)


def request_hash(request: Decide) -> str:
    """SHA-256 over everything the answer depends on; tells later whether a replayed point saw the same observation."""
    return hashlib.sha256(msgspec.msgpack.encode(request, order="deterministic")).hexdigest()


def _replayed(encoded: bytes, job: str, point: int) -> Decided:
    try:
        answer = msgspec.msgpack.decode(encoded, type=Decided)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"the decision of job {job} at point {point} cannot be read: {error}", job=job, point=point) from error
    return msgspec.structs.replace(answer, replayed=True)
