"""A worker's desk when the daemon cannot take what it is told: patient, then on with the job."""

from __future__ import annotations

import errno
import queue
from pathlib import Path

import desks
import msgspec
import pytest

from esperd.errors import (
    ActorUnavailable,
    AskTimeout,
    CircuitOpen,
    Conflict,
    DaemonUnreachable,
    EsperError,
    HandlerFailed,
    StoreFailed,
)
from esperd.messages.base import Done
from esperd.messages.leases import (
    CheckpointWritten,
    Lease,
)
from esperd.messages.policy import Conclude
from esperd.messages.telemetry import BreakerChanged, CheckpointSaved, EpochCompleted, PolicyUnavailable, Record
from esperd.store.blobs import Blobs
from esperd.store.filesystem import RealFilesystem
from esperd.trainer import attempt, link_desk, worker
from esperd.trainer.link_desk import LinkDesk
from esperd.trainer.session import Session

LEASE = Lease(job_id="j1", generation=2, job=None, checkpoint=None, blob_directory="", checkpoint_directory="", resumed=0)
CONCLUDE = Conclude(job="j1", point=9, epoch=9, seeds=())
LOCKED = StoreFailed("events.db: database is locked", sqlite="SQLITE_BUSY")


class Link:
    """A link whose daemon answers as scripted; with nothing more in the script, it takes everything."""

    def __init__(self, *script):
        self.script = list(script)
        self.taken = []
        self.asked = 0
        self.daemon_lost = False
        self.received = queue.SimpleQueue()

    def ask(self, _to, message, timeout_s=30.0):
        self.asked += 1
        error = self.script.pop(0) if self.script else None
        if error is not None:
            raise error
        self.taken.append(message)
        return Done()


class Time:
    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


def desk_of(link):
    time = Time()
    return LinkDesk(link, LEASE, clock=lambda: time.now, sleep=time.sleep), time


def event(epoch):
    return PolicyUnavailable(epoch=epoch, reason="")


def epochs(link):
    return [event.body.epoch for batch in link.taken if isinstance(batch, Record) for event in batch.events]


@pytest.mark.parametrize("trouble", [LOCKED, ActorUnavailable("jobs crashed and is being restarted")])
def test_what_the_daemon_cannot_take_for_a_moment_is_told_again(trouble):
    link = Link(trouble, trouble, None, trouble)
    desk, _ = desk_of(link)
    desk.record([event(1)])
    desk.checkpoint_written("ab", 1)
    assert epochs(link) == [1]
    assert [type(message) for message in link.taken] == [Record, CheckpointWritten]


def test_a_checkpoint_that_cannot_be_recorded_is_given_up_after_a_minute():
    desk, time = desk_of(Link(*[LOCKED] * 1000))
    with pytest.raises(ActorUnavailable, match=r"could not take CheckpointWritten for 60 s: .*locked"):
        desk.checkpoint_written("ab", 1)
    assert 50.0 < time.now <= link_desk.PATIENCE_S


@pytest.mark.parametrize("final", [DaemonUnreachable("gone"), Conflict("lease 2 has ended")])
def test_nothing_is_told_again_to_a_daemon_that_is_gone_or_gave_the_job_to_another(final):
    link = Link(LOCKED, final)
    with pytest.raises(type(final)):
        desk_of(link)[0].checkpoint_written("ab", 1)
    assert link.asked == 2


def test_a_job_waits_once_for_an_event_log_that_stays_away_and_hands_everything_in_when_it_is_back():
    link = Link(*[LOCKED] * 1000)
    desk, time = desk_of(link)
    desk.record([event(1)])
    waited = time.now
    desk.record([event(2)])
    assert (time.now, epochs(link)) == (waited, [])
    link.script.clear()
    desk.record([event(3)])
    assert epochs(link) == [1, 2, 3]
    assert [batch.key for batch in link.taken] == ["2-1", "2-2", "2-3"]


def test_events_that_are_never_taken_are_counted_and_end_no_job(monkeypatch):
    monkeypatch.setattr(link_desk, "MOST_UNRECORDED", 2)
    desk, _ = desk_of(Link(*[LOCKED] * 1000))
    for epoch in range(1, 5):
        desk.record([event(epoch)])
    assert desk.dropped == 2
    desk.record_rest()
    assert desk.dropped == 4


