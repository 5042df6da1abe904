"""A user and a job: submitted once, paused, resumed, cancelled, at any moment of its life."""

from __future__ import annotations

import pytest
from daemon_jobs import job

from esperd.errors import Conflict, IllegalTransition, JobNotFound, NothingToShow
from esperd.messages.control import ActorState
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import EpochCompleted, JobStateChanged, TrainingStarted
from esperd.testing import children_of, first_event, process_id, until


def is_now(state):
    return lambda event: event.body.state is state


async def states(handle):
    return [event.body.state.value for event in await handle.events() if isinstance(event.body, JobStateChanged)]


@pytest.mark.asyncio
async def test_a_running_job_is_listed_with_its_worker_paused_resumed_where_it_stood_and_cancelled(daemon):
    async with daemon.client() as esper:
        handle = await esper.submit(job(checkpoint_every_s=1e6))  # no checkpoint but the one that pausing takes
        await first_event(handle, EpochCompleted, lambda event: event.body.epoch >= 2)
        (worker,) = [actor for actor in (await esper.actors()).actors if actor.name == f"trainer/{handle.id}.1"]
        assert (worker.state, worker.generation, worker.restarts) == (ActorState.RUNNING, 1, 0)
        assert process_id(worker.pid) in children_of(daemon.pid)

        async def tells_of_its_breakers():  # with its next heartbeat
            (worker,) = [actor for actor in (await esper.actors()).actors if actor.name == f"trainer/{handle.id}.1"]
            return [found.service for found in worker.breakers] == ["policy", "cache", "telemetry"]

        await until(tells_of_its_breakers)
        assert (await handle.pause()).state is JobState.RUNNING  # recorded; its worker stops by itself
        paused = await first_event(handle, JobStateChanged, is_now(JobState.PAUSED))
        info = await handle.info()
        assert (info.attempt, info.error) == (1, None)
        assert info.epoch >= 2
        assert info.checkpoint is not None
        with pytest.raises(IllegalTransition, match="paused"):
            await handle.pause()

        assert (await handle.resume()).state is JobState.QUEUED
        started = await first_event(handle, TrainingStarted, after=paused.sequence)
        assert started.body.epoch == info.epoch
        with pytest.raises(IllegalTransition, match="only a paused one"):
            await handle.resume()

        await handle.cancel()
        assert (await handle.wait()).state is JobState.CANCELLED
        assert await states(handle) == ["queued", "leased", "running", "paused", "queued", "leased", "running", "cancelled"]
        with pytest.raises(IllegalTransition, match="cancelled"):
            await handle.resume()
        with pytest.raises(NothingToShow, match="cancelled"):
            await handle.report()


@pytest.mark.asyncio
async def test_what_is_asked_of_a_job_while_its_worker_starts_is_done_as_soon_as_it_can(daemon):
    async with daemon.client() as esper:
        paused, cancelled = await esper.submit(job()), await esper.submit(job())
        for handle in (paused, cancelled):
            await first_event(handle, JobStateChanged, is_now(JobState.LEASED))
        assert (await paused.pause()).state is JobState.LEASED
        assert (await cancelled.cancel()).state is JobState.LEASED
        await first_event(paused, JobStateChanged, is_now(JobState.PAUSED))
        assert (await cancelled.wait()).state is JobState.CANCELLED
        for handle in (paused, cancelled):
            info = await handle.info()
            assert (info.attempt, info.error) == (1, None)  # no worker was lost over it
        assert (await paused.cancel()).state is JobState.CANCELLED


@pytest.mark.asyncio
async def test_a_job_submitted_twice_under_one_key_runs_once_and_another_under_it_is_a_conflict(daemon):
    async with daemon.client() as esper:
        first = await esper.submit(job(1, name="once"), idempotency_key="breakfast")
        again = await esper.submit(job(1, name="once"), idempotency_key="breakfast")
        assert (first.duplicate, again.duplicate, again.id) == (False, True, first.id)
        with pytest.raises(Conflict, match=first.id):
            await esper.submit(job(2, name="once"), idempotency_key="breakfast")
        assert [info.id for info in await esper.jobs() if info.name == "once"] == [first.id]
        await first.cancel()


@pytest.mark.asyncio
async def test_an_unknown_job_is_not_found_whatever_is_asked_of_it(daemon):
    async with daemon.client() as esper:
        nobody = esper.job("j00000000")
        for ask in (nobody.info, nobody.pause, nobody.resume, nobody.cancel, nobody.report, nobody.wait):
            with pytest.raises(JobNotFound, match="esper jobs"):
                await ask()
