"""Decisions are logged before they are answered, and replayed, never made again."""

from __future__ import annotations

import msgspec
import pytest

from esperd.builtins import strategies, triggers
from esperd.declarations import Strategy, Trigger
from esperd.errors import CheckpointRejected, HandlerFailed, ImportFailed, StoreFailed, UnknownName
from esperd.hookspecs import hookimpl
from esperd.messages.overruling import Overrule, ReplayDecisions
from esperd.messages.policy import Arm, ArmOption, Decide, Decided, Decision, Observation, PolicySettings, Signal
from esperd.plugins import Plugins
from esperd.policy.actor import PolicyActor
from esperd.policy.decision_log import MIGRATIONS, DecisionLog, request_hash
from esperd.store.database import Database

CALLS: list[int] = []


def counting(request):
    CALLS.append(request.point)
    return Decided(decisions=(Decision(action="wait", reason=f"call {len(CALLS)}"),), state=b"x")


def raising(request):
    raise ZeroDivisionError("no arms")


def wordless(request):
    return None


def mistyped(request):
    if request.settings.trigger == "mistyped":
        return Signal(fires="yes", reason="for tests")
    return Decided(decisions=(Decision(action="wait", reason=7),), state=b"")


def stateless(request):
    return Decided(decisions=(), state="text")


def boundless(request):
    return Decided(decisions=(Decision(action="wait", reason="for tests", score=float("nan")),), state=b"")


def overdue(request):
    return Signal(fires=False, reason="for tests")


class TestStrategies:
    __test__ = False

    @hookimpl
    def esperd_triggers(self):
        for name in ("overdue", "raising", "wordless", "absent", "mistyped"):
            yield Trigger(name=name, fires=f"{__name__}:{name}", description="for tests")

    @hookimpl
    def esperd_strategies(self):
        for name in ("counting", "raising", "wordless", "absent", "mistyped", "stateless", "boundless"):
            yield Strategy(name=name, decide=f"{__name__}:{name}", description="for tests")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    CALLS.clear()


@pytest.fixture
def plugins():
    found = Plugins()
    found.add("builtins.strategies", strategies)
    found.add("builtins.triggers", triggers)
    found.add("tests", TestStrategies())
    return found


def request(point=0, strategy="counting", gate_loss=1.0, job="j", trigger="always"):
    option = ArmOption(arm=Arm(slot="s", blueprint="b"), parameters=1, flops_per_sample=1.0, available=True)
    seen = Observation(
        epoch=5,
        progress=0.1,
        epochs_left=50.0,
        shortest_life_epochs=5,
        train_loss=1.0,
        gate_loss=gate_loss,
        gate_metric=None,
        gate_losses=(gate_loss,),
        host_parameters=100,
        host_flops_per_sample=100.0,
        seeds=(),
        slots=(),
        options=(option,),
    )
    return Decide(job=job, point=point, rng_seed=0, settings=PolicySettings(strategy=strategy, trigger=trigger), observation=seen)


