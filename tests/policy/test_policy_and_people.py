"""The policy actor and people: a word is durable, taken by exactly one decision point, and part of what is replayed."""

from __future__ import annotations

import msgspec
import pytest
from policy_requests import observation, option, request, seed

from esperd.errors import NothingToShow, StoreFailed
from esperd.messages.growth import Stage
from esperd.messages.overruling import ExplainDecision, ListProposals, Overrule, ReplayDecisions
from esperd.messages.policy import ArmMerit, PolicySettings
from esperd.plugins import load_plugins
from esperd.policy.actor import PolicyActor
from esperd.policy.decision_log import MIGRATIONS, DecisionLog
from esperd.policy.said import Said
from esperd.store.database import Database

PLUGINS = load_plugins()
CULL = Overrule(id="j", wish="cull", by="ada", seed="s1#0", reason="it is slow")
APPROVE = PolicySettings(strategy="ucb", approve=True)


def asked(point, *, policy=None, state=b"", stage=Stage.TRAINING):
    seen = observation(seeds=(seed("s1#0", stage=stage),), options=(option("s2"),))
    return request(seen, policy=policy, point=point, state=state)


def opened(tmp_path):
    return Database.open(tmp_path / "decisions.db", MIGRATIONS)


def culls(answer):
    return [(made.seed, made.by) for made in answer.decisions if made.action == "cull"]