def test_a_batch_that_the_event_log_will_never_take_is_dropped_and_the_next_one_is_not():
    link = Link(HandlerFailed("a bug"))
    desk, _ = desk_of(link)
    desk.record([event(1)])
    desk.record([event(2)])
    assert (epochs(link), desk.dropped) == ([2], 1)


def test_a_worker_that_nobody_hands_a_lease_leaves(monkeypatch):
    monkeypatch.setattr(worker, "LOOK_S", 0.001)
    ticks = iter(range(0, 1000, 20))
    assert worker._await_lease(Link(), lambda: next(ticks)) is None
    assert next(ticks) == worker.LEASE_TIMEOUT_S + 20


class FullDisk(RealFilesystem):
    """Takes the first ``room`` files."""

    def __init__(self, room=0):
        self.room = room

    def create(self, path, mode):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        self.room -= 1
        return super().create(path, mode)


SHORT = desks.growing_job(budget={"epochs": 2}, growth={"enabled": False}, checkpoint_every_s=0.0)


def test_a_checkpoint_that_the_disk_refuses_ends_no_job(tmp_path):
    desk = desks.InProcessDesk()
    session = Session(SHORT, desks.PLUGINS, desk, Blobs(tmp_path, FullDisk()))
    with pytest.raises(StoreFailed, match="ENOSPC"):  # the artifacts must be kept
        session.train()
    assert [event.epoch for event in desk.events if isinstance(event, EpochCompleted)] == [1, 2]
    assert not [event for event in desk.events if isinstance(event, CheckpointSaved)]


def test_a_job_whose_artifacts_the_disk_refuses_is_left_for_another_worker_and_not_called_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attempt, "Blobs", lambda directory: Blobs(directory, FullDisk()))
    job = msgspec.structs.replace(SHORT, workdir=str(Path(desks.__file__).parent))
    lease = msgspec.structs.replace(
        LEASE, job=job, blob_directory=str(tmp_path / "blobs"), checkpoint_directory=str(tmp_path / "kept")
    )
    with pytest.raises(StoreFailed, match="ENOSPC"):
        attempt.train(LinkDesk(Link(), lease), lease)


def test_how_the_seeds_ended_is_told_to_the_policy_and_trouble_is_the_runs_to_judge():
    ending = Conclude(job="j1", point=9, epoch=9, seeds=())
    link = Link(None, ActorUnavailable("policy crashed and is being restarted"))
    desk, _ = desk_of(link)
    desk.conclude(ending)
    with pytest.raises(ActorUnavailable):
        desk.conclude(ending)
    assert link.taken == [ending]


def test_a_policy_that_does_not_answer_is_not_waited_for_at_every_decision_and_the_job_says_so():
    link = Link(*[AskTimeout("policy did not answer within 30 s")] * 3)
    desk, time = desk_of(link)
    for _ in range(3):
        with pytest.raises(AskTimeout):
            desk.decide(CONCLUDE)
    with pytest.raises(CircuitOpen, match="policy failed 3 times in a row"):
        desk.decide(CONCLUDE)
    assert link.asked == 3
    stands = {found.service: (found.state, found.retry_after_s) for found in desk.breakers()}
    assert stands == {"policy": ("open", 30.0), "cache": ("closed", None), "telemetry": ("closed", None)}
    time.now = 30.0
    with pytest.raises(EsperError, match="answered"):  # it is there again: this link answers everything with Done
        desk.decide(CONCLUDE)
    desk.record([event(1)])
    changes = [told.body.breaker for told in link.taken[-1].events if isinstance(told.body, BreakerChanged)]
    assert [(change.service, change.state.value) for change in changes] == [
        ("policy", "open"),
        ("policy", "half_open"),
        ("policy", "closed"),
    ]


def test_a_policy_that_restarts_is_asked_at_the_next_decision():
    link = Link(*[ActorUnavailable("policy is being restarted")] * 9)
    desk, _ = desk_of(link)
    for _ in range(9):
        with pytest.raises(ActorUnavailable):
            desk.decide(CONCLUDE)
    with pytest.raises(EsperError, match="answered"):
        desk.decide(CONCLUDE)
