"""What SIGUSR1 writes: every actor, every task with its calls, counts of what died; and nothing that anybody said."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from esperd.actors.system import ActorSystem
from esperd.daemon.dump import dump, stack_of
from esperd.logs import configure_logging


async def inner(release, secret):
    await release.wait()
    return secret


async def outer(release):
    return await inner(release, "a secret of a local variable")


@pytest.fixture(autouse=True)
def _logs_as_they_were():
    """What is configured here writes to this test's stderr, which is closed behind it."""
    yield
    structlog.reset_defaults()


@pytest.mark.asyncio
async def test_a_dump_tells_where_a_task_waits_and_none_of_its_values(capsys):
    release = asyncio.Event()
    configure_logging("error")  # what was asked for is told whatever the level
    task = asyncio.create_task(outer(release), name="waiting")
    await asyncio.sleep(0)
    async with ActorSystem() as system:
        told = dump(system.status(), {"expired": 3}, asyncio.all_tasks())
    configure_logging("info")
    text = capsys.readouterr().err
    assert len(text.splitlines()) == told
    assert '"counts": {"expired": 3}' in text
    assert "secret" not in text
    calls = [call.rpartition(" ")[2] for call in stack_of(task)]
    assert calls == ["outer", "inner", "Event.wait"]
    release.set()
    assert await task == "a secret of a local variable"
