"""Searching the event log: by job, type and time, a page at a time, each along an index."""

from __future__ import annotations

import sqlite3
from typing import Any

from esperd.messages.telemetry import EventsFound, FindEvents, Place
from esperd.store.database import Database
from esperd.telemetry.log import LARGEST_PAGE, event_of

_COLUMNS = "job, sequence, at, type, body, number"


class EventSearch:
    """Finds events in a log's database.

    Args:
        database: of an :class:`~esperd.telemetry.log.EventLog`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, asked: FindEvents) -> EventsFound:
        """A page: at most ``limit`` events and at most :data:`~esperd.telemetry.log.LARGEST_PAGE`.

        Raises:
            StoreFailed: when the database refuses, or holds an event that cannot be read.
        """
        limit = min(asked.limit, LARGEST_PAGE)
        if asked.recorded_after is not None:
            return await self._recorded_after(asked, asked.recorded_after, limit)
        recorded = asked.recorded_until
        if recorded is None:
            recorded = int((await self._database.read("SELECT last FROM numbering"))[0]["last"])
        rows = await self._database.read(*_in_order_of_time(asked, recorded, limit + 1))
        page = rows[:limit]
        more = len(rows) > limit
        return EventsFound(
            events=tuple(map(event_of, page)),
            next=Place(at=page[-1]["at"], number=page[-1]["number"]) if more else None,
            recorded=recorded,
        )

    async def _recorded_after(self, asked: FindEvents, number: int, limit: int) -> EventsFound:
        where, parameters = _conditions(asked, asked.types)
        rows = await self._database.read(
            f"SELECT {_COLUMNS} FROM events WHERE number > ?{where} ORDER BY number LIMIT ?",  # noqa: S608 - our own words
            (number, *parameters, limit),
        )
        last: sqlite3.Row | None = rows[-1] if rows else None
        return EventsFound(events=tuple(map(event_of, rows)), next=None, recorded=number if last is None else last["number"])


def _in_order_of_time(asked: FindEvents, recorded: int, limit: int) -> tuple[str, tuple[Any, ...]]:
    """A query that reads an index in its own order: no more rows than it returns, but for those of other types in one job.

    Without a job each type is read along its own index, ``limit`` rows of each, and merged: SQLite would sort all of them.
    """
    kinds: list[tuple[str, ...]] = [(name,) for name in sorted(set(asked.types))] if asked.job is None else [asked.types]
    parts: list[str] = []
    parameters: list[Any] = []
    for types in kinds or [()]:
        where, values = _conditions(asked, types)
        if asked.after is not None:
            where += " AND (at, number) > (?, ?)"
            values = (*values, asked.after.at, asked.after.number)
        query = f"SELECT {_COLUMNS} FROM events WHERE number <= ?{where} ORDER BY at, number LIMIT ?"  # noqa: S608 - our own words
        parts.append(query)
        parameters += [recorded, *values, limit]
    if len(parts) == 1:
        return parts[0], tuple(parameters)
    merged = " UNION ALL ".join(f"SELECT * FROM ({part})" for part in parts)  # noqa: S608 - the same
    return f"{merged} ORDER BY at, number LIMIT ?", (*parameters, limit)


def _conditions(asked: FindEvents, types: tuple[str, ...]) -> tuple[str, tuple[Any, ...]]:
    """What is asked of job, time and type, each beginning with AND."""
    words: list[str] = []
    values: list[Any] = []
    for word, value in (("job = ?", asked.job), ("at >= ?", asked.since), ("at < ?", asked.until)):
        if value is not None:
            words.append(word)
            values.append(value)
    if types:
        words.append(f"type IN ({', '.join('?' * len(types))})")
        values += types
    return "".join(f" AND {word}" for word in words), tuple(values)
