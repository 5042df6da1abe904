"""The daemon as systemd sees it: one real daemon and a socket that hears what it says."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import sys
import time
from pathlib import Path

import anyio
import msgspec
import pytest
from daemon_jobs import job

from esperd.actors.clock import SystemClock
from esperd.actors.system import ActorSystem
from esperd.cli.settings import as_toml
from esperd.client import Client
from esperd.config import Config, Jobs
from esperd.daemon.notify import Notifier, Standing
from esperd.daemon.service import Service
from esperd.errors import Busy
from esperd.testing import running_daemon, until

WATCHDOG_S = 0.4
ONE_WORKER = Config(jobs=Jobs(max_running=1))


class Manager:
    """What a service manager hears."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(str(path))
        self.heard = []

    def listen(self):
        while True:
            try:
                datagram = self.socket.recv(65536).decode()
            except BlockingIOError:
                return self.heard
            self.heard.append(dict(line.split("=", 1) for line in datagram.splitlines()))

    def forget(self):
        self.listen()
        self.heard.clear()

    async def hear(self, **wanted):
        """The first datagram that says all this; a value may be part of what is said."""

        def says(datagram):
            return all(value in datagram.get(name, "\0") for name, value in wanted.items())

        async def heard():
            return any(map(says, self.listen()))

        await until(heard)
        return next(datagram for datagram in self.heard if says(datagram))


def stands_still(pid):
    async def is_stopped():
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"  # noqa: ASYNC240 - no disk

    return is_stopped


def records(daemon, event):
    return [record for line in daemon.log().splitlines() if (record := json.loads(line)).get("event") == event]


@pytest.mark.asyncio
async def test_a_daemon_whose_terminal_was_closed_ends_instead_of_reading_its_configuration(monkeypatch):
    terminal, standard_error = pty.openpty()
    with os.fdopen(standard_error, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)

        async def standing():
            return Standing([], 0, 0)

        async def signals():
            yield signal.SIGHUP
            os.close(terminal)
            yield signal.SIGHUP

        read = []
        service = Service(
            Notifier(),
            SystemClock(),
            standing,
            read_again=lambda: read.append(None) or Config(),
            in_force=Config,
            apply=lambda config: None,
        )
        async with ActorSystem() as system:
            await service.obey(signals(), system)
        assert (len(read), service.stops.qsize()) == (1, 1)
        stream.write("this would raise if it still went to the terminal\n")


@pytest.mark.asyncio
async def test_a_service_manager_hears_the_truth_from_ready_to_the_end(tmp_path):
    manager = Manager(tmp_path / "notify")
    told = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
    with contextlib.closing(manager.socket), running_daemon(tmp_path / "state", ONE_WORKER, environment=told) as daemon:
        assert "; jobs: 0 running, 0 queued" in (await manager.hear(READY="1"))["STATUS"]
        assert any("EXTEND_TIMEOUT_USEC" in heard for heard in manager.heard)
        file = daemon.runtime_directory / "esperd.toml"
        async with Client(daemon.endpoint, patience_s=0.0) as esper:
            await esper.submit(job(host_options={"delay_s": 25.0}))  # so that it is not drained at once
            await manager.hear(STATUS="; jobs: 1 running, 0 queued")

            # The watchdog is fed while the daemon lives, and not while its loop stands still.
            await manager.hear(WATCHDOG="1")
            os.kill(daemon.pid, signal.SIGSTOP)
            await until(stands_still(daemon.pid))
            manager.forget()
            await anyio.sleep(2 * WATCHDOG_S)
            assert manager.listen() == []
            os.kill(daemon.pid, signal.SIGCONT)
            await manager.hear(WATCHDOG="1")

            # A changed file: live keys apply, the others are named.
            wanted = msgspec.structs.replace(
                ONE_WORKER,
                jobs=msgspec.structs.replace(ONE_WORKER.jobs, max_queued=1),
                cache=msgspec.structs.replace(ONE_WORKER.cache, memory_bytes=1),
            )
            right = as_toml(daemon._complete(wanted))
            file.write_text(right, encoding="utf-8")
            manager.forget()
            daemon.process.send_signal(signal.SIGHUP)
            reloaded = await manager.hear(READY="1", STATUS="a restart is needed for cache.memory_bytes")
            assert "reloaded: jobs.max_queued: 1000 -> 1;" in reloaded["STATUS"]
            (reloading,) = [heard for heard in manager.heard if "RELOADING" in heard]
            assert 0 < int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            assert manager.heard.index(reloading) < manager.heard.index(reloaded)
            await esper.submit(job())
            await manager.hear(STATUS="; jobs: 1 running, 1 queued")
            with pytest.raises(Busy, match=r"jobs\.max_queued = 1;"):
                await esper.submit(job())

            # A broken file: nothing changes, and it says so.
            file.write_text(right.replace("max_running", "max_runing"), encoding="utf-8")
            daemon.process.send_signal(signal.SIGHUP)
            await manager.hear(READY="1", STATUS="reload failed, the configuration stays as it was: ")
            (failed,) = records(daemon, "reload failed, the configuration stays as it was")
            assert "max_runing" in failed["error"]

            daemon.process.send_signal(signal.SIGUSR1)

            async def dumped():
                return bool(records(daemon, "dump: done"))

            await until(dumped)
            assert {record["name"] for record in records(daemon, "dump: actor")} >= {"jobs", "cache", "policy", "telemetry"}
            stacks = {record["task"]: record["stack"] for record in records(daemon, "dump: task")}
            assert any("feed_watchdog" in call for stack in stacks.values() for call in stack)

            manager.forget()
            daemon.terminate()
            assert (await manager.hear(STOPPING="1"))["STATUS"].startswith("not ready: draining")
            await manager.hear(EXTEND_TIMEOUT_USEC="10000000")
            # What systemd does when the watchdog was not fed: the log says where the daemon stood.
            daemon.process.send_signal(signal.SIGABRT)
            assert daemon.wait() == -signal.SIGABRT
        assert "Fatal Python error: Aborted" in daemon.log()
