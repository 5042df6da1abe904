from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from esperd.errors import StoreFailed
from esperd.store.database import Database
from esperd.testing import until

NOTES = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE) STRICT"


def insert(text):
    def transaction(connection: sqlite3.Connection) -> int:
        return connection.execute("INSERT INTO notes (text) VALUES (?)", (text,)).lastrowid or 0

    return transaction


async def texts(database: Database) -> list[str]:
    return [row["text"] for row in await database.read("SELECT text FROM notes ORDER BY id")]


@pytest.mark.asyncio
async def test_what_was_written_is_read_at_once_and_after_reopening(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        assert await database.write(insert("one")) == 1
        assert await texts(database) == ["one"]
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        assert await texts(database) == ["one"]


@pytest.mark.asyncio
@pytest.mark.parametrize(("synchronous", "level"), [("FULL", 2), ("NORMAL", 1)])
async def test_the_pragmas_are_the_promised_ones(tmp_path, synchronous, level):
    async with Database.open(tmp_path / "a.db", [NOTES], synchronous=synchronous) as database:
        pragmas = ["journal_mode", "synchronous", "foreign_keys"]
        values = await database.write(lambda c: [c.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas])
    assert values == ["wal", level, 1]


@pytest.mark.asyncio
async def test_transactions_that_wait_together_are_committed_together(tmp_path):
    commits = []
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        await database.write(lambda c: c.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None))
        commits.clear()
        await asyncio.gather(*(database.write(insert(f"n{number}")) for number in range(100)))
        assert len(commits) < 5
        assert len(await texts(database)) == 100


@pytest.mark.asyncio
async def test_a_failing_transaction_rolls_back_only_itself_and_raises_to_its_caller(tmp_path):
    def failing(connection):
        insert("half")(connection)
        raise ZeroDivisionError("mine")

    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        results = await asyncio.gather(
            database.write(insert("before")),
            database.write(failing),
            database.write(insert("after")),
            return_exceptions=True,
        )
        assert isinstance(results[1], ZeroDivisionError)
        assert await texts(database) == ["before", "after"]


