"""Two jobs, one after the other, decided by the real policy actor: what the first learned, the second begins with."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from types import SimpleNamespace

import msgspec
import pytest
from desks import PLUGINS, Ended, InProcessDesk, growing_job

from esperd.errors import ActorUnavailable
from esperd.messages.evidence import ListEvidence
from esperd.messages.growth import Stage
from esperd.messages.policy import PolicySettings
from esperd.messages.telemetry import EvidenceGiven
from esperd.policy.actor import PolicyActor
from esperd.policy.decision_log import MIGRATIONS
from esperd.policy.evidence import EvidenceStore
from esperd.store.blobs import Blobs
from esperd.store.database import Database
from esperd.trainer.passes import Stopped
from esperd.trainer.session import Session


def asked(database, message):
    """The answer of a policy actor that is started for this message alone."""

    async def ask():
        async with Database.open(database, MIGRATIONS) as opened:
            return await PolicyActor(opened, PLUGINS).handle(message)

    return asyncio.run(ask())


class RememberingDesk(InProcessDesk):
    """Its policy is the daemon's own, on a database that jobs share."""

    def __init__(self, database, job_id, **options):
        super().__init__(**options)
        self.database, self.job_id = database, job_id

    def decide(self, request):
        return asked(self.database, request)

    def conclude(self, ending):
        super().conclude(ending)
        asked(self.database, ending)


class LateDesk(RememberingDesk):
    """Its policy answers too late at the points in ``late``: what it says is logged, and the trainer goes on without."""

    def __init__(self, *arguments, late, **options):
        super().__init__(*arguments, **options)
        self.late, self.heard = late, {}

    def decide(self, request):
        self.heard[request.point] = request.heard
        answer = super().decide(request)
        if request.point in self.late:
            raise ActorUnavailable("the policy did not answer in time")
        return answer


def job(*, memory):
    made = growing_job(budget={"epochs": 12})
    policy = {**msgspec.to_builtins(made.policy), "memory": memory, "warmup_epochs": 1, "latest_germination": 0.8}
    return msgspec.structs.replace(made, policy=msgspec.convert(policy, PolicySettings))


def train(desk, blobs, *, memory, resume_from=None):
    session = Session(job(memory=memory), PLUGINS, desk, blobs, resumed=int(resume_from is not None))
    return Ended(session, session.train(resume_from))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Job ``first`` without memory, then ``second`` with it; and in a twin of that world, ``second`` is stopped half way,
    ``third`` is done meanwhile, and ``second`` goes on.
    """
    directory = tmp_path_factory.mktemp("jobs")
    database, twin, blobs = directory / "decisions.db", directory / "twin.db", Blobs(directory / "blobs")
    first = train(RememberingDesk(database, "first"), blobs, memory=False)
    shutil.copy(database, twin)
    second = train(RememberingDesk(database, "second"), blobs, memory=True)
    steps = itertools.count()
    stopped = RememberingDesk(twin, "second", stop=lambda _desk: "drain" if next(steps) >= 40 else None)
    with pytest.raises(Stopped):
        train(stopped, blobs, memory=True)
    train(RememberingDesk(twin, "third"), blobs, memory=False)
    resumed = train(RememberingDesk(twin, "second"), blobs, memory=True, resume_from=stopped.checkpoints[-1][0])
    return SimpleNamespace(first=first, second=second, stopped=stopped, resumed=resumed, database=database, twin=twin)


def tries(database, job_id):
    """What is kept of a job's tries, without when."""

    async def read():
        async with Database.open(database, MIGRATIONS) as opened:
            return await EvidenceStore(opened).tries(job=job_id)

    return [msgspec.structs.replace(one, recorded_at=0.0) for one in asyncio.run(read())]


def test_every_seed_that_was_kept_or_culled_is_known_and_none_that_only_the_budget_ended(told):
    ended = [seed for seed in told.first.report.seeds if "budget ended" not in seed.reason]
    rows = asked(told.twin, ListEvidence(job="first")).rows

    assert sum(row.tries - row.refused for row in rows) == len(ended) > 0
    assert sum(row.kept for row in rows) == sum(seed.stage is Stage.FOSSILIZED for seed in ended)
    assert all(row.topology == "cnn" and row.third is not None for row in rows)
    assert all(row.activation_bytes > 0 and row.incubation_loss > 0 and row.gradient_ratio > 0 for row in rows)


def test_a_job_with_memory_is_given_what_the_first_learned_and_tells_of_it_once(told):
    (event,) = told.second.desk.of(EvidenceGiven)
    assert told.first.desk.of(EvidenceGiven) == []
    assert told.first.report.evidence is None
    assert (event.evidence.tries, event.evidence.jobs) == (len(tries(told.database, "first")), 1)
    assert told.second.report.evidence == event.evidence
    assert json.loads(told.second.files["growth.json"])["manifest"]["evidence_sha256"] == event.evidence.sha256
    assert "evidence_sha256" not in json.loads(told.first.files["growth.json"])["manifest"]


def test_a_resumed_job_keeps_its_snapshot_whatever_was_learned_in_between_and_ends_as_the_undisturbed_one(told):
    assert told.stopped.of(EvidenceGiven)
    assert told.resumed.report.evidence == told.second.report.evidence
    assert told.resumed.desk.of(EvidenceGiven) == [], "it was told"
    assert told.resumed.comparable_report == told.second.comparable_report


def test_a_resumed_job_records_its_tries_once(told):
    assert tries(told.twin, "second") == tries(told.database, "second") != []


def test_losers_of_a_screening_are_known_as_what_they_were_and_an_answer_that_came_too_late_teaches_nothing(tmp_path):
    made = growing_job(budget={"epochs": 14}, policy={"strategy": "uniform", "nursery": 2, "warmup_epochs": 1})
    desk = LateDesk(tmp_path / "decisions.db", "nursed", late=(1, 3))
    ended = Ended(session := Session(made, PLUGINS, desk, Blobs(tmp_path / "blobs")), session.train(None))
    known = {one.seed: one for one in tries(tmp_path / "decisions.db", "nursed")}
    losers = [seed.seed for seed in ended.report.seeds if seed.reason.startswith("screened out")]

    assert {point: desk.heard[point] for point in (1, 2, 3, 4)} == {1: 0, 2: 0, 3: 2, 4: 2}
    assert None not in known, "nothing was refused"
    assert len(losers) >= 1
    assert {known[seed].outcome for seed in losers} == {"culled"}
    assert all(known[seed].incubation_loss > 0 and known[seed].gradient_ratio is not None for seed in losers)
