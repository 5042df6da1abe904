from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esperd.config import Jobs
from esperd.daemon.job_lifecycle import (
    HELD_STATES,
    UNREAD_TRIES,
    Broken,
    CancelAsked,
    CheckpointsUnread,
    DaemonRestarted,
    JobStanding,
    Leased,
    Moved,
    PauseAsked,
    ResumeAsked,
    RetryAsked,
    Started,
    Stopped,
    Succeeded,
    WorkerLeft,
    WorkerLost,
    advance,
    backoff_s,
    wait_is_over,
)
from esperd.errors import Conflict, IllegalTransition
from esperd.messages.jobs import (
    FINAL_JOB_STATES,
    JOB_TRANSITIONS,
    JobState,
)
from esperd.messages.leases import StopJob

LIMITS = Jobs(max_attempts=3, backoff_s=2.0, backoff_max_s=5.0)


def after(*events, standing: JobStanding | None = None) -> JobStanding:
    standing = standing or JobStanding()
    for event in events:
        standing = advance(standing, event, LIMITS, random.Random(0)).standing
    return standing


def running(**changes) -> JobStanding:
    return JobStanding(**{"state": JobState.RUNNING, "generation": 1, **changes})


def test_an_undisturbed_job_is_leased_started_and_succeeds():
    assert after(Leased(), Started(1), Succeeded(1)) == JobStanding(state=JobState.SUCCEEDED, generation=1)


def test_a_job_that_cannot_succeed_fails_and_is_not_tried_again():
    assert after(Leased(), Broken(1)).state is JobState.FAILED


def test_a_lost_worker_sends_the_job_back_to_wait_and_the_last_allowed_one_kills_it():
    standing = after(Leased(), Started(1), WorkerLost(1, now=100.0))
    assert (standing.state, standing.lost) == (JobState.QUEUED, 1)
    assert standing.retry_at is not None
    assert 100.0 <= standing.retry_at <= 102.0
    standing = after(Leased(), WorkerLost(2, now=200.0), Leased(), WorkerLost(3, now=300.0), standing=standing)
    assert (standing.state, standing.lost, standing.retry_at) == (JobState.DEAD, 3, None)


def test_a_worker_that_left_through_no_fault_of_the_job_spends_no_attempt_however_often_it_happens():
    standing = JobStanding()
    for generation in range(1, 3 * LIMITS.max_attempts):
        standing = after(Leased(), Started(generation), WorkerLeft(generation, now=100.0), standing=standing)
        assert (standing.state, standing.lost, standing.retry_at) == (JobState.QUEUED, 0, 102.0)


def test_a_job_whose_checkpoints_cannot_be_read_waits_longer_each_time_spends_no_attempt_and_is_dead_when_that_never_ends():
    standing, waits = JobStanding(), []
    for tries in range(1, UNREAD_TRIES):
        standing = after(Leased(), CheckpointsUnread(tries, now=100.0, tries=tries), standing=standing)
        assert (standing.state, standing.lost) == (JobState.QUEUED, 0)
        assert not wait_is_over(standing.retry_at, 100.0, LIMITS)
        waits.append(standing.retry_at - 100.0)
    assert waits == [2.0, 4.0] + [5.0] * (UNREAD_TRIES - 3)
    standing = after(Leased(), CheckpointsUnread(UNREAD_TRIES, now=100.0, tries=UNREAD_TRIES), standing=standing)
    assert (standing.state, standing.retry_at) == (JobState.DEAD, None)
    tries = UNREAD_TRIES + 1
    standing = after(RetryAsked(), Leased(), CheckpointsUnread(tries, now=100.0, tries=tries), standing=standing)
    assert (standing.state, standing.retry_at) == (JobState.QUEUED, 102.0)  # a retry has as many tries again


@given(lost=st.integers(1, 5000), seed=st.integers(0, 100))
def test_the_wait_doubles_up_to_its_maximum_with_full_jitter(lost, seed):
    wait = backoff_s(lost, LIMITS, random.Random(seed))
    assert 0.0 <= wait <= min(2.0 * 2 ** min(lost - 1, 9), 5.0)


