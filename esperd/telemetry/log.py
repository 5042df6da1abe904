"""The append-only event log: per job, numbered from 1 without holes."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec

from esperd.errors import StoreFailed
from esperd.messages.telemetry import Body, Event, EventPage, NewEvent
from esperd.store.database import Database

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE events (
        job TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        at REAL NOT NULL,
        type TEXT NOT NULL,
        body BLOB NOT NULL,                    -- msgpack
        PRIMARY KEY (job, sequence)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE batches (
        job TEXT NOT NULL,
        key TEXT NOT NULL,
        PRIMARY KEY (job, key)
    ) STRICT, WITHOUT ROWID
    """,
    # Numbers over all jobs, in the order of recording, and never given twice: not even when old events were deleted. The index
    # by type is one more for each event, and what keeps a search for something rare from reading everything.
    """
    ALTER TABLE events ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
    UPDATE events SET number = ranked.place FROM (
        SELECT job AS its_job, sequence AS its_sequence, row_number() OVER (ORDER BY at, job, sequence) AS place FROM events
    ) AS ranked WHERE job = its_job AND sequence = its_sequence;
    CREATE UNIQUE INDEX events_by_number ON events (number);
    CREATE INDEX events_by_time ON events (at, number);
    CREATE INDEX events_by_job ON events (job, at, number);
    CREATE INDEX events_by_type ON events (type, at, number);
    CREATE TABLE numbering (last INTEGER NOT NULL) STRICT;
    INSERT INTO numbering SELECT coalesce(max(number), 0) FROM events
    """,
)
"""Schema of the log's database; only ever append."""

FORGOTTEN_AT_ONCE = 1_000
"""Events deleted in one transaction, so that nobody who records waits long; chosen, not measured."""

LARGEST_PAGE = 1_000
"""Events in one answer at most, however many were asked for; chosen, not measured."""


class EventLog:
    """What happened in every job.

    Args:
        database: its own, opened with :data:`MIGRATIONS` and ``synchronous="NORMAL"``: a killed process loses nothing, a
            power loss may lose the last events, and jobs do not wait for the disk.
    """

    def __init__(self, database: Database) -> None:
        self.database = database

    async def append(self, job: str, key: str, events: Sequence[NewEvent]) -> tuple[Event, ...]:
        """Number and store events, in order, all or none.

        Args:
            job: whose events.
            key: names this batch within the job.
            events: what happened, oldest first.

        Returns:
            The events as stored; nothing when a batch of this key is in the log already.

        Raises:
            StoreFailed: when the database refuses.
        """

        def transaction(connection: sqlite3.Connection) -> tuple[Event, ...]:
            recorded = connection.execute("INSERT OR IGNORE INTO batches (job, key) VALUES (?, ?)", (job, key)).rowcount
            if not recorded:
                return ()
            last = connection.execute("SELECT coalesce(max(sequence), 0) FROM events WHERE job = ?", (job,)).fetchone()[0]
            numbered = tuple(
                Event(job=job, sequence=sequence, at=event.at, body=event.body)
                for sequence, event in enumerate(events, start=last + 1)
            )
            updated = "UPDATE numbering SET last = last + ? RETURNING last"
            number = connection.execute(updated, (len(numbered),)).fetchone()[0] - len(numbered)
            connection.executemany(
                "INSERT INTO events (job, sequence, at, type, body, number) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (job, event.sequence, event.at, event_type(event.body), msgspec.msgpack.encode(event.body), place)
                    for place, event in enumerate(numbered, start=number + 1)
                ],
            )
            return numbered

        return await self.database.write(transaction)

    async def page(self, job: str, after: int = 0, limit: int = 500) -> EventPage:
        """Events of a job after number ``after``, oldest first, at most ``limit`` and at most :data:`LARGEST_PAGE`.

        Raises:
            StoreFailed: when the database refuses, or holds an event that cannot be read.
        """
        limit = max(1, min(limit, LARGEST_PAGE))
        rows = await self.database.read(
            "SELECT * FROM events WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?", (job, after, limit + 1)
        )
        return EventPage(events=tuple(map(event_of, rows[:limit])), more=len(rows) > limit)

    async def last_events(self) -> dict[str, float]:
        """Every job that has events, and when the last of them happened, in seconds since the epoch.

        Raises:
            StoreFailed: when the database refuses.
        """
        # One seek for each job, where GROUP BY would read every event there is.
        rows = await self.database.read(
            "WITH RECURSIVE found (job) AS (SELECT min(job) FROM events UNION ALL"
            " SELECT (SELECT min(job) FROM events WHERE job > found.job) FROM found WHERE found.job IS NOT NULL)"
            " SELECT job, (SELECT at FROM events WHERE events.job = found.job ORDER BY sequence DESC LIMIT 1) AS at"
            " FROM found WHERE job IS NOT NULL"
        )
        return {row["job"]: row["at"] for row in rows}

    async def size_bytes(self) -> int:
        """Of what the log holds. Its file may be larger: room that was freed is used again, and not given back.

        Raises:
            StoreFailed: when the database refuses.
        """
        rows = await self.database.read(
            "SELECT (page_count - freelist_count) * page_size FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
        )
        return int(rows[0][0])

    async def forget(self, job: str) -> int:
        """Delete every event of a job that records no more; returns how many.

        Raises:
            StoreFailed: when the database refuses; the newest ones may be left.
        """

        def transaction(connection: sqlite3.Connection) -> int:
            deleted = connection.execute(
                "DELETE FROM events WHERE job = ?1 AND sequence < (SELECT min(sequence) FROM events WHERE job = ?1) + ?2",
                (job, FORGOTTEN_AT_ONCE),
            ).rowcount
            if not deleted:
                connection.execute("DELETE FROM batches WHERE job = ?", (job,))
            return deleted

        total = 0
        while deleted := await self.database.write(transaction):
            total += deleted
        return total


def event_type(body: Body) -> str:
    """The tag an event's body carries on the wire: its class name."""
    return type(body).__name__


def event_of(row: sqlite3.Row) -> Event:
    """An event as it was recorded.

    Raises:
        StoreFailed: when its body cannot be read.
    """
    try:
        body = msgspec.msgpack.decode(row["body"], type=Body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(
            f"event {row['sequence']} of job {row['job']} ({row['type']}) cannot be read: {error}",
            job=row["job"],
            sequence=row["sequence"],
        ) from error
    return Event(job=row["job"], sequence=row["sequence"], at=row["at"], body=body)
