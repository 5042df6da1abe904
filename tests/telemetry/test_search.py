from __future__ import annotations

import contextlib
import sqlite3

import msgspec
import pytest

from esperd.actors.codec import Codec, Kind
from esperd.errors import MalformedMessage, UnknownName
from esperd.messages.telemetry import EVENT_TYPES, CheckpointSaved, ExportFailed, FindEvents, NewEvent, Place
from esperd.plugins import Plugins
from esperd.store.database import Database
from esperd.telemetry.actor import TelemetryActor
from esperd.telemetry.log import MIGRATIONS, EventLog
from esperd.telemetry.metrics import Metrics
from esperd.telemetry.search import EventSearch, _in_order_of_time


def saved(at: float) -> NewEvent:
    return NewEvent(at=at, body=CheckpointSaved(epoch=1, sha256="a" * 64, size_bytes=1, seconds=0.1))


def failed(at: float) -> NewEvent:
    return NewEvent(at=at, body=ExportFailed(directory="/full", reason="no space"))


@contextlib.asynccontextmanager
async def searching(path):
    """A log of two jobs, told in another order than it happened."""
    async with Database.open(path, MIGRATIONS, "NORMAL") as database:
        log = EventLog(database)
        await log.append("j1", "1", [saved(10.0), failed(30.0)])
        await log.append("j2", "1", [saved(20.0), saved(40.0)])
        await log.append("j1", "2", [failed(50.0)])
        yield log, EventSearch(database)


async def pages(search, asked):
    """Times of the events of each page."""
    page = await search.find(asked)
    found = [[event.at for event in page.events]]
    while page.next is not None:
        asked = msgspec.structs.replace(asked, after=page.next, recorded_until=page.recorded)
        page = await search.find(asked)
        found.append([event.at for event in page.events])
    return found


@pytest.mark.asyncio
async def test_events_of_all_jobs_come_in_the_order_of_time_by_job_type_and_time(tmp_path):
    async with searching(tmp_path / "t.db") as (_, search):
        assert await pages(search, FindEvents()) == [[10.0, 20.0, 30.0, 40.0, 50.0]]
        assert await pages(search, FindEvents(job="j1")) == [[10.0, 30.0, 50.0]]
        assert await pages(search, FindEvents(types=("ExportFailed",))) == [[30.0, 50.0]]
        assert await pages(search, FindEvents(types=("ExportFailed", "CheckpointSaved"), since=20.0, until=40.0)) == [
            [20.0, 30.0]
        ]
        assert await pages(search, FindEvents(job="j1", types=("CheckpointSaved",))) == [[10.0]]
        assert await pages(search, FindEvents(job="j3")) == [[]]


@pytest.mark.parametrize("types", [(), ("ExportFailed", "CheckpointSaved")])
@pytest.mark.asyncio
async def test_pages_follow_each_other_and_what_is_recorded_meanwhile_comes_afterwards(tmp_path, types):
    async with searching(tmp_path / "t.db") as (log, search):
        asked = FindEvents(limit=2, types=types)
        first = await search.find(asked)
        await log.append("j3", "1", [saved(25.0), saved(60.0)])
        rest = await pages(search, msgspec.structs.replace(asked, after=first.next, recorded_until=first.recorded))
        assert [[event.at for event in first.events], *rest] == [[10.0, 20.0], [30.0, 40.0], [50.0]]
        later = await search.find(msgspec.structs.replace(asked, recorded_after=first.recorded))
        assert [event.at for event in later.events] == [25.0, 60.0]
        nothing = await search.find(msgspec.structs.replace(asked, recorded_after=later.recorded))
        assert (nothing.events, nothing.recorded) == ((), later.recorded)


@pytest.mark.asyncio
async def test_events_at_the_same_moment_are_neither_lost_nor_repeated_between_pages(tmp_path):
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        for job in "abc":
            await EventLog(database).append(job, "1", [saved(5.0)] * 3)
        found = [await pages(EventSearch(database), FindEvents(limit=limit)) for limit in (1, 2, 4)]
    assert [sum(map(len, those)) for those in found] == [9, 9, 9]


@pytest.mark.parametrize(
    "asked",
    [
        FindEvents(),
        FindEvents(since=1.0, until=2.0),
        FindEvents(job="j1", types=("ExportFailed",)),
        FindEvents(types=("ExportFailed",), since=1.0),
        FindEvents(types=("ExportFailed", "CheckpointSaved")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("after", [None, Place(at=10.0, number=1)])
@pytest.mark.asyncio
async def test_every_search_reads_an_index_in_its_own_order(tmp_path, asked, after):
    async with searching(tmp_path / "t.db") as (log, _):
        asked = msgspec.structs.replace(asked, after=after)
        sql, parameters = _in_order_of_time(asked, 10, 2)
        plan = await log.database.read(f"EXPLAIN QUERY PLAN {sql}", parameters)
    reads = [step for step in plan if "events" in step["detail"]]
    assert len(reads) == (1 if asked.job else max(1, len(asked.types)))
    assert all(" USING INDEX events_by_" in step["detail"] and "by_number" not in step["detail"] for step in reads)
    # Where several are merged, their pages are sorted; what is read from the log never is.
    sorts = {step["parent"] for step in plan if "TEMP B-TREE" in step["detail"]}
    assert sorts.isdisjoint({step["parent"] for step in reads})


def test_a_place_that_no_event_can_have_is_no_message():
    codec = Codec()
    frames = codec.encode(codec.head(Kind.ASK, 1, to="daemon", sender="t"), FindEvents(after=Place(at=0.0, number=2**63)))
    with pytest.raises(MalformedMessage, match=r"after\.number"):
        codec.decode(frames)


@pytest.mark.asyncio
async def test_a_log_from_before_searching_is_numbered_in_the_order_of_time(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as old:
        old.executescript(MIGRATIONS[0] + "; PRAGMA user_version = 1")
        body = msgspec.msgpack.encode(failed(0.0).body)
        rows = [("j2", 1, 20.0), ("j1", 1, 10.0), ("j1", 2, 30.0)]
        old.executemany("INSERT INTO events VALUES (?, ?, ?, 'ExportFailed', ?)", [(*row, body) for row in rows])
        old.commit()
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        await EventLog(database).append("j3", "1", [failed(5.0)])
        assert await pages(EventSearch(database), FindEvents()) == [[5.0, 10.0, 20.0, 30.0]]
        later = await EventSearch(database).find(FindEvents(recorded_after=3))
        assert [event.job for event in later.events] == ["j3"]


@pytest.mark.asyncio
async def test_an_event_type_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    async with searching(tmp_path / "t.db") as (log, _):
        actor = TelemetryActor(log, None, Metrics(), Plugins())
        with pytest.raises(UnknownName, match="'EpochDone'; there are: ArmGauged") as refused:
            await actor.handle(FindEvents(types=("CheckpointSaved", "EpochDone")))
    assert refused.value.fields["available"] == list(EVENT_TYPES)
