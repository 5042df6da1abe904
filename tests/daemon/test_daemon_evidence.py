"""What one job learned, the daemon tells the next; and whoever asks."""

from __future__ import annotations

import pytest
from daemon_jobs import GROWTH, QUICK, job

from esperd.messages.jobs import JobState
from esperd.messages.telemetry import DecisionMade, EpochCompleted, EvidenceGiven, JobStateChanged
from esperd.testing import first_event, running_daemon


def growing(epochs=12, **policy):
    """Seeds end within few epochs: culled or kept."""
    settings = {"strategy": "ucb", "warmup_epochs": 1, "patience": 1, **policy}
    return job(epochs, growth=GROWTH, slots={"patterns": ["second"]}, policy=settings)


def bodies(events, kind):
    return [event.body for event in events if isinstance(event.body, kind)]


@pytest.mark.asyncio
async def test_the_second_job_is_given_what_the_first_learned_and_keeps_it_when_it_is_resumed(tmp_path):
    with running_daemon(tmp_path / "state", QUICK) as daemon:
        async with daemon.client() as esper:
            first = await esper.submit(growing())
            assert (await first.wait()).state is JobState.SUCCEEDED
            report = await first.report()
            (row,) = (await esper.evidence("mlp_low*")).rows
            ended = [seed for seed in report.seeds if "budget ended" not in seed.reason]
            assert row.tries - row.refused == len(ended) > 0
            assert (row.topology, row.jobs) == ("mlp", 1)
            assert (await esper.evidence(job="j00000000")).rows == ()
            assert report.evidence is None

            second = await esper.submit(growing(10**6, memory=True))
            given = await first_event(second, EvidenceGiven)
            assert (given.body.evidence.tries, given.body.evidence.jobs) == (row.tries, 1)
            await first_event(second, EpochCompleted, lambda event: event.body.epoch >= 2)
            await second.pause()
            await first_event(second, JobStateChanged, lambda event: event.body.state is JobState.PAUSED)

            assert await esper.forget_evidence("mlp*") >= row.tries
            assert (await esper.evidence()).rows == ()
    with running_daemon(tmp_path / "state", QUICK) as daemon:
        async with daemon.client() as esper:
            second = esper.job(second.id)
            before = (await second.events())[-1].sequence
            await second.resume()
            await first_event(second, DecisionMade, after=before)
            await second.cancel()
            events = await second.events()

    told = {body.evidence for body in bodies(events, EvidenceGiven)}
    assert told == {given.body.evidence}
    reasons = [body.decision.reason for body in bodies(events, DecisionMade) if body.decision.action == "germinate"]
    assert all("tries of other jobs" in reason for reason in reasons)
