"""A person and a real daemon: an arm is grown and its seed culled on their word; with approval nothing is done without it."""

from __future__ import annotations

import pytest
from daemon_jobs import GROWTH, job

from esperd.errors import IllegalTransition, JobNotFound, NothingToShow, UnknownName
from esperd.messages.growth import Stage
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import DecisionMade, JobStateChanged, StageChanged
from esperd.testing import first_event, until


def growing(**policy):
    """A job that takes its time: people are slower than epochs of a toy."""
    return job(
        growth={**GROWTH, "probation_epochs": 1000},
        host_options={"delay_s": 0.005},
        gates={"min_gradient_ratio": 0.0, "max_loss_drift": 10.0, "max_loss_spike": 10.0},
        policy={"warmup_epochs": 0, **policy},
    )


def decided(action, by=None):
    return lambda event: event.body.decision.action == action and (by is None or bool(event.body.decision.by) is by)


def entered(seed, stage):
    return lambda event: (event.body.seed, event.body.after) == (seed, stage)


@pytest.mark.asyncio
async def test_a_person_grows_an_arm_later_culls_its_seed_and_all_of_it_is_explained_and_replayed(daemon):
    async with daemon.client() as esper:
        handle = await esper.submit(growing(strategy="never"))
        await first_event(handle, DecisionMade)
        with pytest.raises(UnknownName, match="there are: first, second"):
            await handle.overrule("grow", slot="third", blueprint="mlp_low_rank")
        with pytest.raises(UnknownName, match="did you mean 'mlp_low_rank'"):
            await handle.overrule("grow", slot="first", blueprint="mlp_low_rang")
        with pytest.raises(NothingToShow, match="awaits approval"):
            await handle.overrule("approve")
        await handle.overrule("grow", slot="first", blueprint="mlp_low_rank", reason="I want to see it")
        grown = await first_event(handle, DecisionMade, decided("germinate"))
        assert (grown.body.applied, grown.body.decision.reason.partition(" ")[2]) == (True, "said: I want to see it")
        await first_event(handle, StageChanged, entered("first#0", Stage.PROBATIONARY))

        await handle.pause()  # a word waits for a job that rests, too
        await first_event(handle, JobStateChanged, lambda event: event.body.state is JobState.PAUSED)
        with pytest.raises(UnknownName, match="did you mean 'first#0'"):
            await handle.overrule("cull", seed="first#1")
        await handle.overrule("cull", seed="first#0", reason="seen enough")
        assert [word.seed for word in (await handle.proposals()).said] == ["first#0"]
        await handle.resume()
        culled = await first_event(handle, DecisionMade, decided("cull"))
        assert culled.body.applied
        gone = await first_event(handle, StageChanged, entered("first#0", Stage.CULLED))
        assert gone.body.reason == culled.body.decision.reason
        assert (await handle.proposals()).said == ()

        logged = await handle.decision(grown.body.point)
        assert logged.request.observation.epoch == grown.body.epoch
        assert [word.action for word in logged.said] == ["germinate"]
        await handle.cancel()
        assert (await handle.wait()).state is JobState.CANCELLED
        replayed = await handle.replay()
        assert len(replayed) >= culled.body.point
        assert all(point.same for point in replayed)
        with pytest.raises(IllegalTransition, match="cancelled: nothing is decided any more"):
            await handle.overrule("wait")


@pytest.mark.asyncio
async def test_with_approval_an_arm_is_grown_once_somebody_approves_and_training_goes_on_meanwhile(daemon):
    async with daemon.client() as esper:
        handle = await esper.submit(growing(approve=True))
        proposed = await first_event(handle, DecisionMade, lambda event: event.body.decision.proposes == "germinate")
        assert proposed.body.decision.action == "wait"
        await first_event(handle, DecisionMade, lambda event: event.body.point >= proposed.body.point + 3)
        assert not [event for event in await handle.events() if isinstance(event.body, StageChanged)]

        listed = await handle.proposals()
        assert listed.proposals[0].arm == proposed.body.decision.arm
        await handle.overrule("approve", number=1, reason="fine")
        grown = await first_event(handle, DecisionMade, decided("germinate", by=True))
        assert (grown.body.applied, grown.body.decision.arm) == (True, listed.proposals[0].arm)
        assert "approved by" in grown.body.decision.reason

        async def seed_is_proposed_on():
            return any(each.seed is not None for each in (await handle.proposals()).proposals)

        await until(seed_is_proposed_on)  # what is to become of it awaits approval, too
        await handle.overrule("cull", seed=f"{grown.body.decision.arm.slot}#0")
        await first_event(handle, DecisionMade, decided("cull", by=True))
        assert all(point.same for point in await handle.replay())
        await handle.cancel()


@pytest.mark.asyncio
async def test_nobody_can_decide_for_a_job_that_grows_nothing_or_does_not_exist(daemon):
    async with daemon.client() as esper:
        nobody = esper.job("j00000000")
        for ask in (nobody.overrule("wait"), nobody.proposals(), nobody.decision(1), nobody.replay()):
            with pytest.raises(JobNotFound, match="esper jobs"):
                await ask
        handle = await esper.submit(job())
        with pytest.raises(IllegalTransition, match="trains its host alone"):
            await handle.overrule("wait")
        assert (await handle.proposals()).point is None
        with pytest.raises(NothingToShow, match="none was logged yet"):
            await handle.decision(1)
        await handle.cancel()


def test_people_decide_from_blocking_code_too(daemon):
    with daemon.sync_client() as esper:
        handle = esper.submit(growing(strategy="never"))
        assert handle.overrule("wait", reason="not now").decisions[0].reason.endswith("said: not now")
        assert [word.action for word in handle.proposals().said] in (["wait"], [])
        for event in handle.watch():
            if isinstance(event.body, DecisionMade):
                break
        assert handle.decision(event.body.point).answer.decisions[0] == event.body.decision
        assert handle.replay()[0].same
        handle.cancel()
