"""Tries of every job, durable: recorded with the answer that was given when they ended, and read by later jobs as a snapshot."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from fnmatch import fnmatchcase
from typing import TypeVar

import anyio.to_thread
import msgspec

from esperd.errors import StoreFailed
from esperd.messages.evidence import EvidenceSnapshot, Precedent, TriedSeed
from esperd.messages.policy import Conclude, Decide, Decided
from esperd.policy.precedents import precedents_of
from esperd.policy.tracking import Book, conclude, decode_book, follow, undone
from esperd.store.clock import Clock
from esperd.store.database import Database

T = TypeVar("T")

TABLES = """
    CREATE TABLE books (
        job TEXT NOT NULL PRIMARY KEY,
        book BLOB NOT NULL
    ) STRICT;
    CREATE TABLE tries (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        job TEXT NOT NULL,
        blueprint TEXT NOT NULL,
        topology TEXT NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX tries_by_kind ON tries (blueprint, topology, number);
    CREATE TABLE snapshots (
        job TEXT NOT NULL PRIMARY KEY,
        told BLOB NOT NULL,
        precedents BLOB NOT NULL,
        taken_at REAL NOT NULL
    ) STRICT
"""
"""Tries that are not over yet, tries that are, and what each job was given. A topology that is not known is empty text."""

MOST_KEPT = 200
"""Newest tries that are kept of each blueprint and topology: with a half-life of 20 an older one would count a thousandth.
Chosen, not measured."""


class EvidenceStore:
    """The tables of :data:`TABLES`, in the database of the decision log.

    Args:
        database: holds the tables.
        clock: for the record only.
    """

    def __init__(self, database: Database, clock: Clock = time.time) -> None:
        self._database = database
        self._clock = clock

    def record(self, connection: sqlite3.Connection, request: Decide, answer: Decided) -> None:
        """Keep the tries that had ended at this point, in place of earlier ends of the same seeds. Part of the transaction that
        logs the answer: recorded once, with it.

        Args:
            connection: of the transaction.
            request: the decision point.
            answer: as it was logged.

        Raises:
            StoreFailed: when what is kept about the job's tries cannot be read.
        """
        book = _book(connection, request.job)
        self._keep(connection, request.job, book, *follow(book, request, answer, self._clock()))

    async def conclude(self, ending: Conclude) -> None:
        """Keep the tries that the last decisions of a job ended; durable on return. Said again, it is kept once.

        Raises:
            StoreFailed: when they cannot be kept, or what is kept about the job's tries cannot be read.
        """

        def close(connection: sqlite3.Connection) -> None:
            book = _book(connection, ending.job)
            self._keep(connection, ending.job, book, *conclude(book, ending, self._clock()))

        await self._database.write(close)

    def _keep(self, connection: sqlite3.Connection, job: str, before: Book, book: Book, tried: tuple[TriedSeed, ...]) -> None:
        if book is before:
            return
        _withdraw(connection, job, undone(before, book, tried))
        connection.execute("INSERT OR REPLACE INTO books VALUES (?, ?)", (job, book.encode()))
        for one in tried:
            kind = (one.blueprint, one.topology or "")
            connection.execute(
                "INSERT INTO tries (job, blueprint, topology, record) VALUES (?, ?, ?, ?)",
                (one.job, *kind, msgspec.msgpack.encode(one)),
            )
            connection.execute(
                "DELETE FROM tries WHERE number IN (SELECT number FROM tries WHERE blueprint = ? AND topology = ? "
                "ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (*kind, MOST_KEPT),
            )

    async def snapshot(self, job: str) -> tuple[tuple[Precedent, ...], EvidenceSnapshot]:
        """What a job is given of other jobs: taken when it is first asked for, and the same ever after.

        Raises:
            StoreFailed: when it cannot be read or kept.
        """
        kept = await self._kept_snapshot(job)
        if kept is not None:
            return kept
        rows = await self._database.read("SELECT record FROM tries WHERE job != ? ORDER BY number", (job,))
        told, encoded = await anyio.to_thread.run_sync(_take, [row["record"] for row in rows])
        row = (job, msgspec.msgpack.encode(told), encoded, self._clock())
        await self._database.write(
            lambda connection: connection.execute("INSERT INTO snapshots VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row).close()
        )
        kept = await self._kept_snapshot(job)
        if kept is None:
            raise StoreFailed(f"the evidence given to job {job} was not kept", job=job)
        return kept

    async def tries(self, blueprint: str = "*", job: str | None = None) -> list[TriedSeed]:
        """Tries that are over, oldest first.

        Args:
            blueprint: a name or a shell pattern.
            job: of this job only; None: of every job.

        Raises:
            StoreFailed: when they cannot be read.
        """
        asked = "SELECT blueprint, record FROM tries WHERE ?1 IS NULL OR job = ?1 ORDER BY number"
        rows = await self._database.read(asked, (job,))
        return [_decoded(row["record"], TriedSeed) for row in rows if fnmatchcase(row["blueprint"], blueprint)]

    async def forget(self, blueprint: str) -> int:
        """Delete tries; durable on return. Snapshots that were given stay as they are.

        Args:
            blueprint: a name or a shell pattern.

        Returns:
            How many are gone.

        Raises:
            StoreFailed: when they cannot be deleted.
        """

        def delete(connection: sqlite3.Connection) -> int:
            names = [row["blueprint"] for row in connection.execute("SELECT DISTINCT blueprint FROM tries")]
            matching = [name for name in names if fnmatchcase(name, blueprint)]
            return sum(connection.execute("DELETE FROM tries WHERE blueprint = ?", (name,)).rowcount for name in matching)

        return await self._database.write(delete)

    async def _kept_snapshot(self, job: str) -> tuple[tuple[Precedent, ...], EvidenceSnapshot] | None:
        rows = await self._database.read("SELECT told, precedents FROM snapshots WHERE job = ?", (job,))
        if not rows:
            return None
        told, encoded = _decoded(rows[0]["told"], EvidenceSnapshot), rows[0]["precedents"]
        digest = hashlib.sha256(encoded).hexdigest()
        if digest != told.sha256:
            raise StoreFailed(f"the evidence given to job {job} is damaged: its hash is {digest}, not {told.sha256}", job=job)
        return _decoded(encoded, tuple[Precedent, ...]), told


def _book(connection: sqlite3.Connection, job: str) -> Book:
    row = connection.execute("SELECT book FROM books WHERE job = ?", (job,)).fetchone()
    return decode_book(b"" if row is None else row["book"], job)


def _withdraw(connection: sqlite3.Connection, job: str, seeds: frozenset[str]) -> None:
    """Delete the records of these seeds of a job, as far as they are kept still."""
    if not seeds:
        return
    rows = connection.execute("SELECT number, record FROM tries WHERE job = ?", (job,)).fetchall()
    for row in rows:
        if _decoded(row["record"], TriedSeed).seed in seeds:
            connection.execute("DELETE FROM tries WHERE number = ?", (row["number"],))


def _take(records: list[bytes]) -> tuple[EvidenceSnapshot, bytes]:
    tried = [_decoded(record, TriedSeed) for record in records]
    precedents = precedents_of(tried)
    encoded = msgspec.msgpack.encode(precedents, order="deterministic")
    told = EvidenceSnapshot(
        sha256=hashlib.sha256(encoded).hexdigest(),
        precedents=len(precedents),
        tries=len(tried),
        jobs=len({one.job for one in tried}),
    )
    return told, encoded


def _decoded(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"a record of the evidence cannot be read: {error}; `esper evidence --forget` deletes it") from error
