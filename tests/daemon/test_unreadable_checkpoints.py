"""What a disk does not hand out is its job's trouble alone: nothing is deleted for it, no attempt spent, nobody else waits."""

from __future__ import annotations

import errno
import os

import msgspec
import pytest
from test_checkpoints import kept, running, written
from test_jobs_actor import JOB, office

from esperd.daemon import job_lifecycle, jobs_actor
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.job_store import JobStore
from esperd.daemon.worker_processes import worker_name
from esperd.errors import StoreFailed
from esperd.messages.control import Terminated
from esperd.messages.failures import AnalyseFailure
from esperd.messages.jobs import JobError, JobState, SubmitJob
from esperd.messages.leases import CheckpointWritten, JobStarted, JobStopped
from esperd.store.filesystem import RealFilesystem
from esperd.testing import until


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(jobs_actor, "POLL_S", 0.02)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


@pytest.fixture
def bad(monkeypatch):
    """Names of files that can neither be read nor asked for while they are in it."""
    names = set()

    def refusing(method):
        answer = getattr(RealFilesystem, method)

        def ask(disk, path, *arguments):
            if path.name in names:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return answer(disk, path, *arguments)

        monkeypatch.setattr(RealFilesystem, method, ask)

    for method in ("exists", "read", "pieces", "changed_ns"):
        refusing(method)
    return names


async def lose(here, job_id, attempt, status=-9):
    worker = f"trainer/{job_id}.{attempt}"
    await here.system.tell("jobs", Terminated(actor=worker, generation=1, reason="was killed", will_restart=False, status=status))


def refuse_once(method):
    refusals = [StoreFailed("the database is locked")]

    async def sometimes(*arguments):
        if refusals:
            raise refusals.pop()
        return await method(*arguments)

    return sometimes


@pytest.mark.asyncio
async def test_a_job_whose_last_checkpoint_cannot_be_read_goes_on_from_the_one_before_and_keeps_it(
    tmp_path, checkpoints, bad, monkeypatch
):
    async with office(tmp_path) as here:
        job_id = await running(here)
        first = await written(here, checkpoints, job_id, b"one", epoch=1)
        second = await written(here, checkpoints, job_id, b"two", epoch=2)
        bad.add(second)
        await lose(here, job_id, 1)
        assert (await here.leased(job_id, 2)).told[0].checkpoint == first
        info = await here.store.get(job_id)
        assert (info.checkpoint, info.epoch, info.previous_checkpoint) == (first, 1, second)
        (note,) = [attempt.note for attempt in await here.store.attempts(job_id) if attempt.note]
        assert note == f"checkpoint {second} of epoch 2 could not be read: the job goes on from epoch 1"
        await here.actor._take_back()  # a start sweeps what nothing refers to
        assert kept(checkpoints, job_id) == sorted([first, second])

        bad.clear()
        await lose(here, job_id, 2)
        assert (await here.leased(job_id, 3)).told[0].checkpoint == second  # nothing was lost
        assert "can be read again: the job goes on from epoch 2" in (await here.store.attempts(job_id))[-1].note

        bad.add(second)
        monkeypatch.setattr(JobStore, "prefer_checkpoint", refuse_once(JobStore.prefer_checkpoint))
        await lose(here, job_id, 3)
        await here.leased(job_id, 5)
        assert [attempt.ended for attempt in await here.store.attempts(job_id)][3] == "left", (
            "the daemon's trouble is not the job's"
        )
        third = checkpoints.of(job_id).put(b"three")
        await here.ask(CheckpointWritten(job_id=job_id, generation=5, sha256=third, epoch=2))
        assert kept(checkpoints, job_id) == sorted([first, third])  # it takes the place of the one that could not be read
        assert here.restarts() == 0