@given(lost=st.integers(0, 5000), seed=st.integers(0, 100), set_back_s=st.floats(0.0, 1e9))
def test_a_job_waits_its_wait_and_no_clock_that_is_set_back_makes_it_wait_longer_than_the_longest_one(lost, seed, set_back_s):
    now = 1e9
    wait = backoff_s(lost, LIMITS, random.Random(seed)) if lost else LIMITS.backoff_s
    assert wait_is_over(now + wait, now, LIMITS) is (now + wait <= now)
    assert wait_is_over(now + wait, now + wait, LIMITS)
    waits_still = not wait_is_over(now + wait, now - set_back_s, LIMITS)
    assert not waits_still or wait + set_back_s <= 5.0 + 1e-6


@pytest.mark.parametrize(
    "event",
    [
        Started(1),
        Succeeded(1),
        Stopped(1, "drain"),
        Broken(1),
        WorkerLost(1, 0.0),
        WorkerLeft(1, 0.0),
        CheckpointsUnread(1, 0.0, 1),
    ],
)
def test_the_word_of_an_earlier_lease_is_refused(event):
    with pytest.raises(Conflict, match="lease 1 of the job has ended: the job is running under lease 2"):
        advance(running(generation=2), event, LIMITS, random.Random(0))


@pytest.mark.parametrize("state", [state for state in JobState if state not in HELD_STATES])
def test_the_word_of_a_worker_is_refused_when_none_holds_the_job(state):
    with pytest.raises(Conflict, match=f"the job is {state}"):
        advance(running(state=state), Succeeded(1), LIMITS, random.Random(0))


def test_a_start_that_is_said_twice_counts_once():
    assert after(Started(1), standing=running()) == running()


def test_a_queued_job_is_paused_at_once_and_a_running_one_when_its_worker_stopped():
    queued = advance(JobStanding(retry_at=9.0), PauseAsked(), LIMITS, random.Random(0))
    assert queued == Moved(JobStanding(state=JobState.PAUSED))
    asked = advance(running(), PauseAsked(), LIMITS, random.Random(0))
    assert asked == Moved(running(wish="pause"), (StopJob(why="pause"),))
    assert after(Stopped(1, "pause"), standing=asked.standing) == running(state=JobState.PAUSED)


def test_a_queued_or_paused_job_is_cancelled_at_once_and_a_running_one_when_its_worker_stopped():
    assert after(CancelAsked()).state is JobState.CANCELLED
    assert after(PauseAsked(), CancelAsked()).state is JobState.CANCELLED
    asked = advance(running(), CancelAsked(), LIMITS, random.Random(0))
    assert asked == Moved(running(wish="cancel"), (StopJob(why="cancel"),))
    assert after(Stopped(1, "cancel"), standing=asked.standing).state is JobState.CANCELLED


@pytest.mark.parametrize(
    "gone",
    [WorkerLost(1, now=0.0), WorkerLeft(1, now=0.0), CheckpointsUnread(1, 0.0, 1), DaemonRestarted(), Stopped(1, "drain")],
)
@pytest.mark.parametrize(("wish", "state"), [("pause", JobState.PAUSED), ("cancel", JobState.CANCELLED)])
def test_a_wish_is_carried_out_however_the_worker_ends(gone, wish, state):
    standing = after(gone, standing=running(wish=wish))
    assert (standing.state, standing.wish) == (state, None)


def test_a_pause_taken_back_while_the_worker_stops_queues_the_job():
    assert after(ResumeAsked(), Stopped(1, "pause"), standing=running(wish="pause")) == running(state=JobState.QUEUED)


def test_a_cancel_replaces_a_pause_and_is_not_taken_back():
    standing = after(CancelAsked(), standing=running(wish="pause"))
    assert standing.wish == "cancel"
    with pytest.raises(IllegalTransition, match="being cancelled"):
        after(PauseAsked(), standing=standing)
    with pytest.raises(IllegalTransition, match="cannot resume a job that is running"):
        after(ResumeAsked(), standing=standing)


