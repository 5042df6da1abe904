from __future__ import annotations

import asyncio
import random
import re
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esperd.config import Jobs
from esperd.daemon.job_store import JobStore
from esperd.daemon.job_tables import MIGRATIONS
from esperd.errors import Busy, Conflict, IllegalTransition, JobNotFound, StoreFailed
from esperd.messages.jobs import (
    Artifact,
    Budget,
    Job,
    JobError,
    JobState,
    Peak,
)
from esperd.messages.leases import StopJob
from esperd.store.database import Database

LIMITS = Jobs(max_queued=4, max_attempts=2, backoff_s=10.0)
MODEL = Artifact(name="model.safetensors", sha256="a" * 64, size_bytes=10)
REPORT = Artifact(name="report.json", sha256="b" * 64, size_bytes=20)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def job(name: str = "mine", **changes) -> Job:
    return Job(**{"host": "small_cnn", "data": "digits", "name": name, "budget": Budget(epochs=3), **changes})


@asynccontextmanager
async def opened(directory: Path, clock: FakeClock | None = None, limits: Jobs = LIMITS):
    async with Database.open(directory / "jobs.db", MIGRATIONS) as database:
        yield JobStore(database, clock or FakeClock(), limits, random.Random(0))


async def running_job(store: JobStore) -> tuple[str, int]:
    info, _ = await store.submit(job(), "key")
    leased = await store.lease(0.0)
    await store.started(info.id, leased.generation)
    return info.id, leased.generation


@pytest.mark.asyncio
async def test_a_submitted_job_is_there_after_reopening_exactly_as_it_was(tmp_path):
    mine = job(host_options={"widths": [1, 2], "rate": float("inf")}, rng_seed=7)
    async with opened(tmp_path) as store:
        info, duplicate = await store.submit(mine, "key")
    assert not duplicate
    assert re.fullmatch("j[0-9a-f]{8}", info.id)
    async with opened(tmp_path) as store:
        found = await store.get(info.id)
    assert found == info
    assert (found.job, found.state, found.attempt, found.submitted_at) == (mine, JobState.QUEUED, 0, 1000.0)


@pytest.mark.asyncio
async def test_the_same_key_with_the_same_job_returns_the_first_and_with_another_is_a_conflict(tmp_path):
    async with opened(tmp_path) as store:
        results = await asyncio.gather(*(store.submit(job(), "key") for _ in range(5)))
        assert sorted(result.duplicate for result in results) == [False, True, True, True, True]
        assert len({result.info.id for result in results}) == 1
        with pytest.raises(Conflict, match=f"'key' was used for job {results[0].info.id} with another content"):
            await store.submit(job(rng_seed=1), "key")


@pytest.mark.asyncio
async def test_more_jobs_than_may_wait_are_refused_but_a_repeated_one_is_answered(tmp_path):
    async with opened(tmp_path) as store:
        for number in range(4):
            await store.submit(job(), f"key {number}")
        with pytest.raises(Busy, match=r"4 jobs wait already, the limit is jobs\.max_queued = 4") as refused:
            await store.submit(job(), "one more")
        assert refused.value.fields["retry_after_s"] > 0
        assert (await store.submit(job(), "key 0")).duplicate
        await store.lease(0.0)
        assert not (await store.submit(job(), "one more")).duplicate


@pytest.mark.asyncio
async def test_jobs_are_leased_oldest_first_each_once_and_listed_newest_first(tmp_path):
    async with opened(tmp_path) as store:
        ids = [(await store.submit(job(), f"key {number}")).info.id for number in range(3)]
        leased = await asyncio.gather(*(store.lease(0.0) for _ in range(4)))
        assert [lease.info.id for lease in leased if lease is not None] == ids
        assert leased[3] is None
        assert [info.id for info in await store.list()] == ids[::-1]
        assert [info.id for info in await store.list(limit=1)] == ids[-1:]


@pytest.mark.asyncio
async def test_a_whole_life_is_recorded(tmp_path):
    clock = FakeClock()
    async with opened(tmp_path, clock) as store:
        info, _ = await store.submit(job(), "key")
        lease = await store.lease(clock.now)
        assert (lease.info.state, lease.generation, lease.resumed) == (JobState.LEASED, 1, 0)
        clock.now = 1001.0
        assert (await store.started(info.id, 1)).state is JobState.RUNNING
        assert (await store.checkpoint(info.id, 1, "c" * 64, 2)).epoch == 2
        assert await store.artifacts(info.id) == ()
        clock.now = 1002.0
        done = await store.succeeded(info.id, 1, 3, (REPORT, MODEL))
        assert (done.state, done.epoch, done.checkpoint) == (JobState.SUCCEEDED, 3, None)
        assert (done.submitted_at, done.started_at, done.finished_at) == (1000.0, 1001.0, 1002.0)
        assert await store.artifacts(info.id) == (REPORT, MODEL)