@pytest.mark.asyncio
async def test_a_word_survives_the_daemon_and_is_taken_by_the_next_point_alone(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        before = await actor.handle(asked(1))
        await actor.handle(CULL)
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        assert culls(await actor.handle(asked(1))) == culls(before) == []  # replayed as it was
        assert len((await actor.handle(ListProposals(id="j"))).said) == 1
        taking = await actor.handle(asked(2))
        assert culls(taking) == [("s1#0", "ada")]
        assert (await actor.handle(ListProposals(id="j"))).said == ()
        assert culls(await actor.handle(asked(3))) == []
        again = await actor.handle(asked(2))
        assert again == msgspec.structs.replace(taking, replayed=True)


@pytest.mark.asyncio
async def test_a_word_about_one_job_is_not_heard_by_another(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        await actor.handle(asked(1))
        await actor.handle(CULL)
        assert culls(await actor.handle(msgspec.structs.replace(asked(1), job="k"))) == []


@pytest.mark.asyncio
async def test_a_word_is_taken_in_the_transaction_that_logs_the_answer_or_not_at_all(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        await actor.handle(asked(1))
        await actor.handle(CULL)
        await database.write(
            lambda connection: connection.execute(
                "CREATE TEMP TRIGGER full BEFORE INSERT ON main.decisions BEGIN SELECT RAISE(ABORT, 'disk full'); END"
            )
        )
        with pytest.raises(StoreFailed, match="disk full"):
            await actor.handle(asked(2))
        assert len(await Said(database).waiting("j")) == 1
        await database.write(lambda connection: connection.execute("DROP TRIGGER full"))
        assert culls(await actor.handle(asked(2))) == [("s1#0", "ada")]


@pytest.mark.asyncio
async def test_with_approval_proposals_are_listed_until_the_next_point_and_done_once_approved(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        assert (await actor.handle(ListProposals(id="j"))).point is None
        first = await actor.handle(asked(1, policy=APPROVE))
        assert {made.action for made in first.decisions} == {"wait"}
        (offered,) = (await actor.handle(ListProposals(id="j"))).proposals
        assert (offered.action, offered.arm) == ("germinate", option("s2").arm)
        await actor.handle(Overrule(id="j", wish="approve", by="ada", number=1))
        second = await actor.handle(asked(2, policy=APPROVE, state=first.state))
        assert [(made.action, made.arm, made.by) for made in second.decisions] == [("germinate", offered.arm, "ada")]
        assert (await actor.handle(ListProposals(id="j"))).proposals == ()


@pytest.mark.asyncio
async def test_a_word_waits_while_the_strategy_measures_and_goes_before_what_it_decides_then(tmp_path):
    merit = PolicySettings(strategy="gradient_merit")
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        await actor.handle(asked(1))
        await actor.handle(Overrule(id="j", wish="wait", by="ada"))
        measures = await actor.handle(asked(2, policy=merit))
        assert {made.action for made in measures.decisions} == {"gauge"}
        assert len(await Said(database).waiting("j")) == 1
        told = tuple(ArmMerit(arm=made.arm, norm=1.0, batches=4, epoch=5) for made in measures.decisions)
        again = asked(3, policy=merit, state=measures.state)
        again = msgspec.structs.replace(again, observation=msgspec.structs.replace(again.observation, merits=told))
        decided = await actor.handle(again)
        assert not any(made.action == "germinate" for made in decided.decisions)
        assert any(made.by == "ada" for made in decided.decisions)
        assert not await Said(database).waiting("j")
        page = await actor.handle(ReplayDecisions(id="j", limit=9))
        assert all(point.same for point in page.points)


@pytest.mark.asyncio
async def test_proposals_stay_while_the_strategy_measures(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        await actor.handle(asked(1, policy=APPROVE))
        await actor.handle(asked(2, policy=PolicySettings(strategy="gradient_merit", approve=True)))
        assert len((await actor.handle(ListProposals(id="j"))).proposals) == 1


@pytest.mark.asyncio
async def test_a_point_is_explained_with_what_was_asked_and_what_people_had_said(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        await actor.handle(asked(1))
        await actor.handle(CULL)
        answer = await actor.handle(asked(2))
        logged = await actor.handle(ExplainDecision(id="j", point=2))
        assert (logged.point, logged.request, logged.answer) == (2, asked(2), answer)
        assert [word.reason for word in logged.said] == ["ada said: it is slow"]
        with pytest.raises(NothingToShow, match="no decision point 3; the latest is 2"):
            await actor.handle(ExplainDecision(id="j", point=3))


@pytest.mark.asyncio
async def test_a_replay_computes_what_people_said_again_and_says_what_differs(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        state = b""
        for point in range(1, 6):
            if point == 3:
                await actor.handle(CULL)
            state = (await actor.handle(asked(point, state=state))).state
        page = await actor.handle(ReplayDecisions(id="j", limit=4))
        assert ([found.point for found in page.points], page.more) == ([1, 2, 3, 4], True)
        assert all(found.same for found in page.points)
        rest = await actor.handle(ReplayDecisions(id="j", after=4))
        assert ([found.point for found in rest.points], rest.more) == ([5], False)

        def damage(connection):
            other = msgspec.msgpack.encode(asked(4, policy=PolicySettings(strategy="never")))
            connection.execute("UPDATE decisions SET request = ? WHERE point = 4", (other,))
            connection.execute("UPDATE overrules SET point = 5")
            connection.execute("UPDATE decisions SET request = NULL WHERE point = 1")
            unknown = msgspec.msgpack.encode(asked(2, policy=PolicySettings(strategy="gone")))
            connection.execute("UPDATE decisions SET request = ? WHERE point = 2", (unknown,))

        await database.write(damage)
        points = (await actor.handle(ReplayDecisions(id="j"))).points
        assert [found.same for found in points] == [None, False, False, False, False]
        assert "older esperd" in points[0].difference
        assert "unknown_name: no strategy is called 'gone'" in points[1].difference
        assert "'cull s1#0: ada said: it is slow'" in points[2].difference
        assert "never grows anything" in points[3].difference


@pytest.mark.asyncio
async def test_a_state_that_comes_out_otherwise_is_a_difference_too(tmp_path):
    async with opened(tmp_path) as database:
        actor = PolicyActor(database, PLUGINS)
        answer = await actor.handle(asked(1))
        other = msgspec.msgpack.encode(msgspec.structs.replace(answer, state=answer.state + b" "))
        await database.write(lambda connection: connection.execute("UPDATE decisions SET answer = ?", (other,)))
        (found,) = (await actor.handle(ReplayDecisions(id="j"))).points
        assert found.same is False
        assert f"state is not ({len(answer.state) + 1} bytes logged, {len(answer.state)} now)" in found.difference


@pytest.mark.asyncio
async def test_a_log_of_an_older_esperd_is_migrated_and_read(tmp_path):
    async with Database.open(tmp_path / "decisions.db", MIGRATIONS[:1]) as database:
        row = ("j", 1, "", msgspec.msgpack.encode({"type": "Decided", "decisions": (), "state": b"old"}), 0.0)
        await database.write(lambda connection: connection.execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?)", row))
    async with opened(tmp_path) as database:
        logged = await DecisionLog(database).latest("j")
        assert (logged.point, logged.request, logged.answer.state) == (1, None, b"old")
