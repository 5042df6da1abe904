"""Garbage is collected, and never what somebody is about to refer to: whenever the collector comes in between."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import AsyncExitStack

import msgspec
import pytest
from daemon_jobs import QUICK, job

from esperd.daemon.collecting import Collector, look
from esperd.daemon.job_store import JobStore
from esperd.daemon.state import open_databases
from esperd.messages.jobs import Artifact, Job, JobError
from esperd.store.blobs import Blobs
from esperd.store.filesystem import RealFilesystem

JOB = msgspec.convert(job(1), Job)
CALLS = ("create", "write", "fsync", "rename", "fsync_directory", "exists", "read", "touch")


class Interleaved(RealFilesystem):
    """Lets a collector come in before the n-th call of a writer, and after it."""

    def __init__(self, at, collector):
        self.at, self.collector, self.calls = at, collector, 0


def _interleaved(name):
    def call(self, *arguments):
        self.calls += 1
        mine = self.calls == self.at
        if mine:
            self.collector()
        answer = getattr(RealFilesystem, name)(self, *arguments)
        if mine:
            self.collector()
        return answer

    return call


for _name in CALLS:
    setattr(Interleaved, _name, _interleaved(_name))


@pytest.mark.parametrize("was_there", [True, False])
def test_wherever_the_collector_comes_in_what_a_writer_has_put_is_there(tmp_path, was_there):
    sha256 = hashlib.sha256(b"model").hexdigest()
    number, calls = 0, 1
    while number < calls:
        number += 1
        directory = tmp_path / str(number)
        others = Blobs(directory)
        if was_there:
            others.put(b"model")  # long ago, by a job whose rows are gone: the collector has seen it and means to delete it
        seen = others.changes()
        disk = Interleaved(number, lambda others=others, seen=seen: others.discard(seen))
        assert Blobs(directory, disk).put(b"model") == sha256
        calls = disk.calls
        assert others.get(sha256) == b"model", number
        assert others.discard(seen) == ()  # also after: it was put again
        assert others.discard(others.changes()) == (sha256,)
    assert calls > 5


def test_a_blob_is_garbage_at_the_second_look_when_all_who_may_have_written_it_are_done():
    changes = {"model": 1, "kernel": 1}
    suspects, garbage = look({}, changes, {"kernel"}, frozenset({"j1"}), 0.0, 10.0)
    assert (set(suspects), garbage) == ({"model"}, {})
    suspects, garbage = look(suspects, changes, {"kernel"}, frozenset({"j1", "j2"}), 100.0, 10.0)
    assert garbage == {}  # j1 trains its control
    suspects, garbage = look(suspects, changes, {"kernel"}, frozenset({"j2"}), 101.0, 10.0)
    assert garbage == {"model": 1}
    suspects, garbage = look(suspects, {"model": 2}, set(), frozenset(), 102.0, 10.0)
    assert garbage == {}  # put again
    suspects, garbage = look(suspects, {"model": 2}, {"model"}, frozenset(), 200.0, 10.0)
    assert (suspects, garbage) == ({}, {})


@pytest.mark.asyncio
async def test_what_a_running_job_put_stays_until_it_ends_and_what_rows_name_stays_for_good(tmp_path):
    now = [0.0]
    async with AsyncExitStack() as stack:
        databases = await open_databases(stack, tmp_path)
        store = JobStore(databases["jobs"], lambda: 1000.0, QUICK.jobs)
        blobs = Blobs(tmp_path / "blobs")
        collector = Collector(blobs, databases["jobs"], databases["kernels"], grace_s=10.0, monotonic=lambda: now[0])
        assert await collector.collect() == ()
        job_id = (await store.submit(JOB, "key")).info.id
        await store.lease(0.0)
        await store.started(job_id, 1)
        model, draft = blobs.put(b"model"), blobs.put(b"draft")
        for _ in range(3):
            now[0] += 100.0
            assert await collector.collect() == ()
        await store.succeeded(job_id, 1, 1, [Artifact(name="model.safetensors", sha256=model, size_bytes=5)])
        assert await collector.collect() == (draft,)
        now[0] += 100.0
        assert await collector.collect() == ()
        assert blobs.get(model) == b"model"
        again = (await store.submit(JOB, "another")).info.id
        await store.lease(0.0)
        grown = blobs.put(b"grown before the control failed")
        await store.checkpoint(again, 1, "c" * 64, 1)
        await store.broken(again, 1, JobError(code="error", message="no"))
        for _ in range(2):
            now[0] += 100.0
            assert await collector.collect() == ()  # it may be tried again, and then names what it grew
        assert await store.let_go_of_failed(before=2000.0) == (again,)
        assert await collector.collect() == (grown,)


@pytest.mark.asyncio
async def test_a_directory_that_cannot_be_listed_keeps_no_other_garbage(tmp_path):
    class BadShard(RealFilesystem):
        def names(self, path):
            if path.name == bad[:2]:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return super().names(path)

    now = [0.0]
    async with AsyncExitStack() as stack:
        databases = await open_databases(stack, tmp_path)
        blobs = Blobs(tmp_path / "blobs", BadShard())
        bad, garbage = blobs.put(b"where nothing is listed"), blobs.put(b"of nobody")
        collector = Collector(blobs, databases["jobs"], databases["kernels"], grace_s=10.0, monotonic=lambda: now[0])
        assert await collector.collect() == ()
        now[0] += 100.0
        assert await collector.collect() == (garbage,)
        assert blobs.contains(bad)