@pytest.mark.asyncio
async def test_a_lost_worker_costs_an_attempt_and_a_wait_and_the_job_goes_on_from_its_checkpoint(tmp_path):
    clock = FakeClock()
    async with opened(tmp_path, clock) as store:
        job_id, _ = await running_job(store)
        await store.checkpoint(job_id, 1, "c" * 64, 2)
        lost = await store.worker_lost(job_id, 1, "killed by signal 9")
        assert lost.state is JobState.QUEUED
        assert 1000.0 < lost.retry_at <= 1010.0
        assert lost.error == JobError(code="worker_failed", message="killed by signal 9")
        assert await store.lease(clock.now) is None
        again = await store.lease(lost.retry_at)
        assert (again.info.checkpoint, again.info.attempt, again.generation, again.resumed) == ("c" * 64, 2, 2, 1)
        assert again.info.retry_at is None
        assert (await store.started(job_id, 2)).error is None
        dead = await store.worker_lost(job_id, 2, "killed again")
        assert (dead.state, dead.error.message, dead.finished_at) == (JobState.DEAD, "killed again", 1000.0)


@pytest.mark.asyncio
async def test_a_stale_worker_changes_nothing(tmp_path):
    async with opened(tmp_path) as store:
        job_id, _ = await running_job(store)
        await store.stopped(job_id, 1, "drain")
        await store.lease(0.0)
        await store.started(job_id, 2)
        before = await store.get(job_id)
        huge, error = Peak(memory_bytes=2**50, gpu_bytes=2**50), JobError(code="error", message="stale")
        for write in (
            store.started(job_id, 1),
            store.checkpoint(job_id, 1, "d" * 64, 9),
            store.succeeded(job_id, 1, 9, (MODEL,), huge),
            store.stopped(job_id, 1, "cancel", huge),
            store.broken(job_id, 1, error, huge),
            store.out_of_memory(job_id, 1, error, huge),
            store.worker_lost(job_id, 1, "stale"),
        ):
            with pytest.raises(Conflict, match="lease 1 of the job has ended"):
                await write
        assert await store.get(job_id) == before
        assert await store.artifacts(job_id) == ()
        # Nor what jobs like it are expected to take; a worker that holds the lease does.
        peak = Peak(memory_bytes=2**30, gpu_bytes=2**20)
        assert (await store.stopped(job_id, 2, "pause", peak)).peak == peak
        await store.submit(job(), "another")
        expected = []
        await store.lease(0.0, lacking=lambda _id, _job, usage: expected.append(usage) or "memory")
        assert [(each.peak_memory_bytes, each.peak_gpu_bytes) for each in expected] == [(peak.memory_bytes, peak.gpu_bytes)]


@pytest.mark.asyncio
async def test_a_broken_job_keeps_its_error(tmp_path):
    error = JobError(code="invalid_model", message="no parameters", traceback="Traceback …")
    async with opened(tmp_path) as store:
        job_id, generation = await running_job(store)
        failed = await store.broken(job_id, generation, error)
    assert (failed.state, failed.error, failed.finished_at) == (JobState.FAILED, error, 1000.0)


@pytest.mark.asyncio
async def test_pausing_and_cancelling_a_running_job_say_what_its_worker_must_be_told(tmp_path):
    async with opened(tmp_path) as store:
        job_id, generation = await running_job(store)
        info, tell = await store.pause(job_id)
        assert (info.state, tell) == (JobState.RUNNING, StopJob(why="pause"))
        assert (await store.stopped(job_id, generation, "pause")).state is JobState.PAUSED
        info, tell = await store.resume(job_id)
        assert (info.state, tell) == (JobState.QUEUED, None)
        await store.lease(0.0)
        assert (await store.cancel(job_id)).tell_worker == StopJob(why="cancel")
        assert (await store.stopped(job_id, 2, "cancel")).state is JobState.CANCELLED
        with pytest.raises(IllegalTransition, match="cannot cancel a job that is cancelled"):
            await store.cancel(job_id)


@pytest.mark.asyncio
async def test_a_wish_survives_the_daemon(tmp_path):
    async with opened(tmp_path) as store:
        job_id, _ = await running_job(store)
        await store.pause(job_id)
    async with opened(tmp_path) as store:
        assert [info.state for info in await store.recover()] == [JobState.PAUSED]