@pytest.mark.asyncio
async def test_a_point_is_decided_once_and_replayed_even_for_another_observation(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        first = await actor.handle(request())
        again = await actor.handle(request(gate_loss=0.5))

    assert CALLS == [0]
    assert (first.replayed, again.replayed) == (False, True)
    assert again == msgspec.structs.replace(first, replayed=True)


@pytest.mark.asyncio
async def test_an_answer_survives_the_daemon(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        first = await PolicyActor(database, plugins).handle(request(strategy="ucb"))
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        again = await PolicyActor(database, plugins).handle(request(strategy="ucb"))

    assert first.decisions[0].action == "germinate"
    assert again == msgspec.structs.replace(first, replayed=True)


@pytest.mark.asyncio
async def test_jobs_and_points_are_decided_on_their_own(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        for wanted in (request(), request(point=1), request(job="k")):
            assert not (await actor.handle(wanted)).replayed

    assert CALLS == [0, 1, 0]


@pytest.mark.asyncio
async def test_the_first_of_two_answers_to_one_point_stands(tmp_path):
    early, late = (Decided(decisions=(), state=state) for state in (b"early", b"late"))
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        log = DecisionLog(database, clock=lambda: 7.0)
        assert await log.append(request(), early) == early
        assert await log.append(request(), late) == msgspec.structs.replace(early, replayed=True)
        rows = await database.read("SELECT request_hash, decided_at FROM decisions")

    assert [tuple(row) for row in rows] == [(request_hash(request()), 7.0)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        (
            "ucd",
            UnknownName,
            "there are: absent, boundless, contextual, counting, .*, never, raising, .*, ucb, uniform, wordless",
        ),
        ("raising", HandlerFailed, "'raising' raised ZeroDivisionError at point 0: no arms"),
        ("wordless", HandlerFailed, "not NoneType"),
        ("mistyped", HandlerFailed, "answered with a Decided that is none: Expected `str`, got `int` .*reason"),
        ("stateless", HandlerFailed, "answered with a Decided that is none: .*state"),
        ("boundless", HandlerFailed, "score that is not finite"),
        ("absent", ImportFailed, "absent"),
    ],
)
async def test_a_strategy_that_cannot_answer_is_a_typed_error_and_nothing_is_logged(tmp_path, plugins, strategy, error, message):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        with pytest.raises(error, match=message):
            await PolicyActor(database, plugins).handle(request(strategy=strategy))
        assert await database.read("SELECT * FROM decisions") == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("strategy", "state", "error"),
    [
        ("raising", b"kept", HandlerFailed),
        ("absent", b"kept", ImportFailed),
        ("ucd", b"kept", UnknownName),
        ("ucb", b"foreign", CheckpointRejected),
    ],
)
async def test_where_a_strategy_fails_people_still_have_their_word_and_it_is_logged_and_replayed(
    tmp_path, plugins, strategy, state, error
):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await actor.handle(request(point=1, strategy="counting"))
        await actor.handle(Overrule(id="j", wish="wait", by="ada", reason="let it rest"))
        answer = await actor.handle(msgspec.structs.replace(request(point=2, strategy=strategy), state=state))
        assert [(decision.action, decision.by) for decision in answer.decisions] == [("wait", "ada")]
        assert answer.state == state
        with pytest.raises(error):
            await actor.handle(msgspec.structs.replace(request(point=3, strategy=strategy), state=state))
        page = await actor.handle(ReplayDecisions(id="j", after=1))
    assert [(found.point, found.same) for found in page.points] == [(2, True)]


@pytest.mark.asyncio
async def test_a_page_of_replayed_points_ends_where_a_strategy_is_slow(tmp_path, plugins, monkeypatch):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        for point in (1, 2, 3):
            await actor.handle(request(point=point, strategy="ucb"))
        whole = await actor.handle(ReplayDecisions(id="j"))
        monkeypatch.setattr("esperd.policy.actor.REPLAYED_FOR_S", -1.0)
        first = await actor.handle(ReplayDecisions(id="j"))
    assert ([found.point for found in whole.points], whole.more) == ([1, 2, 3], False)
    assert ([found.point for found in first.points], first.more) == ([1], True)


@pytest.mark.asyncio
async def test_the_trigger_of_the_job_is_asked_before_the_strategy(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        answer = await PolicyActor(database, plugins).handle(request(strategy="ucb", trigger="overdue"))

    assert [decision.reason for decision in answer.decisions] == ["not now (overdue): for tests"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("trigger", "error", "message"),
    [
        ("plateaux", UnknownName, "no trigger is called 'plateaux'; did you mean 'plateau'"),
        ("raising", HandlerFailed, "trigger 'raising' raised ZeroDivisionError at point 0: no arms"),
        ("wordless", HandlerFailed, "trigger 'wordless' must answer with Signal, not NoneType"),
        ("mistyped", HandlerFailed, "trigger 'mistyped' answered with a Signal that is none: Expected `bool`"),
        ("absent", ImportFailed, "absent"),
    ],
)
async def test_a_trigger_that_cannot_answer_is_a_typed_error_and_nothing_is_logged(tmp_path, plugins, trigger, error, message):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        with pytest.raises(error, match=message):
            await PolicyActor(database, plugins).handle(request(trigger=trigger))
        assert await database.read("SELECT * FROM decisions") == []


@pytest.mark.asyncio
async def test_a_damaged_row_is_reported_with_job_and_point(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        insert = "INSERT INTO decisions (job, point, request_hash, answer, decided_at) VALUES ('j', 0, '', x'ff', 0.0)"
        await database.write(lambda connection: connection.execute(insert))
        with pytest.raises(StoreFailed, match="job j at point 0"):
            await PolicyActor(database, plugins).handle(request())
