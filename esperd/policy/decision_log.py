"""Every answer of the policy with its request, durable before it is given: a job that comes back to a point hears the same again,
and the answer can be explained and computed anew.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.base import MessageT
from esperd.messages.policy import Decide, Decided
from esperd.policy.evidence import TABLES
from esperd.policy.overruling import measures, overrule
from esperd.policy.said import take
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
    """
    ALTER TABLE decisions ADD COLUMN request BLOB;
    CREATE TABLE overrules (
        number INTEGER PRIMARY KEY,
        job TEXT NOT NULL,
        decisions BLOB NOT NULL,
        said_at REAL NOT NULL,
        point INTEGER
    ) STRICT;
    CREATE INDEX overrules_of_job ON overrules (job, point)
    """,
    TABLES,
)
"""Schema of the log, oldest first; appended to, never changed."""


@dataclass(frozen=True)
class Logged:
    """A row of the log."""

    point: int
    decided_at: float
    request: Decide | None
    """None: logged by an older esperd, which did not keep it."""
    answer: Decided


MOST_MEASURED = 20
"""Points that are looked back over for one that decided something; the trainer lets a policy measure 16 times in a row."""


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
        """Keep an answer, in which what people said for this point goes first; returns once it is durable.

        Args:
            request: the question.
            answer: to it.
            beside: writes what belongs to this answer, in the same transaction; not called when another one stands already.

        Returns:
            What was decided; or the first answer, replayed, when one was logged for this point in the meantime: then what
            people said waits for the next point.

        Raises:
            StoreFailed: when it cannot be written.
        """
        job, point, now = request.job, request.point, self._clock()
        asked, digest = msgspec.msgpack.encode(request), request_hash(request)

        def insert(connection: sqlite3.Connection) -> Decided:
            found = connection.execute("SELECT answer FROM decisions WHERE job = ? AND point = ?", (job, point)).fetchone()
            if found is not None:
                return _replayed(found["answer"], job, point)
            # an answer that only measures decides nothing: what people said waits for the one that does
            decided = answer if measures(answer) else overrule(answer, take(connection, job, point))
            row = (job, point, digest, msgspec.msgpack.encode(decided), now, asked)
            connection.execute(
                "INSERT INTO decisions (job, point, request_hash, answer, decided_at, request) VALUES (?, ?, ?, ?, ?, ?)", row
            )
            if beside is not None:
                beside(connection, request, decided)
            return decided

        return await self._database.write(insert)

    async def latest(self, job: str) -> Logged | None:
        """The last decision point of a job at which more was done than to measure, or the last at all; None before the first.

        Raises:
            StoreFailed: when the row cannot be read.
        """
        sql = "SELECT * FROM decisions WHERE job = ? ORDER BY point DESC LIMIT ?"
        found = [_logged(row) for row in await self._database.read(sql, (job, MOST_MEASURED))]
        best = [logged for logged in found if not measures(logged.answer)] or found
        return best[0] if best else None

    async def page(self, job: str, after: int, limit: int) -> list[Logged]:
        """Decision points above ``after``, in order, at most ``limit``.

        Raises:
            StoreFailed: when a row cannot be read.
        """
        sql = "SELECT * FROM decisions WHERE job = ? AND point > ? ORDER BY point LIMIT ?"
        return [_logged(row) for row in await self._database.read(sql, (job, after, limit))]


def request_hash(request: Decide) -> str:
    """SHA-256 over everything the answer depends on; tells later whether a replayed point saw the same observation."""
    return hashlib.sha256(msgspec.msgpack.encode(request, order="deterministic")).hexdigest()


def _replayed(encoded: bytes, job: str, point: int) -> Decided:
    return msgspec.structs.replace(_decoded(encoded, Decided, job, point), replayed=True)


def _logged(row: sqlite3.Row) -> Logged:
    job, point = row["job"], row["point"]
    return Logged(
        point=point,
        decided_at=row["decided_at"],
        request=None if row["request"] is None else _decoded(row["request"], Decide, job, point),
        answer=_decoded(row["answer"], Decided, job, point),
    )


def _decoded(encoded: bytes, kind: type[MessageT], job: str, point: int) -> MessageT:
    try:
        return msgspec.msgpack.decode(encoded, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"the decision of job {job} at point {point} cannot be read: {error}", job=job, point=point) from error