@pytest.mark.asyncio
async def test_what_sqlite_refuses_is_a_store_failure_that_names_the_file(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        await database.write(insert("same"))
        with pytest.raises(StoreFailed, match=r"a\.db: UNIQUE constraint failed: notes\.text"):
            await database.write(insert("same"))
        with pytest.raises(StoreFailed, match="no such table"):
            await database.read("SELECT * FROM absent")


@pytest.mark.asyncio
async def test_readers_cannot_write(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        with pytest.raises(StoreFailed, match="readonly"):
            await database.read("INSERT INTO notes (text) VALUES ('x')")


@pytest.mark.asyncio
async def test_a_transaction_that_ends_its_group_fails_the_group_and_not_the_database(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        results = await asyncio.gather(
            database.write(insert("innocent")), database.write(lambda c: c.execute("ROLLBACK")), return_exceptions=True
        )
        assert all(isinstance(result, StoreFailed) for result in results)
        await database.write(insert("next"))
        assert await texts(database) == ["next"]


@pytest.mark.asyncio
async def test_a_full_database_refuses_writes_serves_reads_and_recovers(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        await database.write(insert("kept"))
        pages = await database.write(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        await database.write(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchone())
        with pytest.raises(StoreFailed, match="SQLITE_FULL"):
            await database.write(insert("x" * 100_000))
        assert await texts(database) == ["kept"]
        await database.write(lambda c: c.execute("PRAGMA max_page_count = 1000000").fetchone())
        await database.write(insert("again"))
        assert await texts(database) == ["kept", "again"]


@pytest.mark.asyncio
async def test_a_cancelled_caller_does_not_disturb_the_others(tmp_path):
    began, go_on = threading.Event(), threading.Event()

    def slow(connection):
        began.set()
        go_on.wait(10)
        insert("slow")(connection)

    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        running = asyncio.create_task(database.write(slow))
        await asyncio.to_thread(began.wait, 10)
        never_begun = asyncio.create_task(database.write(insert("never begun")))
        other = asyncio.create_task(database.write(insert("other")))
        await asyncio.sleep(0)
        running.cancel()
        never_begun.cancel()
        go_on.set()
        await other
        assert await texts(database) == ["slow", "other"]


@pytest.mark.asyncio
async def test_what_waits_at_close_is_committed_and_later_calls_are_refused(tmp_path):
    threads = threading.active_count()
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        late = asyncio.create_task(database.write(insert("late")))
        await asyncio.sleep(0)
    await late
    with pytest.raises(StoreFailed, match="closed"):
        await database.write(insert("too late"))
    with pytest.raises(StoreFailed, match="closed"):
        await database.read("SELECT 1")

    async def threads_ended():
        return threading.active_count() == threads

    await until(threads_ended)  # each answers its close before it ends
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        assert await texts(database) == ["late"]


@pytest.mark.asyncio
async def test_the_error_of_the_block_leaves_it_unwrapped(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        async with Database.open(tmp_path / "a.db", [NOTES]):
            raise KeyError("mine")


@pytest.mark.asyncio
async def test_an_older_database_is_migrated_and_keeps_its_rows(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        await database.write(insert("old"))
    added = "ALTER TABLE notes ADD COLUMN stars INTEGER NOT NULL DEFAULT 5; CREATE INDEX by_stars ON notes (stars)"
    async with Database.open(tmp_path / "a.db", [NOTES, added]) as database:
        assert [tuple(row) for row in await database.read("SELECT text, stars FROM notes")] == [("old", 5)]


@pytest.mark.asyncio
async def test_a_failing_migration_leaves_the_database_as_it_was(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        await database.write(insert("old"))
    broken = "CREATE TABLE extra (x INTEGER) STRICT; CREATE TABLE notes (x INTEGER) STRICT"
    with pytest.raises(StoreFailed, match="from version 1 to 2: table notes already exists; it is unchanged"):
        async with Database.open(tmp_path / "a.db", [NOTES, broken]):
            pass
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        assert await texts(database) == ["old"]
        assert not await database.read("SELECT 1 FROM sqlite_master WHERE name = 'extra'")


@pytest.mark.asyncio
async def test_a_database_of_a_newer_esperd_is_refused(tmp_path):
    async with Database.open(tmp_path / "a.db", [NOTES, "CREATE TABLE later (x INTEGER) STRICT"]):
        pass
    with pytest.raises(StoreFailed, match="has version 2, newer than the 1 this esperd knows; upgrade esperd"):
        async with Database.open(tmp_path / "a.db", [NOTES]):
            pass


@pytest.mark.asyncio
async def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "a.db").write_bytes(b"certainly not SQLite" * 100)
    with pytest.raises(StoreFailed, match="not a database"):
        async with Database.open(tmp_path / "a.db", [NOTES]):
            pass


@pytest.mark.asyncio
async def test_a_damaged_database_is_refused_at_open(tmp_path):
    path = tmp_path / "a.db"
    async with Database.open(path, [NOTES]) as database:
        for number in range(50):
            await database.write(insert(f"{number}" * 500))
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 4 * 4096] = os.urandom(4096)
    path.write_bytes(content)
    with pytest.raises(StoreFailed, match=r"is damaged|malformed"):
        async with Database.open(path, [NOTES]):
            pass


@pytest.mark.asyncio
async def test_a_missing_directory_is_a_store_failure(tmp_path):
    with pytest.raises(StoreFailed, match="unable to open"):
        async with Database.open(tmp_path / "nowhere" / "a.db", [NOTES]):
            pass


def acknowledged_before_kill(path) -> list[str]:
    program = f"""
import asyncio, pathlib
from esperd.store.database import Database
async def main():
    async with Database.open(pathlib.Path({str(path)!r}), [{NOTES!r}]) as database:
        for number in range(10_000):
            await database.write(lambda c: c.execute("INSERT INTO notes (text) VALUES (?)", (str(number),)))
            print(number, flush=True)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        acknowledged = [process.stdout.readline().strip() for _ in range(20)]
        process.kill()
        return acknowledged + process.stdout.read().split("\n")[:-1]


@pytest.mark.asyncio
async def test_acknowledged_rows_survive_a_killed_process(tmp_path):
    acknowledged = await asyncio.to_thread(acknowledged_before_kill, tmp_path / "a.db")
    async with Database.open(tmp_path / "a.db", [NOTES]) as database:
        assert set(acknowledged) <= set(await texts(database))
