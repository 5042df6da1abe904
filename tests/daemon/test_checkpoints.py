"""Disk space comes back: of a job's checkpoints the last two are kept while the job can be resumed, and none when it cannot."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from test_jobs_actor import office

from esperd.daemon.checkpoints import Checkpoints
from esperd.errors import StoreFailed
from esperd.messages.jobs import (
    Artifact,
    CancelJob,
    JobState,
    PauseJob,
)
from esperd.messages.leases import (
    CheckpointWritten,
    JobStarted,
    JobStopped,
    JobSucceeded,
)
from esperd.store.blobs import Blobs
from esperd.store.filesystem import RealFilesystem
from esperd.testing import until


def kept(checkpoints, job_id):
    return sorted(path.name for path in checkpoints.of(job_id).directory.glob("objects/??/*"))


def test_what_no_unfinished_job_refers_to_is_swept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.sweep({})
    old, new, other = (checkpoints.of(job).put(data) for job, data in [("j1", b"old"), ("j1", b"new"), ("j2", b"new")])
    checkpoints.of("j3").put(b"begun")
    checkpoints.sweep({"j1": (new, None), "j3": (None, None)})
    assert old not in kept(checkpoints, "j1")
    assert (kept(checkpoints, "j1"), kept(checkpoints, "j3")) == ([new], [])
    assert other == new  # the same bytes of another job: each has its own
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["j1", "j3"]


def test_a_directory_that_cannot_be_read_is_a_typed_error_and_the_others_are_swept(tmp_path):
    class BadSector(RealFilesystem):
        bad = ""

        def names(self, path):
            if self.bad in path.parts:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().names(path)

    checkpoints = Checkpoints(tmp_path / "checkpoints", disk := BadSector())
    for job in ("j1", "j2", "j3"):
        checkpoints.of(job).put(b"unwanted")
    first, *others = disk.names(checkpoints.directory)
    disk.bad = first
    with pytest.raises(StoreFailed, match=f"cannot list .*{first}.*EIO"):
        checkpoints.sweep(dict.fromkeys(("j1", "j2", "j3"), (None, None)))
    assert [kept(checkpoints, job) for job in others] == [[], []]
    disk.bad = "checkpoints"
    with pytest.raises(StoreFailed, match="cannot list"):
        checkpoints.sweep({})


def test_what_a_job_wrote_goes_with_the_job_and_it_may_write_again_in_between(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    writer = checkpoints.of("j1")
    first = writer.put(b"first")
    checkpoints.keep_only("j1", writer.put(b"second"))
    assert not writer.contains(first)
    assert writer.put(b"first") == first
    checkpoints.forget("j1")
    checkpoints.forget("j1")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


@pytest.fixture
def dead_process():
    """Id of a process that is gone."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


async def running(here):
    """A job whose worker trains, and its id."""
    await here.open()
    job_id = await here.submit()
    await here.leased(job_id, 1)
    await here.ask(JobStarted(job_id=job_id, generation=1))
    return job_id


async def written(here, checkpoints, job_id, data, epoch=1):
    sha256 = checkpoints.of(job_id).put(data)
    await here.ask(CheckpointWritten(job_id=job_id, generation=1, sha256=sha256, epoch=epoch))
    return sha256


async def nothing_is_left(checkpoints, job_id):
    async def is_so():
        return not checkpoints.of(job_id).directory.exists()

    await until(is_so)


@pytest.mark.asyncio
async def test_of_a_jobs_checkpoints_the_last_two_are_kept_and_success_removes_them(tmp_path, checkpoints):
    async with office(tmp_path) as here:
        job_id = await running(here)
        await written(here, checkpoints, job_id, b"one")
        second = await written(here, checkpoints, job_id, b"two", epoch=2)
        third = await written(here, checkpoints, job_id, b"three", epoch=3)
        assert await written(here, checkpoints, job_id, b"three", epoch=3) == third  # said twice: its first answer was lost
        assert kept(checkpoints, job_id) == sorted([second, third])
        info = await here.store.get(job_id)
        assert (info.checkpoint, info.previous_checkpoint, info.previous_epoch) == (third, second, 2)
        blobs = Blobs(tmp_path / "blobs")
        report = Artifact(name="report.json", sha256=blobs.put(b"two"), size_bytes=3)  # the same bytes as the checkpoint
        await here.ask(JobSucceeded(job_id=job_id, generation=1, epoch=2, artifacts=(report,)))
        await nothing_is_left(checkpoints, job_id)
        assert (await here.store.get(job_id)).checkpoint is None
        assert blobs.get(report.sha256) == b"two"


@pytest.mark.asyncio
async def test_a_paused_job_keeps_its_checkpoint_until_it_is_cancelled(tmp_path, checkpoints):
    async with office(tmp_path) as here:
        job_id = await running(here)
        await here.ask(PauseJob(id=job_id))
        last = await written(here, checkpoints, job_id, b"paused")
        await here.ask(JobStopped(job_id=job_id, generation=1, why="pause"))
        assert kept(checkpoints, job_id) == [last]
        assert (await here.ask(CancelJob(id=job_id))).state is JobState.CANCELLED
        await nothing_is_left(checkpoints, job_id)


@pytest.mark.asyncio
async def test_a_checkpoint_that_is_not_there_is_not_the_one_to_resume_from(tmp_path, checkpoints):
    async with office(tmp_path) as here:
        job_id = await running(here)
        first = await written(here, checkpoints, job_id, b"one")
        with pytest.raises(StoreFailed, match="there is no checkpoint 0000"):
            await here.ask(CheckpointWritten(job_id=job_id, generation=1, sha256="0" * 64, epoch=2))
        assert (await here.store.get(job_id)).checkpoint == first
        assert kept(checkpoints, job_id) == [first]


@pytest.mark.asyncio
async def test_a_start_sweeps_what_a_killed_daemon_left(tmp_path, checkpoints, dead_process):
    blobs = Blobs(tmp_path / "blobs")
    artifact = blobs.put(b"a model")
    torn = blobs.path(artifact).with_name(f".{artifact}.{dead_process}.0123abcd")
    torn.write_bytes(b"a mod")
    async with office(tmp_path) as here:
        checkpoints.of("j0").put(b"of a job that is finished")
        await here.open()
        await nothing_is_left(checkpoints, "j0")

        async def is_gone():
            return not torn.exists()

        await until(is_gone)
        assert blobs.get(artifact) == b"a model"


@pytest.mark.asyncio
async def test_what_cannot_be_deleted_is_left_for_later_and_stops_nobody(tmp_path, checkpoints, monkeypatch):
    def refuse(*_):
        raise StoreFailed("cannot delete blob: Input/output error (EIO)")

    async with office(tmp_path) as here:
        job_id = await running(here)
        monkeypatch.setattr(Checkpoints, "keep_only", refuse)
        await written(here, checkpoints, job_id, b"one")
        second = await written(here, checkpoints, job_id, b"two", epoch=2)
        assert len(kept(checkpoints, job_id)) == 2
        assert (await here.store.get(job_id)).checkpoint == second
        assert here.restarts() == 0
