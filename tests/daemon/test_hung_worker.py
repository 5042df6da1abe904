"""A worker that hangs, however well its link beats, holds up neither its user nor the queue."""

from __future__ import annotations

import contextlib

import anyio
import msgspec
import pytest
from daemon_jobs import QUICK, job
from test_checkpoints import written
from test_jobs_actor import locked, office

from esperd.config import Config, Daemon, Jobs, Workers
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.held import Held
from esperd.daemon.jobs_actor import POLL_S
from esperd.daemon.worker_processes import worker_name
from esperd.errors import WorkerFailed
from esperd.messages.failures import AnalyseFailure
from esperd.messages.jobs import JobState, PauseJob, ResumeJob
from esperd.messages.leases import JobStarted, JobStopped, StopJob
from esperd.messages.telemetry import JobStateChanged
from esperd.store import database
from esperd.testing import first_event, running_daemon, until

IMPATIENT = Config(
    daemon=Daemon(drain_timeout_s=1.0),
    jobs=Jobs(max_running=1, max_attempts=1),
    workers=Workers(stall_timeout_s=4.0),
)


@pytest.mark.asyncio
async def test_a_hung_job_is_cancelled_and_makes_room_for_another_which_hangs_unasked_and_is_noticed(tmp_path):
    with running_daemon(tmp_path / "state", IMPATIENT) as daemon:
        async with daemon.client() as esper:
            hung, other = [await esper.submit(job(data="samples:never", name=name)) for name in ("hung", "other")]
            await first_event(hung, JobStateChanged, lambda event: event.body.state is JobState.LEASED)
            await hung.cancel()
            over = await hung.wait()
            assert (over.state, over.attempt, over.error.code) == (JobState.CANCELLED, 1, WorkerFailed.code)
            assert "did not stop within 1 s after it was told to (cancel)" in over.error.message

            dead = await other.wait()
            assert (dead.state, dead.attempt, dead.error.code) == (JobState.DEAD, 1, WorkerFailed.code)
            assert "hung and was killed: it stood at step 0 for 4 s" in dead.error.message
            assert "raise workers.stall_timeout_s" in dead.error.message
            assert "samples.py" in dead.error.message, "it told where it hung"
            found = await other.failure()
            assert [attempt.ended for attempt in found.attempts] == ["lost"]
            assert "workers.stall_timeout_s" in found.advice[0]


@contextlib.asynccontextmanager
async def impatient_office(directory, drain_timeout_s=0.2):
    """Workers that hang: they take a lease and never report."""
    async with office(directory) as here:
        here.config = msgspec.structs.replace(QUICK, daemon=Daemon(drain_timeout_s=drain_timeout_s))
        await here.open()
        job_id = await here.submit()
        await here.leased(job_id, 1)
        await here.ask(JobStarted(job_id=job_id, generation=1))
        yield here, job_id


async def is_gone(here, job_id, generation):
    """Once the jobs actor has let go of a worker."""

    async def let_go():
        return worker_name(job_id, generation) not in here.actor._held

    await until(let_go)


@pytest.mark.asyncio
async def test_a_pause_that_a_hung_worker_does_not_hear_pauses_the_job_at_its_last_checkpoint_and_spends_no_attempt(tmp_path):
    async with impatient_office(tmp_path) as (here, job_id):
        sha256 = await written(here, Checkpoints(tmp_path / "checkpoints"), job_id, b"one", epoch=3)
        here.store.limits = Jobs(max_attempts=1)
        for attempt in (1, 2):
            worker = await here.leased(job_id, attempt)
            await here.ask(PauseJob(id=job_id))
            paused = await here.becomes(job_id, JobState.PAUSED)
            assert worker.told[1:] == [StopJob(why="pause")]
            assert (paused.checkpoint, paused.epoch) == (sha256, 3)
            assert "did not stop within 0.2 s after it was told to (pause)" in paused.error.message
            await here.ask(ResumeJob(id=job_id))
        await here.leased(job_id, 3)
        found = await here.ask(AnalyseFailure(id=job_id))
        assert {attempt.ended for attempt in found.attempts[:-1]} == {"stopped"}
        assert "daemon.drain_timeout_s" in found.advice[0]


@pytest.mark.asyncio
async def test_nobody_is_ended_while_the_store_fails_and_cannot_take_the_word_of_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)
    async with impatient_office(tmp_path, drain_timeout_s=1.0) as (here, job_id):
        await here.ask(PauseJob(id=job_id))
        held = here.actor._held[worker_name(job_id, 1)]
        with locked(tmp_path):

            async def overdue():
                return here.actor.trouble != "" and held.is_overdue(here.actor._clock.monotonic())

            await until(overdue)
            await anyio.sleep(2 * POLL_S)
            assert held.was_ended is None
        await here.becomes(job_id, JobState.PAUSED)


@pytest.mark.asyncio
async def test_a_worker_that_reported_its_jobs_end_and_does_not_leave_is_ended_and_its_job_keeps_what_it_reported(tmp_path):
    async with impatient_office(tmp_path) as (here, job_id):
        await here.ask(JobStopped(job_id=job_id, generation=1, why="cancel"))
        await is_gone(here, job_id, 1)
        over = await here.store.get(job_id)
        assert (over.state, over.error) == (JobState.CANCELLED, None)


def test_who_is_told_twice_gets_no_more_time_who_reported_gets_it_anew_and_nobody_is_ended_twice():
    held = Held("j1", 1)
    assert not held.is_overdue(1e9)
    held.stop = StopJob(why="pause")
    held.told_to_stop(100.0, 30.0)
    held.told_to_stop(120.0, 30.0)
    assert (held.is_overdue(129.9), held.is_overdue(130.0)) == (False, True)
    held.reported(129.9, 30.0)
    assert (held.is_overdue(130.0), held.is_overdue(160.0)) == (False, True)
    held.was_ended = held.patience
    assert not held.is_overdue(1e9)
    assert held.disobedience == "", "it did as it was told"
