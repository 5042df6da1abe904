from __future__ import annotations

import re
from pathlib import Path

from msgspec.structs import replace

from esperd.messages.control import ActorList, ActorState, ActorStatus, BreakerState, BreakerStatus
from esperd.messages.growth import Stage, Trial, Verdict
from esperd.messages.jobs import Budget, Job, JobInfo, JobState
from esperd.messages.policy import Decision
from esperd.messages.telemetry import (
    BreakerChanged,
    DecisionMade,
    Event,
    GateEvaluated,
    KernelLoaded,
    RolledBack,
    ScreeningEnded,
    StageChanged,
    TrialMeasured,
)
from esperd.telemetry.metrics import Metrics


def samples(metrics: Metrics) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def observed(*bodies) -> dict[str, float]:
    metrics = Metrics()
    for sequence, body in enumerate(bodies, start=1):
        metrics.observe_event(Event(job="j1", sequence=sequence, at=0.0, body=body))
    return samples(metrics)


def info(job_id: str, state: JobState) -> JobInfo:
    job = Job(host="mlp", data="digits", budget=Budget(epochs=1))
    return JobInfo(id=job_id, name="", state=state, attempt=0, submitted_at=0.0, job=job)


def stage(after: Stage) -> StageChanged:
    return StageChanged(epoch=1, seed="s#1", slot="s", blueprint="b", before=Stage.TRAINING, after=after, reason="")


def test_events_are_counted_by_type_and_by_what_they_say():
    found = observed(
        DecisionMade(epoch=1, decision=Decision(action="wait", reason="early"), applied=True),
        DecisionMade(epoch=2, decision=Decision(action="germinate", reason="try"), applied=False, refusal="G0"),
        GateEvaluated(epoch=2, seed="s#1", verdict=Verdict(gate="g2", passed=False, reason="small")),
        KernelLoaded(epoch=2, seed="s#1", blueprint="b", manifest_id="m", source="disk"),
        BreakerChanged(breaker=BreakerStatus(service="policy", state=BreakerState.OPEN, failures=3, opened=1)),
        stage(Stage.BLENDING),
        stage(Stage.CULLED),
    )
    assert found['esperd_events_total{type="DecisionMade"}'] == 2
    assert found['esperd_decisions_total{action="germinate",applied="false"}'] == 1
    assert found['esperd_decisions_total{action="wait",applied="true"}'] == 1
    assert found['esperd_gates_total{gate="g2",result="failed"}'] == 1
    assert found['esperd_kernels_total{source="disk"}'] == 1
    assert found['esperd_worker_breaker_changes_total{service="policy",state="open"}'] == 1
    assert {name for name in found if name.startswith("esperd_seeds_total")} == {'esperd_seeds_total{outcome="culled"}'}


def trial(lower: float, upper: float) -> TrialMeasured:
    found = Trial(
        loss=(lower + upper) / 2,
        lower=lower,
        upper=upper,
        confidence=0.95,
        samples=100,
        steps_with=9,
        steps_without=10,
        flops=1.0,
        epoch=5,
    )
    return TrialMeasured(epoch=5, seed="s#1", trial=found)


def test_trials_are_counted_by_the_side_of_zero_on_which_their_interval_lies():
    found = observed(trial(0.1, 0.2), trial(0.0, 0.2), trial(-0.1, 0.1), trial(-0.2, -0.1))
    results = {result: found[f'esperd_trials_total{{result="{result}"}}'] for result in ("helps", "undecided", "harms")}
    assert results == {"helps": 1, "undecided": 2, "harms": 1}


def test_screenings_are_counted_by_whether_anybody_went_on_and_rollbacks_by_their_remedy():
    ended = [
        ScreeningEnded(epoch=1, screening=name, winner=winner, candidates=()) for name, winner in (("a", "s#1"), ("b", None))
    ]
    back = RolledBack(
        epoch=4, to_epoch=3, reason="it diverged", numbers={"loss": None}, action="cut_rate", rate_scale=0.5, trip=1
    )
    found = observed(*ended, back)
    assert found['esperd_screenings_total{result="winner"}'] == 1
    assert found['esperd_screenings_total{result="none"}'] == 1
    assert found['esperd_rollbacks_total{action="cut_rate"}'] == 1


def test_a_job_is_counted_in_the_state_it_is_in():
    metrics = Metrics()
    for state in (JobState.QUEUED, JobState.LEASED, JobState.RUNNING, JobState.RUNNING):
        metrics.observe_job(info("j1", state))
    metrics.observe_job(info("j2", JobState.QUEUED))
    found = samples(metrics)
    counts = {state: found[f'esperd_jobs{{state="{state}"}}'] for state in JobState}
    assert counts == {state: float(state in (JobState.QUEUED, JobState.RUNNING)) for state in JobState}


