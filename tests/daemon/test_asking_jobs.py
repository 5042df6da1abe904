"""What the daemon asks of its jobs actor: whatever the answer is, the daemon goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from esperd.config import Config
from esperd.daemon.process import _Daemon
from esperd.errors import ActorUnavailable, HandlerFailed
from esperd.messages.base import Done
from esperd.messages.leases import DrainJobs, LetGoOfFailed


class Enough(Exception):
    """The daemon has gone on for long enough."""


@pytest.mark.asyncio
@pytest.mark.parametrize("refusal", [HandlerFailed("OSError: [Errno 5] Input/output error"), ActorUnavailable("restarts")])
async def test_a_jobs_actor_that_fails_to_drain_or_to_let_go_is_asked_again_and_ends_nothing(refusal):
    asked = []

    async def ask(_name, message):
        asked.append(type(message))
        if len(asked) == 1:
            raise refusal
        return Done()

    async def sleep(_seconds):
        if len(asked) > 1:
            raise Enough

    clock = SimpleNamespace(wall=lambda: 0.0, monotonic=lambda: 0.0, sleep=sleep)
    daemon, system = SimpleNamespace(_config=Config(), _clock=clock), SimpleNamespace(ask=ask)
    with pytest.raises(Enough):
        await _Daemon._let_go_of_failed(daemon, system)
    assert asked == [LetGoOfFailed, LetGoOfFailed]
    asked.clear()
    await _Daemon._ask_to_drain(daemon, system)
    assert asked == [DrainJobs, DrainJobs]