def test_a_job_that_finishes_before_it_could_be_stopped_has_succeeded():
    assert after(Succeeded(1), standing=running(wish="cancel")) == running(state=JobState.SUCCEEDED)


def test_a_restarted_daemon_queues_what_was_held_without_spending_an_attempt():
    assert after(DaemonRestarted(), standing=running(lost=1)) == running(state=JobState.QUEUED, lost=1)
    paused = running(state=JobState.PAUSED)
    assert after(DaemonRestarted(), standing=paused) == paused


@pytest.mark.parametrize("state", sorted(FINAL_JOB_STATES))
@pytest.mark.parametrize("event", [Leased(), PauseAsked(), ResumeAsked(), CancelAsked()])
def test_nothing_moves_a_finished_job(state, event):
    with pytest.raises(IllegalTransition, match=f"a job that is {state}"):
        advance(JobStanding(state=state), event, LIMITS, random.Random(0))


@pytest.mark.parametrize("state", sorted(JobState))
def test_only_a_job_that_failed_or_died_is_retried_and_has_all_its_attempts_before_it(state):
    standing = JobStanding(state=state, generation=3, lost=2)
    if state in (JobState.FAILED, JobState.DEAD):
        assert advance(standing, RetryAsked(), LIMITS, random.Random(0)).standing == JobStanding(generation=3)
    else:
        with pytest.raises(IllegalTransition, match=f"cannot retry a job that is {state}"):
            advance(standing, RetryAsked(), LIMITS, random.Random(0))


EVENTS = st.sampled_from([Leased(), PauseAsked(), ResumeAsked(), CancelAsked(), RetryAsked(), DaemonRestarted()]) | st.integers(
    -1, 1
).flatmap(
    lambda behind: st.sampled_from(
        [
            lambda g: Started(g + behind),
            lambda g: Succeeded(g + behind),
            lambda g: Broken(g + behind),
            lambda g: WorkerLost(g + behind, now=50.0),
            lambda g: WorkerLeft(g + behind, now=50.0),
            lambda g: CheckpointsUnread(g + behind, now=50.0, tries=g),
            lambda g: Stopped(g + behind, "pause"),
            lambda g: Stopped(g + behind, "cancel"),
            lambda g: Stopped(g + behind, "drain"),
        ]
    )
)


class JobLife(RuleBasedStateMachine):
    """Any events in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.standing = JobStanding()
        self.rng = random.Random(0)

    @rule(event=EVENTS)
    def happens(self, event):
        before = self.standing
        worker_event = callable(event)
        if worker_event:
            event = event(before.generation)
        try:
            moved = advance(before, event, LIMITS, self.rng)
        except Conflict:
            assert worker_event
            assert before.state not in HELD_STATES or event.generation != before.generation
            return
        except IllegalTransition:
            return
        self.standing = moved.standing
        if moved.standing.state is not before.state:
            assert moved.standing.state in JOB_TRANSITIONS[before.state]
        assert moved.standing.generation - before.generation == isinstance(event, Leased)
        lost = 0 if isinstance(event, RetryAsked) else before.lost + isinstance(event, WorkerLost)
        assert moved.standing.lost == lost
        if moved.tell_worker:
            assert moved.standing.state in HELD_STATES

    @precondition(lambda self: self.standing.state not in FINAL_JOB_STATES)
    @rule()
    def can_always_be_cancelled(self):
        moved = advance(self.standing, CancelAsked(), LIMITS, self.rng)
        assert moved.tell_worker or moved.standing.state is JobState.CANCELLED

    @invariant()
    def wishes_are_of_held_jobs_and_waits_of_queued_ones(self):
        assert self.standing.wish is None or self.standing.state in HELD_STATES
        assert self.standing.retry_at is None or self.standing.state is JobState.QUEUED
        assert self.standing.lost <= LIMITS.max_attempts


JobLife.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestJobLife = JobLife.TestCase
