"""A daemon that stops, is stopped at once, is killed, or may not start: no job is lost, no process stays."""

from __future__ import annotations

import shutil
import socket
import time

import pytest
from daemon_jobs import PROJECT, QUICK, SHORT_HEARTBEATS, job

from esperd.daemon.job_store import JobStore
from esperd.daemon.job_tables import MIGRATIONS
from esperd.errors import AddressUnavailable, DaemonUnreachable, StateDirectoryLocked, StateDirectoryUnusable
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import CheckpointSaved, EpochCompleted, JobStateChanged, TrainingStarted
from esperd.store.database import Database
from esperd.testing import DaemonProcess, children_of, first_event, process_id, running_daemon, until


async def states(handle):
    return [event.body.state.value for event in await handle.events() if isinstance(event.body, JobStateChanged)]


async def worker_of(esper, handle):
    (worker,) = [a for a in (await esper.actors()).actors if a.name.startswith(f"trainer/{handle.id}.") and a.pid is not None]
    return process_id(worker.pid)


async def gone(processes):
    async def all_ended():
        return not any(process.is_alive for process in processes)

    await until(all_ended)


@pytest.mark.asyncio
async def test_sigterm_drains_a_second_one_stops_at_once_and_the_job_stays_resumable(tmp_path):
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    # Long epochs, so that signals come in the middle of one; no checkpoint but the one that draining takes.
    slow = job(host_options={"delay_s": 0.02}, batch_size=8, workdir=str(project), checkpoint_every_s=1e6)
    with running_daemon(tmp_path / "state", QUICK) as daemon:
        async with daemon.client() as esper:
            handle = await esper.submit(slow)
            await first_event(handle, EpochCompleted)
            processes = children_of(daemon.pid)
            daemon.terminate()
        assert daemon.wait() == 0
        assert len(processes) == 2  # compiler and worker
        assert not any(process.is_alive for process in processes)
        with pytest.raises(DaemonUnreachable, match="start one with `esperd run`"):
            async with daemon.client():
                pass

        daemon.start()
        async with daemon.client() as esper:
            handle = esper.job(handle.id)
            resumed = await first_event(handle, TrainingStarted, lambda event: event.body.epoch >= 1)
            assert await states(handle) == ["queued", "leased", "running", "queued", "leased", "running"]
            drained = [event for event in await handle.events() if isinstance(event.body, CheckpointSaved)]
            assert [event.body.epoch for event in drained] == [resumed.body.epoch]
            assert (await handle.info()).checkpoint == drained[0].body.sha256
            (project / "stuck").touch()  # no step ends any more, so nothing can be drained

            async def standing():
                return (project / "standing").exists()

            await until(standing)
            processes = children_of(daemon.pid)
            daemon.terminate()

            async def draining():
                return daemon.log().count('"event": "draining"') == 2

            await until(draining)
            daemon.terminate()
        assert daemon.wait(timeout_s=20.0) == 1
        assert not any(process.is_alive for process in processes)

        async with Database.open(tmp_path / "state" / "jobs.db", MIGRATIONS) as database:
            left = await JobStore(database, time.time).get(handle.id)
        assert (left.state, left.checkpoint, left.error) == (JobState.QUEUED, drained[0].body.sha256, None)


@pytest.mark.asyncio
async def test_a_killed_daemon_goes_on_with_its_jobs_and_orphans_leave_by_themselves(tmp_path):
    with running_daemon(tmp_path / "state", SHORT_HEARTBEATS) as daemon:
        async with daemon.client() as esper:
            handle = await esper.submit(job(60))
            waiting = await esper.submit(job(name="waits for its turn"))
            await first_event(handle, CheckpointSaved, lambda event: event.body.epoch >= 3)
            worker = await worker_of(esper, handle)
            orphans = children_of(daemon.pid)
            daemon.kill()
        assert worker in orphans
        await gone(orphans)

        daemon.start()
        async with daemon.client() as esper:
            handle, waiting = esper.job(handle.id), esper.job(waiting.id)
            assert (await waiting.cancel()).attempt == 0
            info = await handle.wait()
            assert (info.state, info.epoch, info.attempt, info.error) == (JobState.SUCCEEDED, 60, 2, None)
            assert (await handle.report()).resumed == 1
            assert await states(handle) == ["queued", "leased", "running", "queued", "leased", "running", "succeeded"]
            events = await handle.events()
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            assert [event.body.epoch >= 3 for event in events if isinstance(event.body, TrainingStarted)] == [False, True]


def test_a_state_directory_has_one_daemon_and_the_second_names_it(daemon):
    second = DaemonProcess(daemon.state_directory)
    with pytest.raises(StateDirectoryLocked, match=f"process {daemon.pid};"):
        second.start()
    second.close()
    assert second.process.returncode == 5


def test_a_state_directory_that_cannot_be_written_is_named(tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    environment = {"ESPERD__DAEMON__STATE_DIRECTORY": str(in_the_way), "NOTIFY_SOCKET": str(tmp_path / "notify")}
    daemon = DaemonProcess(tmp_path / "state", environment=environment)
    with pytest.raises(StateDirectoryUnusable, match=f"{in_the_way} cannot be written"):
        daemon.start()
    daemon.close()
    assert daemon.process.returncode == 2
    with manager:
        assert manager.recv(4096).startswith(f"STATUS=failed: {in_the_way} cannot be written".encode())


def test_an_http_port_that_is_taken_is_named_and_nothing_is_left_running(daemon, tmp_path):
    port = daemon.http_url.rpartition(":")[2]
    second = DaemonProcess(tmp_path / "state", environment={"ESPERD__HTTP__PORT": port})
    with pytest.raises(AddressUnavailable, match=rf"{port} cannot be bound: Address already in use; .*set http\.port"):
        second.start()
    second.close()
    assert second.process.returncode == 1  # its manager tries again: the port may be free by then