@pytest.mark.asyncio
async def test_a_restarted_daemon_goes_on_with_what_was_held_without_spending_an_attempt(tmp_path):
    async with opened(tmp_path) as store:
        job_id, _ = await running_job(store)
        await store.submit(job(), "waiting")
    for attempt in range(2, 6):
        async with opened(tmp_path) as store:
            assert [info.id for info in await store.recover()] == [job_id]
            lease = await store.lease(0.0)
            assert (lease.info.id, lease.info.attempt) == (job_id, attempt)
            with pytest.raises(Conflict):
                await store.started(job_id, attempt - 1)


@pytest.mark.asyncio
async def test_an_unknown_job_is_named(tmp_path):
    async with opened(tmp_path) as store:
        for call in (
            store.get("j0"),
            store.artifacts("j0"),
            store.pause("j0"),
            store.started("j0", 1),
            store.checkpoint("j0", 1, "a", 1),
        ):
            with pytest.raises(JobNotFound, match="no job is called 'j0'"):
                await call


@pytest.mark.asyncio
async def test_a_stored_job_that_cannot_be_read_is_named(tmp_path):
    async with Database.open(tmp_path / "jobs.db", MIGRATIONS) as database:
        store = JobStore(database, FakeClock())
        info, _ = await store.submit(job(), "key")
        await database.write(lambda connection: connection.execute("UPDATE jobs SET payload = x'00'"))
        with pytest.raises(StoreFailed, match=f"the stored job {info.id} cannot be read"):
            await store.get(info.id)


@pytest.mark.asyncio
async def test_ids_are_drawn_until_one_is_free(tmp_path):
    async with Database.open(tmp_path / "jobs.db", MIGRATIONS) as database:
        first, _ = await JobStore(database, FakeClock(), rng=random.Random(3)).submit(job(), "a")
        second, _ = await JobStore(database, FakeClock(), rng=random.Random(3)).submit(job(), "b")
    assert first.id != second.id


