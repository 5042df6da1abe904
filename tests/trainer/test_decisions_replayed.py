"""The log of a real job holds all that its decisions depended on, words of people included: each is computed again."""

from __future__ import annotations

import contextlib

import anyio.from_thread
import desks
import msgspec
import pytest

from esperd.builtins.strategies import STRATEGIES
from esperd.declarations import resolve
from esperd.messages.growth import LIVE_STAGES, Stage
from esperd.messages.overruling import ListProposals, Overrule, ReplayDecisions
from esperd.messages.telemetry import DecisionMade, EpochCompleted, RolledBack, StageChanged
from esperd.policy.actor import PolicyActor
from esperd.policy.decision_log import MIGRATIONS, DecisionLog
from esperd.store.blobs import Blobs
from esperd.store.database import Database

NURSED = {"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.001, "rent_flops": 0.001, "nursery": 2}


class LoggingDesk(desks.InProcessDesk):
    """Its policy is the real actor on a database; ``says`` may say something to it before each decision point."""

    def __init__(self, portal, database, says=lambda _desk, _request: None, **options):
        super().__init__(**options)
        self.portal = portal
        self.actor = PolicyActor(database, desks.PLUGINS)
        self.log = DecisionLog(database)
        self.says = says

    def decide(self, request):
        self.says(self, request)
        return self.portal.call(self.actor.handle, request)

    def say(self, wish, **fields):
        return self.portal.call(self.actor.handle, Overrule(id=self.job_id, wish=wish, by="ada", **fields))

    def logged(self):
        return self.portal.call(self.log.page, self.job_id, 0, 1000)

    def replayed(self):
        return self.portal.call(self.actor.handle, ReplayDecisions(id=self.job_id, limit=100)).points

    def made(self, action):
        return [body for body in self.of(DecisionMade) if body.decision.action == action]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return Blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture
def open_desk(tmp_path):
    with contextlib.ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        database = stack.enter_context(portal.wrap_async_context_manager(Database.open(tmp_path / "decisions.db", MIGRATIONS)))
        yield lambda *arguments, **options: LoggingDesk(portal, database, *arguments, **options)


@pytest.mark.parametrize("name", [strategy.name for strategy in STRATEGIES])
def test_every_decision_of_a_job_is_computed_again_from_its_log(blobs, open_desk, name):
    desk = open_desk()
    desks.train(desks.growing_job(policy={**NURSED, "strategy": name}), blobs, desk)
    logged = desk.logged()
    assert [row.point for row in logged] == list(range(1, len(logged) + 1))
    assert len(logged) >= 9
    decide = resolve(desks.PLUGINS.strategies[name].decide)
    for row in logged:
        assert msgspec.msgpack.encode(decide(row.request)) == msgspec.msgpack.encode(row.answer)
    assert all(found.same for found in desk.replayed())


def overruling(desk, request):
    """Somebody who grows an arm at the second point, and culls the seed as soon as it is heard."""
    known = desk.logged()
    if len(known) == 1 and request.point == 2:
        slot = request.observation.slots[0].slot
        desk.say("grow", slot=slot, blueprint="conv_light", reason="to see")
    living = [record for record in known[-1].request.observation.seeds if record.stage is Stage.BLENDING] if known else []
    if living and not any(made.decision.action == "cull" and made.decision.by for made in desk.of(DecisionMade)):
        desk.say("cull", seed=living[0].seed, reason="seen enough")


def test_what_people_said_is_done_told_and_replayed(blobs, open_desk):
    desk = open_desk(overruling)
    desks.train(desks.growing_job(policy={"strategy": "never"}), blobs, desk)
    (grown,), (culled,) = desk.made("germinate"), desk.made("cull")
    assert (grown.applied, grown.decision.by, grown.point) == (True, "ada", 2)
    assert (culled.applied, culled.decision.reason) == (True, "ada said: seen enough")
    (end,) = [change for change in desk.of(StageChanged) if change.after is Stage.CULLED]
    assert (end.seed, end.before, end.reason) == (culled.decision.seed, Stage.BLENDING, "ada said: seen enough")
    assert all(found.same for found in desk.replayed())


def test_a_resumed_job_hears_again_what_people_said(blobs, open_desk):
    job = desks.growing_job(policy={"strategy": "never"}, checkpoint_every_s=0.0)
    alone = open_desk(overruling)
    ended = desks.train(job, blobs, alone)
    # Stopped in the epoch after the word was taken, and sent back to a checkpoint from before it.
    desk = open_desk(overruling)
    desk.job_id = "job-2"
    desk.stop = lambda desk: "cancel" if desk.decided_points() == 2 and desk.steps_in_epoch == 1 else None
    desk.decided_points = lambda: len(desk.logged())
    with pytest.raises(desks.Stopped):
        desks.Session(job, desks.PLUGINS, desk, blobs).train(None)
    desk.stop = lambda _desk: None
    resumed = desks.train(job, blobs, desk, resume_from=desk.checkpoints[0][0], resumed=1)
    assert resumed.files["model.safetensors"] == ended.files["model.safetensors"]
    assert [made.point for made in desk.made("germinate")] == [2, 2]  # told twice, said once


def approving(desk, request):
    """Somebody who approves whatever the last point proposed, every third point."""
    if request.point % 3 == 0 and desk.portal.call(desk.actor.handle, ListProposals(id=desk.job_id)).proposals:
        desk.say("approve")


def test_with_approval_nothing_happens_to_the_network_but_what_people_approved(blobs, open_desk):
    settings = {"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.0, "rent_flops": 0.0, "approve": True}
    job = desks.growing_job(budget={"epochs": 15}, policy=settings, gates={"confidence": 0.6})
    desk = open_desk(approving)
    ended = desks.train(job, blobs, desk)
    done = [body for body in desk.of(DecisionMade) if body.decision.action != "wait"]
    assert done
    assert all(body.decision.by == "ada" and body.point % 3 == 0 for body in done)
    assert any(body.decision.proposes == "fossilize" for body in desk.of(DecisionMade))
    assert not ended.report.refused  # a proposal is no refusal
    assert all(found.same for found in desk.replayed())


def test_a_seed_that_people_are_asked_about_is_not_culled_for_a_timeout_meanwhile(blobs, open_desk):
    def growing_only(desk, request):
        if request.point == 2:
            desk.say("approve")

    settings = {"warmup_epochs": 1, "patience": 1, "rent_parameters": 0.0, "rent_flops": 0.0, "approve": True}
    job = desks.growing_job(budget={"epochs": 16}, policy=settings)
    desk = open_desk(growing_only)
    desks.train(job, blobs, desk)
    last = desk.observations[-1] if desk.observations else desk.logged()[-1].request.observation
    assert [record.stage in LIVE_STAGES for record in last.seeds] == [True]
    assert last.seeds[0].epochs_in_stage > job.growth.probation_epochs


def test_culling_a_seed_that_the_network_leans_on_is_no_catastrophe_of_training(blobs, open_desk):
    def changing_their_mind(desk, request):
        if request.point == 1:
            desk.say("grow", slot="flatten", blueprint="mlp_gated")
        if request.point == 11:
            desk.say("cull", seed="flatten#0")

    growth = {"blueprints": ["mlp_gated"], "probation_epochs": 99}
    settings = {"optimizer": {"learning_rate": 3e-3}, "growth": growth, "policy": {"strategy": "never"}}
    job = desks.growing_job(host="cnn", data="digits", budget={"epochs": 14}, **settings)
    desk = open_desk(changing_their_mind)
    desks.train(job, blobs, desk)
    losses = [body.gate_loss for body in desk.of(EpochCompleted)]
    assert losses[11] > 3 * losses[10]  # that much depended on it
    assert not desk.of(RolledBack)


@pytest.mark.parametrize(
    ("slot", "blueprint", "budget", "refused"),
    [
        ("stem", "conv_light", {"epochs": 5, "parameters": 300}, "would exceed the budget's 300"),
        ("nowhere", "conv_light", {"epochs": 5}, "nowhere"),
        ("stem", "nothing", {"epochs": 5}, "nothing"),
        ("stem", "mlp_gated", {"epochs": 5}, "mlp_gated is for mlp slots"),
    ],
)
def test_what_cannot_be_grown_is_refused_and_told_where_it_was_not_known_before(
    blobs, open_desk, slot, blueprint, budget, refused
):
    def early(desk, request):
        if request.point == 1:
            desk.say("grow", slot=slot, blueprint=blueprint)

    desk = open_desk(early)
    desks.train(desks.growing_job(budget=budget, policy={"strategy": "never"}), blobs, desk)
    (told,) = desk.made("germinate")
    assert told.applied is False
    assert refused in told.refusal
    assert not [change for change in desk.of(StageChanged) if change.after is Stage.GERMINATED]


def test_nobody_who_does_not_answer_grows_anything(blobs, open_desk):
    desk = open_desk()
    ended = desks.train(desks.growing_job(policy={"warmup_epochs": 1, "approve": True}), blobs, desk)
    assert not desk.of(StageChanged)
    assert [body.decision.proposes for body in desk.of(DecisionMade)][:2] == ["germinate"] * 2
    assert ended.report.seeds == ()