@pytest.mark.asyncio
async def test_a_job_none_of_whose_checkpoints_can_be_read_waits_and_holds_up_nobody(tmp_path, checkpoints, bad, monkeypatch):
    async with office(tmp_path) as here:
        job_id = await running(here)
        first = await written(here, checkpoints, job_id, b"one", epoch=1)
        second = await written(here, checkpoints, job_id, b"two", epoch=2)
        bad |= {first, second}
        await lose(here, job_id, 1)
        await here.leased(await here.submit(), 1)

        async def was_tried_twice():
            return (await here.store.get(job_id)).attempt > 2

        await until(was_tried_twice)
        assert (await here.store.get(job_id)).error.message.startswith(
            "none of the job's checkpoints can be read: cannot read blob"
        )
        bad.discard(second)  # alone: it is looked at first, and between the two a look may be under way

        async def trains():
            attempt = (await here.store.get(job_id)).attempt
            return (worker := here.workers.get(worker_name(job_id, attempt))) and [lease.checkpoint for lease in worker.told]

        await until(trains)
        assert await trains() == [second]
        assert here.workers[worker_name(job_id, (await here.store.get(job_id)).attempt)].told[0].resumed == 1
        attempt = (await here.store.get(job_id)).attempt
        await here.ask(JobStarted(job_id=job_id, generation=attempt))
        assert (await here.store.get(job_id)).error is None

        monkeypatch.setattr(job_lifecycle, "UNREAD_TRIES", 3)
        bad |= {first, second}
        await lose(here, job_id, attempt)
        info = await here.becomes(job_id, JobState.DEAD)
        assert (info.error.code, info.attempt) == ("store_failed", attempt + 3)
        found = await here.ask(AnalyseFailure(id=job_id))
        assert (found.same_in_a_row, found.retry_from_epoch) == (3, 2)
        assert "the disk, or a permission, keeps them from being read" in found.advice[0]
        assert not any("interpreter" in advice for advice in found.advice)
        assert (kept(checkpoints, job_id), here.restarts()) == (sorted([first, second]), 0)


@pytest.mark.asyncio
async def test_whatever_the_machine_refuses_to_one_job_the_others_train(tmp_path, checkpoints, monkeypatch):
    async with office(tmp_path) as here:
        job_id = await running(here)
        await written(here, checkpoints, job_id, b"one")

        refused = []

        def refuse(*asked):
            refused.append(asked[-1])
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        async def says(words):
            async def is_said():
                return words in ((await here.store.get(job_id)).error or JobError(code="", message="")).message

            await until(is_said)

        with monkeypatch.context() as patches:
            patches.setattr(Checkpoints, "is_good", refuse)
            await lose(here, job_id, 1)
            await says("none of the job's checkpoints can be read: [Errno 116] Stale file handle")
        monkeypatch.setattr(Checkpoints, "forget", refuse)
        start = here.system.start

        async def start_others(spec):
            if job_id in spec.name:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            await start(spec)

        monkeypatch.setattr(here.system, "start", start_others)
        before = (await here.store.get(job_id)).attempt

        async def was_tried_twice():
            return (await here.store.get(job_id)).attempt >= before + 2

        await until(was_tried_twice)
        ended = {attempt.ended for attempt in (await here.store.attempts(job_id))[before:-1]}
        assert ended == {"left"}, "what the machine refuses is no fault of the job"
        await here.leased(other := await here.submit(), 1)
        await here.ask(JobStopped(job_id=other, generation=1, why="cancel"))

        async def was_to_be_forgotten():
            return other in refused

        await until(was_to_be_forgotten)
        await here.leased(await here.submit(), 1)
        assert here.restarts() == 0


@pytest.mark.asyncio
async def test_checkpoints_of_a_job_that_only_another_esperd_understands_are_left_alone(tmp_path, checkpoints):
    newer = [("payload", msgspec.msgpack.encode({"new": True})), ("state", "of another esperd")]
    async with office(tmp_path) as here:
        left = {}
        for number, (column, value) in enumerate(newer):
            job_id = (await here.store.submit(JOB, str(number))).info.id
            await here.store.lease(2.0)
            left[job_id] = checkpoints.of(job_id).put(b"ten days")
            await here.store.checkpoint(job_id, 1, left[job_id], 7)
            statement = f"UPDATE jobs SET {column} = ? WHERE id = ?"
            await here.store._database.write(lambda c, told=(statement, (value, job_id)): c.execute(*told))
        checkpoints.of("j0").put(b"of nobody")
        await here.open()
        await here.leased((await here.ask(SubmitJob(job=JOB, idempotency_key="readable"))).id, 1)
        assert {job_id: kept(checkpoints, job_id) for job_id in left} == {job_id: [sha256] for job_id, sha256 in left.items()}
        assert (kept(checkpoints, "j0"), here.restarts()) == ([], 0)