class JobStoreAgainstDict(RuleBasedStateMachine):
    """Any calls in any order, with reopening in between, against a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock = FakeClock()
        self.model: dict[str, dict] = {}
        self.stack = AsyncExitStack()
        self.open()

    def run(self, coroutine):
        async def answer():
            return await coroutine

        return self.runner.run(answer())

    def open(self) -> None:
        opening = opened(Path(self.directory.name), self.clock, Jobs(max_queued=3, max_attempts=2))
        self.store = self.run(self.stack.enter_async_context(opening))

    @rule()
    def reopen(self):
        self.run(self.stack.aclose())
        self.open()
        moved = {info.id for info in self.run(self.store.recover())}
        assert moved == {job_id for job_id, row in self.model.items() if row["state"] in ("leased", "running")}
        for job_id in moved:
            self.let_go(self.model[job_id])

    @rule(key=st.integers(0, 5), seed=st.integers(0, 1))
    def submit(self, key, seed):
        known = [job_id for job_id, row in self.model.items() if row["key"] == key]
        queued = sum(row["state"] == "queued" for row in self.model.values())
        submission = self.store.submit(job(rng_seed=seed), str(key))
        if known:
            if self.model[known[0]]["seed"] != seed:
                self.refused(submission, Conflict)
            else:
                info, duplicate = self.run(submission)
                assert (info.id, duplicate) == (known[0], True)
        elif queued >= 3:
            self.refused(submission, Busy)
        else:
            info, duplicate = self.run(submission)
            assert not duplicate
            self.model[info.id] = {
                "key": key, "seed": seed, "state": "queued", "generation": 0, "lost": 0, "wish": None,
                "waits": False, "checkpoint": None, "epoch": None, "artifacts": (),
            }  # fmt: skip

    @rule(patient=st.booleans())
    def lease(self, patient):
        leased = self.run(self.store.lease(1e9 if patient else self.clock.now))
        eligible = [job_id for job_id, row in self.model.items() if row["state"] == "queued" and (patient or not row["waits"])]
        assert (leased.info.id if leased else None) == (eligible[0] if eligible else None)
        if leased:
            row = self.model[leased.info.id]
            row.update(state="leased", generation=row["generation"] + 1, waits=False)
            assert leased.generation == row["generation"]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), stale=st.integers(0, 3))
    def worker_speaks(self, data, stale):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        row = self.model[job_id]
        generation = row["generation"] - (stale == 0)
        verb = data.draw(st.sampled_from(["started", "checkpoint", "succeeded", "pause", "drain", "broken", "lost"]))
        word = {
            "started": lambda: self.store.started(job_id, generation),
            "checkpoint": lambda: self.store.checkpoint(job_id, generation, "c" * 64, 4),
            "succeeded": lambda: self.store.succeeded(job_id, generation, 5, (MODEL,)),
            "pause": lambda: self.store.stopped(job_id, generation, "pause"),
            "drain": lambda: self.store.stopped(job_id, generation, "drain"),
            "broken": lambda: self.store.broken(job_id, generation, JobError(code="error", message="no")),
            "lost": lambda: self.store.worker_lost(job_id, generation, "gone"),
        }[verb]()
        if row["state"] not in ("leased", "running") or generation != row["generation"]:
            self.refused(word, Conflict)
            return
        if verb == "succeeded" and row["state"] == "leased":
            self.refused(word, IllegalTransition)
            return
        self.run(word)
        if verb == "started":
            row["state"] = "running"
        elif verb == "checkpoint":
            row.update(checkpoint="c" * 64, epoch=4)
        elif verb == "succeeded":
            row.update(state="succeeded", epoch=5, artifacts=(MODEL,), wish=None)
        elif verb == "broken":
            row.update(state="failed", wish=None)
        elif verb == "lost":
            row["lost"] += 1
            if row["wish"] is None and row["lost"] == 2:
                row["state"] = "dead"
            else:
                row["waits"] = row["wish"] is None
                self.let_go(row)
        else:
            self.let_go(row)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), wish=st.sampled_from(["pause", "resume", "cancel"]))
    def user_speaks(self, data, wish):
        job_id = data.draw(st.sampled_from(sorted(self.model)))
        row = self.model[job_id]
        asked = getattr(self.store, wish)(job_id)
        held = row["state"] in ("leased", "running")
        allowed = {
            "pause": row["state"] == "queued" or (held and row["wish"] != "cancel"),
            "resume": row["state"] == "paused" or (held and row["wish"] == "pause"),
            "cancel": held or row["state"] in ("queued", "paused"),
        }[wish]
        if not allowed:
            self.refused(asked, IllegalTransition)
            return
        tell = self.run(asked).tell_worker
        assert (tell is not None) == (held and wish != "resume")
        if held:
            row["wish"] = None if wish == "resume" else wish
        else:
            row.update(state={"pause": "paused", "resume": "queued", "cancel": "cancelled"}[wish], waits=False)

    @invariant()
    def store_and_dict_agree(self):
        found = {info.id: info for info in self.run(self.store.list())}
        assert list(found) == list(self.model)[::-1]
        for job_id, row in self.model.items():
            info = found[job_id]
            over = row["state"] in ("succeeded", "failed", "cancelled", "dead")
            assert (info.state, info.attempt) == (row["state"], row["generation"])
            assert (info.checkpoint, info.epoch) == (None if over else row["checkpoint"], row["epoch"])
            assert info.job.rng_seed == row["seed"]
            assert (info.retry_at is not None) == row["waits"]
            assert (info.finished_at is not None) == over
            assert self.run(self.store.artifacts(job_id)) == row["artifacts"]

    def let_go(self, row):
        row["state"] = {"pause": "paused", "cancel": "cancelled", None: "queued"}[row["wish"]]
        row["wish"] = None

    def refused(self, coroutine, error):
        with pytest.raises(error):
            self.run(coroutine)

    def teardown(self):
        self.run(self.stack.aclose())
        self.runner.close()
        self.directory.cleanup()


JobStoreAgainstDict.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestJobStoreAgainstDict = JobStoreAgainstDict.TestCase


@pytest.mark.asyncio
async def test_a_stored_job_that_cannot_be_read_holds_up_no_other_and_is_named_when_it_is_asked_for(tmp_path):
    async with opened(tmp_path) as store:
        spoilt, _ = await store.submit(job("spoilt"), "one")
        sound, _ = await store.submit(job("sound"), "two")
    async with Database.open(tmp_path / "jobs.db", MIGRATIONS) as database:
        await database.write(lambda c: c.execute("UPDATE jobs SET payload = x'00' WHERE id = ?", (spoilt.id,)) and None)
    async with opened(tmp_path) as store:
        await store.recover()
        assert [info.id for info in await store.list()] == [sound.id]
        assert (await store.lease(0.0)).info.id == sound.id
        with pytest.raises(StoreFailed, match=spoilt.id):
            await store.get(spoilt.id)
