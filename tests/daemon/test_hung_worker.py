"""A worker that hangs, however well its link beats, holds up neither its user nor the queue."""

from __future__ import annotations

import msgspec
import pytest
from daemon_jobs import QUICK, job
from test_jobs_actor import office

from esperd.config import Config, Daemon, Jobs, Workers
from esperd.daemon.failure import analyse
from esperd.errors import WorkerFailed
from esperd.messages.control import Terminated
from esperd.messages.jobs import CancelJob, JobState, PauseJob, ResumeJob
from esperd.messages.leases import JobStarted, JobStopped, StopJob
from esperd.messages.telemetry import JobStateChanged
from esperd.testing import first_event, running_daemon

IMPATIENT = Config(
    daemon=Daemon(drain_timeout_s=1.0),
    jobs=Jobs(max_running=1, backoff_s=0.05, backoff_max_s=0.1),
    workers=Workers(stall_timeout_s=4.0),
)


def changed_to(state, attempt):
    return lambda event: event.body.state is state and event.body.attempt == attempt


@pytest.mark.asyncio
async def test_a_hung_loader_is_noticed_its_attempt_is_lost_and_cancelled_it_makes_room_for_the_next_job(tmp_path):
    with running_daemon(tmp_path / "state", IMPATIENT) as daemon:
        async with daemon.client() as esper:
            hung = await esper.submit(job(data="samples:never"))
            waits = await esper.submit(job(1))
            lost = await first_event(hung, JobStateChanged, changed_to(JobState.QUEUED, 1))
            assert lost.body.error.code == WorkerFailed.code
            assert "hung and was killed: it stood at step 0 for 4 s" in lost.body.error.message
            assert "workers.stall_timeout_s" in lost.body.error.message
            await first_event(hung, JobStateChanged, changed_to(JobState.LEASED, 2))
            await hung.cancel()
            over = await hung.wait()
            assert (over.state, over.attempt, over.error.code) == (JobState.CANCELLED, 2, WorkerFailed.code)
            assert "did not stop within 1 s after it was told to (cancel)" in over.error.message
            assert (await waits.wait()).state is JobState.SUCCEEDED
            first, second = (await esper.explain_failure(hung.id)).attempts
            assert (first.ended, second.ended) == ("lost", "stopped")