def test_actors_are_shown_as_last_observed_and_not_before():
    metrics = Metrics()
    assert not any("actor" in name for name in samples(metrics))
    for depth in (7, 3):
        status = ActorStatus(
            name="policy",
            state=ActorState.RUNNING,
            pid=1,
            generation=2,
            restarts=1,
            mailbox_depth=depth,
            mailbox_bytes=0,
            handled=5,
        )
        metrics.observe_actors(ActorList(actors=(status,), dead_letters={"no such actor": 4}))
    found = samples(metrics)
    assert found['esperd_restarts_total{actor="policy"}'] == 1
    assert found['esperd_mailbox_depth{actor="policy"}'] == 3
    assert found['esperd_dead_letters_total{reason="no such actor"}'] == 4


def test_restarts_of_workers_are_one_series_that_never_falls():
    metrics = Metrics()
    for name, restarts in (("trainer/j1.1", 1), ("trainer/j2.1", 2)):  # the first is forgotten when the second is there
        worker = ActorStatus(
            name=name,
            state=ActorState.RUNNING,
            pid=1,
            generation=1,
            restarts=restarts,
            mailbox_depth=1,
            mailbox_bytes=5,
            handled=0,
        )
        beside = replace(worker, name=f"{name}0", restarts=0)
        metrics.observe_actors(ActorList(actors=(worker, beside), dead_letters={}))
    found = samples(metrics)
    assert found['esperd_restarts_total{actor="trainer"}'] == 3
    assert found['esperd_mailbox_depth{actor="trainer"}'] == 2
    assert not any("j1" in name for name in found)


def test_requests_are_shown_as_the_server_counted_them_last():
    metrics = Metrics()
    for answered in (3, 5):
        metrics.observe_requests({"answered": answered, "refused": 1})
    found = samples(metrics)
    assert (found['esperd_requests_total{result="answered"}'], found['esperd_requests_total{result="refused"}']) == (5, 1)


def test_the_lag_of_the_loop_is_a_histogram_in_seconds():
    metrics = Metrics()
    metrics.observe_loop_lag(0.003)
    found = samples(metrics)
    assert (found['esperd_loop_lag_seconds_bucket{le="0.002"}'], found['esperd_loop_lag_seconds_bucket{le="0.005"}']) == (0, 1)
    assert found["esperd_loop_lag_seconds_count"] == 1


def test_messages_and_waits_are_counted_by_role_and_never_by_worker():
    metrics = Metrics()
    for actor in ("trainer/j1.1", "trainer/j2.1"):
        metrics.observe_message(actor, "Lease", "answered")
        metrics.observe_wait(actor, 0.005)
        metrics.observe_handled(actor, 0.5)
    found = samples(metrics)
    assert found['esperd_messages_total{actor="trainer",kind="Lease",result="answered"}'] == 2
    assert found['esperd_mailbox_wait_seconds_bucket{actor="trainer",le="0.001"}'] == 0
    assert found['esperd_mailbox_wait_seconds_bucket{actor="trainer",le="0.01"}'] == 2
    assert found['esperd_handler_seconds_sum{actor="trainer"}'] == 1.0


def test_how_long_a_job_waited_and_took_is_observed_once_and_not_of_jobs_that_a_new_daemon_finds():
    metrics = Metrics()
    times = {"submitted_at": 0.0, "started_at": 5.0, "finished_at": 65.0}
    metrics.observe_job(replace(info("old", JobState.SUCCEEDED), attempt=1, **times))
    for state in (JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED, JobState.SUCCEEDED):
        metrics.observe_job(replace(info("new", state), attempt=1, **times))
    found = samples(metrics)
    assert (found["esperd_job_wait_seconds_count"], found["esperd_job_wait_seconds_sum"]) == (1, 5.0)
    assert (found['esperd_job_seconds_count{state="succeeded"}'], found['esperd_job_seconds_sum{state="succeeded"}']) == (1, 60.0)
    assert metrics.jobs_by_state() == {"succeeded": 2}


def test_the_example_rules_ask_for_metrics_that_exist_and_name_lines_of_the_runbook():
    docs = Path(__file__).parents[2] / "docs"
    rules, runbook = (docs / "alerts.yml").read_text(encoding="utf-8"), (docs / "runbook.md").read_text(encoding="utf-8")
    asked = {name.removesuffix("_bucket") for name in re.findall(r"\besperd_\w+", rules)}
    assert asked <= set(re.findall(r"`(esperd_\w+)`", (docs / "telemetry.md").read_text(encoding="utf-8")))
    assert all(f"| {symptom} |" in runbook for symptom in re.findall(r'runbook: "(.+?)"', rules))


def test_two_daemons_in_one_process_do_not_share_metrics():
    first, second = Metrics(), Metrics()
    first.observe_loop_lag(1.0)
    assert samples(second)["esperd_loop_lag_seconds_count"] == 0
