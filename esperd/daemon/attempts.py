"""Every attempt at a job on disk, written in the transactions of the job's own steps: when, under which circumstances."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

import msgspec

from esperd.daemon.job_lifecycle import (
    Broken,
    CheckpointsUnread,
    DaemonRestarted,
    JobEvent,
    Leased,
    Started,
    Stopped,
    Succeeded,
    WorkerLeft,
    WorkerLost,
)
from esperd.errors import StoreFailed
from esperd.messages.failures import Attempt, Ended
from esperd.messages.jobs import JobError

SCHEMA = """
    CREATE TABLE attempts (
        job TEXT NOT NULL REFERENCES jobs (id),
        number INTEGER NOT NULL,               -- generation of the lease
        leased_at REAL NOT NULL,
        started_at REAL,
        ended_at REAL,
        ended TEXT,
        error BLOB,                            -- a JobError, msgpack
        from_epoch INTEGER,
        epoch INTEGER,
        circumstances BLOB NOT NULL,           -- names and values, msgpack
        note TEXT NOT NULL DEFAULT '',
        PRIMARY KEY (job, number)
    ) STRICT, WITHOUT ROWID
    """

_ENDS: Mapping[type[JobEvent], Ended] = {
    Succeeded: "succeeded",
    Broken: "failed",
    WorkerLost: "lost",
    WorkerLeft: "left",
    CheckpointsUnread: "left",
    Stopped: "stopped",
    DaemonRestarted: "daemon_restarted",
}


def record(connection: sqlite3.Connection, row: sqlite3.Row, event: JobEvent, now: float) -> None:
    """Write down what an event means for the attempt it belongs to.

    Args:
        connection: in a transaction.
        row: the job before the event.
        event: what happened.
        now: seconds since the epoch.
    """
    match event:
        case Leased():
            connection.execute(
                "INSERT OR REPLACE INTO attempts (job, number, leased_at, from_epoch, circumstances) VALUES (?, ?, ?, ?, ?)",
                (row["id"], row["generation"] + 1, now, row["epoch"] if row["checkpoint"] else None, msgspec.msgpack.encode({})),
            )
        case Started():
            connection.execute(
                "UPDATE attempts SET started_at = coalesce(started_at, ?) WHERE job = ? AND number = ?",
                (now, row["id"], row["generation"]),
            )
        case _ if (ended := _ENDS.get(type(event))) is not None:
            connection.execute(
                "UPDATE attempts SET ended_at = ?, ended = ?, epoch = ? WHERE job = ? AND number = ?",
                (now, ended, row["epoch"], row["id"], row["generation"]),
            )


def record_error(connection: sqlite3.Connection, row: sqlite3.Row, error: JobError) -> None:
    """Write down what an attempt ended with."""
    connection.execute(
        "UPDATE attempts SET error = ? WHERE job = ? AND number = ?",
        (msgspec.msgpack.encode(error), row["id"], row["generation"]),
    )


def note(connection: sqlite3.Connection, row: sqlite3.Row, text: str) -> None:
    """Write down what else happened in an attempt."""
    connection.execute(
        "UPDATE attempts SET note = note || CASE note WHEN '' THEN '' ELSE '; ' END || ? WHERE job = ? AND number = ?",
        (text, row["id"], row["generation"]),
    )


def unread_in_a_row(connection: sqlite3.Connection, row: sqlite3.Row) -> int:
    """The last attempts at a job, the present one included, that found no checkpoint which can be read: the only ones that ended
    through no fault of the job and still have an error.
    """
    before = connection.execute(
        "SELECT count(*) FROM attempts WHERE job = :job AND number < :now AND number > (SELECT coalesce(max(number), 0)"
        " FROM attempts WHERE job = :job AND number < :now AND NOT (ended IS 'left' AND error IS NOT NULL))",
        {"job": row["id"], "now": row["generation"]},
    ).fetchone()
    return int(before[0]) + 1


def add_circumstances(connection: sqlite3.Connection, row: sqlite3.Row, found: Mapping[str, str]) -> None:
    """Write down what an attempt runs under; what is known already under other names stays."""
    before = connection.execute(
        "SELECT circumstances FROM attempts WHERE job = ? AND number = ?", (row["id"], row["generation"])
    ).fetchone()
    if before is not None and found:
        known = msgspec.msgpack.decode(before["circumstances"], type=dict[str, str])
        connection.execute(
            "UPDATE attempts SET circumstances = ? WHERE job = ? AND number = ?",
            (msgspec.msgpack.encode({**known, **found}), row["id"], row["generation"]),
        )


def of_row(row: sqlite3.Row) -> Attempt:
    """An attempt as it was written.

    Raises:
        StoreFailed: when it cannot be read.
    """
    try:
        return Attempt(
            number=row["number"],
            leased_at=row["leased_at"],
            started_at=row["started_at"],
            ended_at=row["ended_at"],
            ended=msgspec.convert(row["ended"], Ended | None),
            error=msgspec.msgpack.decode(row["error"], type=JobError) if row["error"] is not None else None,
            from_epoch=row["from_epoch"],
            epoch=row["epoch"],
            circumstances=msgspec.msgpack.decode(row["circumstances"], type=dict[str, str]),
            note=row["note"],
        )
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise StoreFailed(f"attempt {row['number']} of job {row['job']} cannot be read: {error}", id=row["job"]) from error
