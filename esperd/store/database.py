"""One SQLite file, one writer: whole transactions as functions, committed in groups, durable before they are acknowledged.

A commit with ``synchronous=FULL`` costs 4-8 ms on a common disk, a one-row transaction without it 13 µs (measured), so
everything that waits is committed together. There is exactly one connection that writes and checkpoints: SQLite before
3.51.3 can corrupt a write-ahead log that several connections checkpoint at once.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiosqlite
import anyio
import anyio.to_thread

from esperd.errors import StoreFailed
from esperd.store.refusal import Refusal, refusal_of

Synchronous = Literal["FULL", "NORMAL"]
Parameters = Sequence[Any] | Mapping[str, Any]
T = TypeVar("T")

BUSY_TIMEOUT_MS = 5_000
"""How long a statement waits for another process's lock (a backup, a shell); chosen, not measured."""
PAGE_CACHE_KIB = 512
"""Of each connection, of which a daemon has eight. SQLite's own 2,000 KiB made a daemon grow by 8 MiB over its first 2,000 jobs
(``bench/soak.py``); what falls out is read again from the kernel's cache.
"""
JOURNAL_SIZE_LIMIT_BYTES = 16 * 1024 * 1024
"""To which size the write-ahead log is cut after a checkpoint; chosen, not measured."""
LARGEST_GROUP = 256
"""Transactions in one commit at most, so that the first of them does not wait for the last; chosen, not measured."""

HOW_TO_RESTORE = (
    "restore the last backup with `esperd db restore BACKUP --force`, or move the file away to start anew, without what it held"
)
"""What to do about a damaged file."""
RACY_BEFORE = (3, 51, 3)
"""The first SQLite whose write-ahead log cannot be corrupted by two connections that checkpoint at once (the WAL-reset bug)."""


@dataclass(frozen=True)
class _Refused:
    """A transaction's function raised; it alone was rolled back."""

    error: Exception


class _Waiting:
    """A transaction and whoever waits for it."""

    __slots__ = ("answer", "function")

    def __init__(self, function: Callable[[sqlite3.Connection], Any], answer: asyncio.Future[Any]) -> None:
        self.function = function
        self.answer = answer


def _nobody_counts(_seconds: float) -> None:
    """Seconds of commits go uncounted."""


