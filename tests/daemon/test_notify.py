"""The protocol of a service manager: what is sent, to whom, and when the watchdog gets nothing."""

from __future__ import annotations

import contextlib
import secrets
import socket
import sqlite3
import time
from pathlib import Path

import anyio
import pytest

from esperd.actors.clock import SystemClock
from esperd.daemon import job_tables
from esperd.daemon.job_store import JobStore
from esperd.daemon.notify import Notifier, Standing, feed_watchdog, status_line
from esperd.errors import ActorUnavailable
from esperd.store.database import Database
from esperd.testing import until

PERIOD_S = 0.02
"""Of the watchdog."""


@contextlib.contextmanager
def listening(address):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(address)
        yield manager


def heard(manager):
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(manager.recv(4096).decode())
    return found


def log_bytes(database):
    return Path(f"{database}-wal").stat().st_size


@contextlib.asynccontextmanager
async def fed(tmp_path, prove):
    """A watchdog that is fed as long as the block lasts."""
    with listening(str(tmp_path / "notify")) as manager:
        notifier = Notifier(str(tmp_path / "notify"), PERIOD_S)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed_watchdog, notifier, prove, SystemClock())
            yield manager
            tasks.cancel_scope.cancel()
        notifier.close()


async def until_fed(manager):
    async def is_fed():
        return "WATCHDOG=1" in heard(manager)

    await until(is_fed)


def test_everything_said_at_once_is_one_datagram_and_one_line_each(tmp_path):
    for address in (str(tmp_path / "notify"), f"@esperd-{secrets.token_hex(8)}"):
        with listening(address.replace("@", "\0")) as manager, contextlib.closing(Notifier(address)) as notifier:
            assert notifier.send(READY=1, STATUS="a reason\nREADY=0")
            assert heard(manager) == ["READY=1\nSTATUS=a reason READY=0"]


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "/no/such/socket"])
def test_a_manager_that_is_not_there_is_no_reason_to_stop(address):
    with contextlib.closing(Notifier(address)) as notifier:
        assert not notifier.send(READY=1)
        anyio.run(notifier.reloading)


def test_the_variables_of_the_manager_are_not_handed_on_to_workers():
    environment = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7", "HOME": "/"}
    with contextlib.closing(Notifier.from_environment(environment, 7)) as notifier:
        assert (notifier.is_heard, notifier.watchdog_s) == (True, 3.0)
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize(
    "variables", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}]
)
def test_a_watchdog_that_watches_nobody_or_another_process_is_not_fed(variables):
    with contextlib.closing(Notifier.from_environment(dict(variables), 7)) as notifier:
        assert notifier.watchdog_s is None


@pytest.mark.asyncio
async def test_a_blocked_loop_does_not_feed_the_watchdog(tmp_path):
    async def prove():
        pass

    async with fed(tmp_path, prove) as manager:
        await until_fed(manager)
        heard(manager)
        time.sleep(5 * PERIOD_S)  # noqa: ASYNC251 - the loop is blocked on purpose
        assert heard(manager) == []
        await until_fed(manager)


@pytest.mark.asyncio
async def test_a_watchdog_is_fed_only_after_a_proof_and_again_as_soon_as_there_is_one(tmp_path):
    proves = anyio.Event()
    tried = []

    async def prove():
        tried.append(None)
        if len(tried) == 1:
            await anyio.sleep_forever()
        if not proves.is_set():
            raise ActorUnavailable("jobs crashed and is being restarted")

    async def tried_thrice():
        return len(tried) >= 3

    async with fed(tmp_path, prove) as manager:
        await until(tried_thrice)
        assert heard(manager) == []
        proves.set()
        await until_fed(manager)


@pytest.mark.asyncio
async def test_a_database_that_is_stuck_proves_nothing_and_one_that_writes_does(tmp_path):
    path = tmp_path / "jobs.db"
    async with Database.open(path, job_tables.MIGRATIONS) as database:
        store = JobStore(database, time.time)
        before = log_bytes(path)
        await store.prove()
        assert log_bytes(path) > before  # a commit, not only a question

        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with fed(tmp_path, store.prove) as manager:
                await anyio.sleep(5 * PERIOD_S)
                assert heard(manager) == []
                other.rollback()
                await until_fed(manager)


def test_the_status_line_says_what_is_known_and_no_more():
    assert status_line(Standing([], 1, 2)) == "ready; jobs: 1 running, 2 queued"
    trouble = Standing(["draining", "store: full"], 0, None, "reloaded: nothing changed")
    assert status_line(trouble) == "not ready: draining, store: full; jobs: 0 running, unknown queued; reloaded: nothing changed"
