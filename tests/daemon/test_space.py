"""A disk that fills up: the daemon keeps what it has, takes nothing new, says so, and goes on by itself."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import subprocess
import tempfile
import urllib.request

import anyio
import msgspec
import pytest
from daemon_jobs import QUICK, job

from esperd.config import Storage
from esperd.daemon.process import SPACE_LOOK_S
from esperd.daemon.space import RESERVE_FILE, Level, Space, next_level
from esperd.errors import ConfigError, ReadOnly, StoreFailed
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted
from esperd.store.filesystem import RealFilesystem
from esperd.store.refusal import Refusal, refusal_of
from esperd.store.reserve import Reserve
from esperd.testing import first_event, running_daemon, until

SETTINGS = Storage(min_free_bytes=1000, reserve_bytes=100)


class SmallDisk(RealFilesystem):
    """A disk with as much room as the test says, less what the reserve takes."""

    def __init__(self, free):
        self.free = free
        self.fail_at = None
        self.broken = None
        self.calls = 0

    def _count(self):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(self, descriptor, data):
        if self.broken is not None:
            raise OSError(self.broken, os.strerror(self.broken))
        super().write(descriptor, data)

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
    ("before", "free", "refusal", "held", "after"),
    [
        (Level.OK, 1000, None, True, Level.OK),
        (Level.OK, 999, None, True, Level.LOW),
        (Level.OK, 99, None, True, Level.FULL),
        (Level.OK, 10**9, Refusal.NO_ROOM, True, Level.FULL),  # a quota, or a database that may not grow
        (Level.LOW, 1050, None, True, Level.LOW),  # not at the first byte: a checkpoint would turn it off again
        (Level.LOW, 1100, None, True, Level.OK),
        (Level.FULL, 1150, None, False, Level.FULL),  # of which the reserve takes 100
        (Level.FULL, 1200, None, False, Level.OK),
        (Level.OK, 10**9, Refusal.FAILING, True, Level.FAILING),
        (Level.FULL, 0, Refusal.FAILING, False, Level.FAILING),
        (Level.OK, 10**9, Refusal.UNCLEAR, True, Level.FAILING),  # there is room, and yet it was refused
        (Level.FAILING, 999, Refusal.UNCLEAR, True, Level.FULL),
        (Level.FAILING, 1100, None, True, Level.OK),
        (Level.FAILING, 1050, None, True, Level.LOW),
    ],
)
def test_the_disk_stands_where_its_free_bytes_put_it(before, free, refusal, held, after):
    assert next_level(before, free, refusal=refusal, reserve_held=held, settings=SETTINGS) is after


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
    assert "goes on by itself at 1,100 bytes" in str(refusal.value)
    space.refused(Refusal.NO_ROOM, "database or disk is full")
    assert (space.level, disk.free) == (Level.FULL, 600)  # at once: what was refused is tried again soon
    space.look()
    assert not (tmp_path / RESERVE_FILE).exists()
    assert "goes on by itself at 1,200 bytes" in space.trouble  # of which the reserve takes 100
    disk.free = 1199
    space.look()
    assert space.level is Level.FULL
    disk.free = 1200
    space.look()
    assert (space.level, space.trouble, (tmp_path / RESERVE_FILE).exists()) == (Level.OK, "", True)


def test_whichever_call_fails_the_disk_counts_as_failing_and_the_next_look_finds_it_well(tmp_path):
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
        assert (space.level, list(directory.iterdir())) == (Level.FAILING, [])
        assert "Input/output error" in space.trouble
        space.look()
        assert (space.level, Reserve(directory / RESERVE_FILE, 100).held) == (Level.OK, True)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (errno.ENOSPC, Refusal.NO_ROOM),
        (errno.EDQUOT, Refusal.NO_ROOM),
        (errno.EIO, Refusal.FAILING),
        (errno.EROFS, Refusal.FAILING),
        (errno.EACCES, None),
    ],
)
def test_a_disk_without_room_is_told_from_one_that_fails(error, refusal):
    assert refusal_of(OSError(error, os.strerror(error))) is refusal


def test_what_sqlite_leaves_unclear_a_write_of_ones_own_tells_and_a_disk_that_fails_keeps_its_reserve(tmp_path):
    disk = SmallDisk(5000)
    space = Space(tmp_path, SETTINGS, disk)
    space.look()
    for code, level in ((errno.EIO, Level.FAILING), (errno.EROFS, Level.FAILING), (errno.EDQUOT, Level.FULL)):
        disk.broken = code
        space.refused(Refusal.UNCLEAR, "disk I/O error (SQLITE_IOERR_WRITE)")
        assert "is failing (disk I/O error (SQLITE_IOERR_WRITE))" in space.trouble
        space.look()
        assert (space.level, (tmp_path / RESERVE_FILE).exists()) == (level, level is Level.FAILING)
        with pytest.raises(ReadOnly, match=f"is {level}"):
            space.require_room()
        disk.broken = None
        space.look()
        assert (space.level, [file.name for file in tmp_path.iterdir()]) == (Level.OK, [RESERVE_FILE])


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
            handle = await esper.submit(job(16, host_options={"delay_s": 0.004}))
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
            assert (ended.state, ended.epoch, ended.error) == (JobState.SUCCEEDED, 16, None)
            await (await esper.submit(job(1))).cancel()
            assert (tmpfs / "state" / RESERVE_FILE).stat().st_size == 2**20


@pytest.mark.asyncio
async def test_on_a_disk_that_fails_the_daemon_is_read_only_says_so_and_feeds_no_watchdog_until_it_works(tmp_path):
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with manager, tempfile.TemporaryDirectory() as place:
        manager.bind(f"{place}/notify")
        environment = {"NOTIFY_SOCKET": f"{place}/notify", "WATCHDOG_USEC": "100000"}

        def heard():
            with contextlib.suppress(BlockingIOError):
                while True:
                    yield manager.recv(4096).decode()

        with running_daemon(tmp_path / "state", QUICK, environment=environment) as daemon:

            def told():
                with urllib.request.urlopen(f"{daemon.http_url}/v1/status", timeout=10) as answer:
                    return json.load(answer)

            async def stands(level):
                return told()["disk"] == level

            _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
            # Every proof writes a page to the log of jobs.db; from here on the operating system refuses the next one (EFBIG),
            # which SQLite tells as it tells EIO.
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (2**15, hard))
            await until(lambda: stands("failing"))
            [reason] = [reason for reason in told()["reasons"] if reason.startswith("read-only")]
            assert "is failing (" in reason
            assert "jobs.db: disk I/O error (SQLITE_IOERR_WRITE)" in reason
            async with daemon.client() as esper:
                with pytest.raises(ReadOnly, match="is failing") as refused:
                    await esper.submit(job(1))
                assert refused.value.fields["level"] == "failing"
                await anyio.sleep(1.5 * SPACE_LOOK_S)  # so that a look found that a small file is taken, and jobs.db is not
                list(heard())
                await anyio.sleep(1.0)
                assert await stands("failing")
                assert "WATCHDOG=1" not in list(heard())
                resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (hard, hard))
                await until(lambda: stands("ok"))

                async def fed():
                    return "WATCHDOG=1" in list(heard())

                async def takes_work():
                    return told()["ready"]

                await until(fed)
                await until(takes_work)


def test_a_daemon_on_a_disk_that_was_mounted_read_only_ends_as_one_that_may_be_started_again_and_is_when_it_is_mended(tmpfs):
    config = msgspec.structs.replace(QUICK, storage=Storage(min_free_bytes=2**20, reserve_bytes=2**20))
    with running_daemon(tmpfs / "state", config) as daemon:
        daemon.terminate()
        assert daemon.wait() == 0
        subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
        with pytest.raises(StoreFailed, match="the disk refuses: Read-only file system"):
            daemon.start()
        assert daemon.process.returncode == StoreFailed.exit_status != ConfigError.exit_status
        subprocess.run(["mount", "-o", "remount,rw", str(tmpfs)], check=True)
        daemon.start()
