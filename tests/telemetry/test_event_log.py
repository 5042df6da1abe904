from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import StoreFailed
from esperd.messages.growth import Stage
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import CheckpointSaved, JobStateChanged, NewEvent, StageChanged
from esperd.store.database import Database
from esperd.telemetry.log import LARGEST_PAGE, MIGRATIONS, EventLog


def saved(epoch: int) -> NewEvent:
    return NewEvent(at=float(epoch), body=CheckpointSaved(epoch=epoch, sha256="a" * 64, size_bytes=1, seconds=0.1))


@pytest.mark.asyncio
async def test_events_come_back_as_they_were_numbered_from_one_after_reopening(tmp_path):
    changed = NewEvent(at=1.5, body=JobStateChanged(state=JobState.RUNNING, attempt=1))
    moved = StageChanged(
        epoch=1, seed="s#1", slot="s", blueprint="b", before=Stage.TRAINING, after=Stage.CULLED, reason="unstable"
    )
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        stored = await EventLog(database).append("j1", "1", [changed, NewEvent(at=2.5, body=moved)])
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        page = await EventLog(database).page("j1")
    assert page.events == stored
    assert [(event.sequence, event.at, event.body) for event in page.events] == [(1, 1.5, changed.body), (2, 2.5, moved)]
    assert not page.more


@pytest.mark.asyncio
async def test_a_batch_is_recorded_once_per_job_and_key(tmp_path):
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        log = EventLog(database)
        assert len(await log.append("j1", "key", [saved(1), saved(2)])) == 2
        assert await log.append("j1", "key", [saved(1), saved(2)]) == ()
        assert len(await log.append("j2", "key", [saved(1)])) == 1
        assert len((await log.page("j1")).events) == 2


@pytest.mark.asyncio
async def test_pages_follow_each_other_without_gap_or_overlap(tmp_path):
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        log = EventLog(database)
        await log.append("j1", "key", [saved(number) for number in range(1, 8)])
        seen, after, more = [], 0, True
        while more:
            page = await log.page("j1", after, limit=3)
            seen.append([event.sequence for event in page.events])
            after, more = seen[-1][-1], page.more
    assert seen == [[1, 2, 3], [4, 5, 6], [7]]


@pytest.mark.asyncio
async def test_no_page_is_larger_than_the_largest_nor_smaller_than_one(tmp_path):
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        log = EventLog(database)
        await log.append("j1", "key", [saved(number) for number in range(LARGEST_PAGE + 1)])
        assert len((await log.page("j1", limit=10**9)).events) == LARGEST_PAGE
        assert len((await log.page("j1", limit=0)).events) == 1
        assert (await log.page("unknown")).events == ()


@settings(max_examples=10, deadline=None)
@given(batches=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 3)), max_size=20))
def test_whatever_is_appended_at_once_every_job_is_numbered_without_holes(tmp_path_factory, batches):
    async def append_all():
        async with Database.open(tmp_path_factory.mktemp("log") / "t.db", MIGRATIONS, "NORMAL") as database:
            log = EventLog(database)
            await asyncio.gather(*(log.append(job, str(key), [saved(1)] * count) for job, key, count in batches))
            return {job: [event.sequence for event in (await log.page(job)).events] for job in "ab"}

    first = {(job, key): count for job, key, count in reversed(batches)}
    for job, sequences in asyncio.run(append_all()).items():
        assert sequences == list(range(1, 1 + sum(count for (owner, _), count in first.items() if owner == job)))


@pytest.mark.asyncio
async def test_an_event_that_cannot_be_read_is_named(tmp_path):
    async with Database.open(tmp_path / "t.db", MIGRATIONS, "NORMAL") as database:
        log = EventLog(database)
        await log.append("j1", "key", [saved(1)])
        await database.write(lambda connection: connection.execute("UPDATE events SET body = x'81a474797065a158'"))
        with pytest.raises(StoreFailed, match=r"event 1 of job j1 \(CheckpointSaved\) cannot be read"):
            await log.page("j1")
