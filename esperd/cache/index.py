"""Which kernels are on disk: one row per key, with the sealed manifest that names the files."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from esperd.store.database import Database

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE kernels (
        manifest_id TEXT PRIMARY KEY,
        key_digest TEXT NOT NULL UNIQUE,
        manifest BLOB NOT NULL,                -- canonical JSON
        seal BLOB NOT NULL,
        size_bytes INTEGER NOT NULL,
        hits INTEGER NOT NULL,
        created_at REAL NOT NULL,
        last_used_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE quarantined_kernels (
        number INTEGER PRIMARY KEY,
        manifest_id TEXT NOT NULL,
        key_digest TEXT NOT NULL,
        manifest BLOB NOT NULL,
        seal BLOB NOT NULL,
        reason TEXT NOT NULL,
        at REAL NOT NULL
    ) STRICT
    """,
)
"""Schema of the index; only ever append."""


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """What a row says a kernel is: as found, nothing in it is verified."""

    manifest_id: str
    key_digest: str
    manifest: bytes
    seal: bytes


@dataclass(frozen=True, kw_only=True)
class KernelUsage:
    """How a kernel on disk has been used."""

    size_bytes: int
    hits: int
    created_at: float
    last_used_at: float


class KernelIndex:
    """The table of kernels.

    Args:
        database: opened with :data:`MIGRATIONS`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, key_digest: str) -> IndexEntry | None:
        """The row of a key; None when there is none."""
        rows = await self._database.read("SELECT * FROM kernels WHERE key_digest = ?", (key_digest,))
        return _entry(rows[0]) if rows else None

    async def rows(self) -> list[tuple[IndexEntry, KernelUsage]]:
        """Every kernel, the last used first."""
        rows = await self._database.read("SELECT * FROM kernels ORDER BY last_used_at DESC, rowid")
        return [(_entry(row), _usage(row)) for row in rows]

    async def add(self, entry: IndexEntry, size_bytes: int, now: float) -> None:
        """Write the row of a kernel whose files are on disk already; it replaces an older one of the same key."""

        def transaction(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO kernels (manifest_id, key_digest, manifest, seal, size_bytes, hits, created_at,"
                " last_used_at) VALUES (?, ?, ?, ?, ?, 0, ?, ?)",
                (entry.manifest_id, entry.key_digest, entry.manifest, entry.seal, size_bytes, now, now),
            )

        await self._database.write(transaction)

    async def count_hit(self, manifest_id: str, now: float) -> None:
        """One more use without compiling."""

        def transaction(connection: sqlite3.Connection) -> None:
            connection.execute("UPDATE kernels SET hits = hits + 1, last_used_at = ? WHERE manifest_id = ?", (now, manifest_id))

        await self._database.write(transaction)

    async def quarantine(self, entry: IndexEntry, reason: str, now: float) -> None:
        """Take exactly this row out of use, and keep it with the reason as evidence; one that was replaced stays."""

        def transaction(connection: sqlite3.Connection) -> None:
            removed = connection.execute(
                "DELETE FROM kernels WHERE key_digest = ? AND manifest_id = ? AND manifest = ? AND seal = ?",
                (entry.key_digest, entry.manifest_id, entry.manifest, entry.seal),
            ).rowcount
            if removed:
                connection.execute(
                    "INSERT INTO quarantined_kernels (manifest_id, key_digest, manifest, seal, reason, at)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (entry.manifest_id, entry.key_digest, entry.manifest, entry.seal, reason, now),
                )

        await self._database.write(transaction)


def _entry(row: sqlite3.Row) -> IndexEntry:
    return IndexEntry(manifest_id=row["manifest_id"], key_digest=row["key_digest"], manifest=row["manifest"], seal=row["seal"])


def _usage(row: sqlite3.Row) -> KernelUsage:
    return KernelUsage(
        size_bytes=row["size_bytes"], hits=row["hits"], created_at=row["created_at"], last_used_at=row["last_used_at"]
    )
