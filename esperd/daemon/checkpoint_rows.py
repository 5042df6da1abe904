"""Which checkpoints a job's row refers to: the one it goes on from, and one more that it goes on from should that one fail.

The one it goes on from is the newer one, unless that could not be read: then the older one took its place, and the newer one
stays beside it, because it may be readable again. Once another one is written, nothing refers to it any more.
"""

from __future__ import annotations

import sqlite3

from esperd.daemon import attempts
from esperd.daemon.job_rows import row_of
from esperd.messages.jobs import JobInfo

KEPT = "SELECT id, checkpoint, previous_checkpoint FROM jobs WHERE state NOT IN (?, ?)"
"""Of every job that is not in one of two states, also one whose row only another esperd understands."""


def newest_first(info: JobInfo) -> list[str]:
    """The checkpoints of a job, the one that was written last first."""
    named = [(info.checkpoint, info.epoch), (info.previous_checkpoint, info.previous_epoch)]
    found = [(sha256, -1 if epoch is None else epoch) for sha256, epoch in named if sha256 is not None]
    # The order is kept where both are of one epoch: nothing tells then which is newer.
    return [sha256 for sha256, _ in sorted(found, key=lambda each: each[1], reverse=True)]


def record(connection: sqlite3.Connection, row: sqlite3.Row, sha256: str, epoch: int) -> None:
    """A checkpoint was written: it is the one to go on from; beside it stays the one its attempt went on from, or wrote last."""
    connection.execute(
        "UPDATE jobs SET previous_checkpoint = iif(checkpoint = :new, previous_checkpoint, checkpoint),"
        " previous_epoch = iif(checkpoint = :new, previous_epoch, epoch), checkpoint = :new, epoch = :epoch"
        " WHERE number = :number",
        {"new": sha256, "epoch": epoch, "number": row["number"]},
    )


def drop(connection: sqlite3.Connection, row: sqlite3.Row, damaged: str) -> None:
    """A checkpoint does not verify: the job goes on from the other one, or begins anew where there is none. Nothing happens when
    the row does not name it any more.
    """
    if damaged == row["checkpoint"]:
        epoch = row["epoch"]
        connection.execute(
            "UPDATE jobs SET checkpoint = previous_checkpoint, epoch = previous_epoch, previous_checkpoint = NULL,"
            " previous_epoch = NULL WHERE number = ?",
            (row["number"],),
        )
    elif damaged == row["previous_checkpoint"]:
        epoch = row["previous_epoch"]
        connection.execute(
            "UPDATE jobs SET previous_checkpoint = NULL, previous_epoch = NULL WHERE number = ?",
            (row["number"],),
        )
    else:
        return
    _note(connection, row, f"checkpoint {damaged} of epoch {epoch} did not verify")


def prefer(connection: sqlite3.Connection, row: sqlite3.Row, sha256: str, because: str) -> None:
    """The job goes on from the other one of its checkpoints. Nothing happens when ``sha256`` is not the other one."""
    if sha256 != row["previous_checkpoint"]:
        return
    connection.execute(
        "UPDATE jobs SET checkpoint = previous_checkpoint, epoch = previous_epoch, previous_checkpoint = checkpoint,"
        " previous_epoch = epoch WHERE number = ?",
        (row["number"],),
    )
    _note(connection, row, because)


def _note(connection: sqlite3.Connection, row: sqlite3.Row, happened: str) -> None:
    """Write down, with the attempt, what happened and where it goes on from now."""
    after = row_of(connection, row["id"])
    connection.execute(
        "UPDATE attempts SET from_epoch = ? WHERE job = ? AND number = ?",
        (after["epoch"] if after["checkpoint"] else None, row["id"], row["generation"]),
    )
    goes_on = "begins anew" if after["checkpoint"] is None else f"goes on from epoch {after['epoch']}"
    attempts.note(connection, row, f"{happened}: the job {goes_on}")
