"""A disk that fills up: the daemon keeps what it has, takes nothing new, says so, and goes on by itself."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess

import msgspec
import pytest
from daemon_jobs import QUICK, job

from esperd.config import Storage
from esperd.daemon.space import RESERVE_FILE, Level, Space, next_level
from esperd.errors import ReadOnly
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted
from esperd.store.filesystem import RealFilesystem
from esperd.store.reserve import Reserve
from esperd.testing import first_event, running_daemon, until

SETTINGS = Storage(min_free_bytes=1000, reserve_bytes=100)


class SmallDisk(RealFilesystem):
    """A disk with as much room as the test says, less what the reserve takes."""

    def __init__(self, free):
        self.free = free
        self.fail_at = None
        self.calls = 0

    def _count(self):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def free_bytes(self, path):
        self._count()
        return self.free

    def create(self, path, mode):
        self._count()
        return super().create(path, mode)

    def allocate(self, descriptor, size_bytes):
        self._count()
        if size_bytes > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(descriptor, size_bytes)
        self.free -= size_bytes

    def fsync(self, descriptor):
        self._count()
        super().fsync(descriptor)

    def unlink(self, path):
        self._count()
        self.free += path.stat().st_size
        super().unlink(path)


@pytest.mark.parametrize(
    ("before", "free", "refused", "held", "after"),
    [
        (Level.OK, 1000, False, True, Level.OK),
        (Level.OK, 999, False, True, Level.LOW),
        (Level.OK, 99, False, True, Level.FULL),
        (Level.OK, 10**9, True, True, Level.FULL),  # a quota, or a database that may not grow
        (Level.LOW, 1050, False, True, Level.LOW),  # not at the first byte: a checkpoint would turn it off again
        (Level.LOW, 1100, False, True, Level.OK),
        (Level.FULL, 1150, False, False, Level.FULL),  # of which the reserve takes 100
        (Level.FULL, 1200, False, False, Level.OK),
    ],
)
def test_the_disk_stands_where_its_free_bytes_put_it(before, free, refused, held, after):
    assert next_level(before, free, refused=refused, reserve_held=held, settings=SETTINGS) is after


def test_a_full_disk_gets_the_reserve_and_when_there_is_room_the_reserve_is_taken_again(tmp_path):
    disk = SmallDisk(5000)
    space = Space(tmp_path, SETTINGS, disk)
    space.look()
    assert (space.level, disk.free, (tmp_path / RESERVE_FILE).stat().st_size) == (Level.OK, 4900, 100)
    space.require_room()
    disk.free = 500
    space.look()
    assert (space.level, (tmp_path / RESERVE_FILE).exists()) == (Level.LOW, True)
    with pytest.raises(ReadOnly, match=r"the disk of .* is low \(free: 500 bytes, storage.min_free_bytes = 1,000\)") as refusal:
        space.require_room()
    assert refusal.value.fields["retry_after_s"] > 0
    space.refused()
    assert (space.level, disk.free) == (Level.FULL, 600)  # at once: what was refused is tried again soon
    space.look()
    assert not (tmp_path / RESERVE_FILE).exists()
    disk.free = 5000
    space.look()
    assert (space.level, space.trouble, (tmp_path / RESERVE_FILE).exists()) == (Level.OK, "", True)


def test_whichever_call_fails_the_disk_counts_as_full_and_the_next_look_finds_it_well(tmp_path):
    counted = SmallDisk(5000)
    (tmp_path / "counted").mkdir()
    Space(tmp_path / "counted", SETTINGS, counted).look()
    assert counted.calls == 4
    for number in range(1, counted.calls + 1):
        directory = tmp_path / f"failing-{number}"
        directory.mkdir()
        disk = SmallDisk(5000)
        disk.fail_at = number
        space = Space(directory, SETTINGS, disk)
        space.look()
        assert (space.level, list(directory.iterdir())) == (Level.FULL, [])
        space.look()
        assert (space.level, Reserve(directory / RESERVE_FILE, 100).held) == (Level.OK, True)


@pytest.fixture
def tmpfs(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))


@pytest.mark.asyncio
async def test_on_a_disk_that_fills_up_the_daemon_is_read_only_until_there_is_room_and_its_job_succeeds(tmpfs):
    config = msgspec.structs.replace(QUICK, storage=Storage(min_free_bytes=4 * 2**20, reserve_bytes=2**20))
    with running_daemon(tmpfs / "state", config) as daemon:
        async with daemon.client() as esper:
            handle = await esper.submit(job(40, host_options={"delay_s": 0.004}))
            await first_event(handle, EpochCompleted)
            fill(tmpfs / "others")

            async def rests():
                return (await handle.info()).state is JobState.QUEUED

            await until(rests)
            with pytest.raises(ReadOnly, match="is full"):
                await esper.submit(job(1))
            assert not (tmpfs / "state" / RESERVE_FILE).exists()
            (tmpfs / "others").unlink()
            ended = await handle.wait()
            assert (ended.state, ended.epoch, ended.error) == (JobState.SUCCEEDED, 40, None)
            await (await esper.submit(job(1))).cancel()
            assert (tmpfs / "state" / RESERVE_FILE).stat().st_size == 2**20