class Database:
    """An open database. Made by :meth:`open`."""

    def __init__(
        self,
        path: Path,
        writer: aiosqlite.Connection,
        reader: aiosqlite.Connection,
        on_refused: Callable[[Refusal, str], None] | None = None,
    ) -> None:
        self.path = path
        self._on_refused = on_refused
        self._writer = writer
        self._reader = reader
        # Bounded by the tasks that exist: each waits for its own transaction.
        self._waiting: deque[_Waiting] = deque()
        self._something_waits = asyncio.Event()
        self._closing = False
        self.on_commit: Callable[[float], None] = _nobody_counts
        """Told how many seconds each commit took, failed ones included; on the event loop. Must not raise."""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        path: Path,
        migrations: Sequence[str],
        synchronous: Synchronous = "FULL",
        on_refused: Callable[[Refusal, str], None] | None = None,
    ) -> AsyncIterator[Database]:
        """Open, check and migrate a database; close it at the end of the block, after what was asked is committed.

        Args:
            path: the file, created when missing; its directory must exist.
            migrations: SQL scripts, oldest first; the i-th brings a database from version i to i+1, in one transaction.
                Only ever append to the list. No script may contain transaction statements.
            synchronous: ``FULL``: what is acknowledged survives a power loss; ``NORMAL``: it survives a killed process.
            on_refused: called, in the event loop, whenever the disk did not take a transaction, with what SQLite said.

        Raises:
            StoreFailed: when the file cannot be opened, is damaged, was written by a newer version, or a migration fails.
        """
        writer = await _connect(path, lambda connection: _prepare_writer(connection, path, migrations, synchronous))
        try:
            reader = await _connect(path, _prepare_reader)
            try:
                database = cls(path, writer, reader, on_refused)
                writing = asyncio.create_task(database._write_groups(), name=f"writer of {path.name}")
                try:
                    yield database
                finally:
                    with anyio.CancelScope(shield=True):
                        database._closing = True
                        database._something_waits.set()
                        await writing
            finally:
                with anyio.CancelScope(shield=True):
                    await reader.close()
        finally:
            with anyio.CancelScope(shield=True):
                await writer.close()

    async def write(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run one whole transaction on the writer's thread; returns what ``function`` returned, once it is committed.

        Whatever ``function`` raises rolls back its own statements only and is raised here. A caller that is cancelled
        while waiting does not know whether its transaction was committed.

        Args:
            function: takes the connection; may execute any statements but those that begin or end transactions.

        Raises:
            StoreFailed: when SQLite refuses, the commit fails, or the database is closed.
        """
        if self._closing:
            raise StoreFailed(f"{self.path} is closed: nothing can be written any more", path=str(self.path))
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(function, answer))
        self._something_waits.set()
        try:
            return await answer
        except sqlite3.Error as error:
            failed = _store_failed(self.path, error)
            if self._on_refused is not None and (refusal := refusal_of(error)) is not None:
                self._on_refused(refusal, failed.message)
            raise failed from error

    async def read(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        """Rows of one SELECT, from the last commit. The connection cannot write.

        Raises:
            StoreFailed: when SQLite refuses or the database is closed.
        """
        if self._closing:
            raise StoreFailed(f"{self.path} is closed: nothing can be read any more", path=str(self.path))
        try:
            return list(await self._reader.execute_fetchall(sql, parameters))
        except sqlite3.Error as error:
            raise _store_failed(self.path, error) from error

    async def prove(self) -> None:
        """A commit like any other, with its wait for the disk, that changes nothing: the version is written as it stands.

        Raises:
            StoreFailed: see :meth:`write`.
        """

        def write_version_again(connection: sqlite3.Connection) -> None:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            connection.execute(f"PRAGMA user_version = {version}")

        await self.write(write_version_again)

    async def _write_groups(self) -> None:
        """The writer: takes what waits, commits it, answers; ends when closing and nothing waits."""
        while True:
            await self._something_waits.wait()
            group = self._take_group()
            if group:
                await self._commit(group)
            elif self._closing:
                return
            else:
                self._something_waits.clear()

    def _take_group(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        while self._waiting and len(group) < LARGEST_GROUP:
            waiting = self._waiting.popleft()
            if not waiting.answer.done():  # its caller was cancelled before it began
                group.append(waiting)
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        functions = [waiting.function for waiting in group]
        began = time.perf_counter()
        try:
            outcomes = await _on_thread(self._writer, lambda connection: _run_group(connection, functions))
        except Exception as error:  # noqa: BLE001 - the group failed as a whole; each caller is told
            outcomes = [_Refused(error)] * len(group)
        self.on_commit(time.perf_counter() - began)
        for waiting, outcome in zip(group, outcomes, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(outcome, _Refused):
                waiting.answer.set_exception(outcome.error)
            else:
                waiting.answer.set_result(outcome)


def _run_group(connection: sqlite3.Connection, functions: list[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
    """One commit for several transactions; returns their values, or :class:`_Refused` for those that raised.

    Raises:
        sqlite3.Error: when the group could not be begun or committed; nothing of it was kept.
        StoreFailed: when a function ended the transaction.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        outcomes = [_run_one(connection, function) for function in functions]
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return outcomes


def _run_one(connection: sqlite3.Connection, function: Callable[[sqlite3.Connection], Any]) -> Any:  # noqa: ANN401
    connection.execute("SAVEPOINT one")
    try:
        value = function(connection)
    except Exception as error:
        if not connection.in_transaction:  # a full disk makes SQLite roll back the whole group by itself
            raise
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return _Refused(error)
    if not connection.in_transaction:
        raise StoreFailed(f"{function!r} ended the transaction it was part of")
    connection.execute("RELEASE one")
    return value


async def _connect(path: Path, prepare: Callable[[sqlite3.Connection], None]) -> aiosqlite.Connection:
    # isolation_level None: Python's sqlite3 begins no transactions of its own.
    connection = aiosqlite.connect(path, isolation_level=None)
    try:
        await connection
    except sqlite3.Error as error:
        # aiosqlite leaves its thread to end by itself, which must not outlive the event loop that it answers to.
        await anyio.to_thread.run_sync(connection._thread.join)
        raise _store_failed(path, error) from error
    try:
        await _on_thread(connection, prepare)
    except sqlite3.Error as error:
        await connection.close()
        raise _store_failed(path, error) from error
    except BaseException:
        with anyio.CancelScope(shield=True):
            await connection.close()
        raise
    return connection


async def _on_thread(connection: aiosqlite.Connection, function: Callable[[sqlite3.Connection], T]) -> T:
    """Run a function on the connection's thread, in one hop.

    The only use of aiosqlite's private names: its public methods cost one hop per statement (212 µs against 76 µs for three
    statements, measured), and transactions of several hops interleave between tasks.
    """
    return await connection._execute(function, connection._conn)  # type: ignore[no-any-return,no-untyped-call]


def _prepare_writer(connection: sqlite3.Connection, path: Path, migrations: Sequence[str], synchronous: Synchronous) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute(f"PRAGMA cache_size = {-PAGE_CACHE_KIB}")  # negative: in KiB
    connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_SIZE_LIMIT_BYTES}")
    faults = [str(row[0]) for row in connection.execute("PRAGMA quick_check(10)")]
    if faults != ["ok"]:
        raise StoreFailed(f"{path} is damaged: {'; '.join(faults)}; {HOW_TO_RESTORE}", path=str(path), faults=faults)
    _migrate(connection, path, migrations)


def _prepare_reader(connection: sqlite3.Connection) -> None:
    connection.row_factory = sqlite3.Row
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute(f"PRAGMA cache_size = {-PAGE_CACHE_KIB}")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    connection.execute("PRAGMA query_only = ON")


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(migrations):
        raise StoreFailed(
            f"{path} has version {version}, newer than the {len(migrations)} this esperd knows; upgrade esperd, or use "
            "another state directory",
            path=str(path),
            found=version,
            known=len(migrations),
        )
    for target, script in enumerate(migrations[version:], start=version + 1):
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script};\nPRAGMA user_version = {target};\nCOMMIT;")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise StoreFailed(
                f"{path} could not be brought from version {target - 1} to {target}: {error}; it is unchanged",
                path=str(path),
                version=target,
            ) from error


def is_damage(error: StoreFailed) -> bool:
    """Whether a file could not be opened because of what is in it, and not because of whoever opened it."""
    return "faults" in error.fields or _is_damage(error.fields.get("sqlite"))


def _is_damage(sqlite: object) -> bool:
    return isinstance(sqlite, str) and (sqlite == "SQLITE_NOTADB" or sqlite.startswith("SQLITE_CORRUPT"))


def _store_failed(path: Path, error: sqlite3.Error) -> StoreFailed:
    name = getattr(error, "sqlite_errorname", None)
    if _is_damage(name):
        return StoreFailed(f"{path} is damaged: {error} ({name}); {HOW_TO_RESTORE}", path=str(path), sqlite=name)
    return StoreFailed(f"{path}: {error}{f' ({name})' if name else ''}", path=str(path), sqlite=name)
