"""A job killed anywhere goes on as if nothing had been: from every checkpoint, written after every single step, to the next ones.

What follows from a checkpoint is decided by it and by what the daemon answers, so a job that comes from each checkpoint to the
very next one, and tells the same on the way, comes to the same end from wherever it is killed.
"""

from __future__ import annotations

import os

import desks
import msgspec
import pytest
import torch

from esperd.messages.growth import Stage
from esperd.messages.telemetry import (
    ArmGauged,
    CheckpointSaved,
    RolledBack,
    StageChanged,
    TrainingStarted,
)
from esperd.store.blobs import Blobs
from esperd.trainer.checkpoint import decode
from esperd.trainer.guard import Guard
from esperd.trainer.session import Session

STRIDE = int(os.environ.get("ESPERD_TEST_STRIDE", "4"))
"""Checkpoints from one kill to the next; 1 kills after every step, and takes four times as long."""


class Killed(BaseException):
    """What kill -9 looks like from inside: nothing runs after it."""


class Desk(desks.InProcessDesk):
    """Remembers how much had been told when each checkpoint was durable; dies with the ``kill_at``-th one."""

    def __init__(self, kill_at=None):
        super().__init__()
        self.kill_at = kill_at
        self.told = []

    def checkpoint_written(self, sha256, epoch):
        super().checkpoint_written(sha256, epoch)
        self.told.append(len(self.events))
        if len(self.checkpoints) == self.kill_at:
            raise Killed


JOB = desks.growing_job(
    host="desks:fragile",
    host_options={"limit": 0.045, "since": 12},
    optimizer={"learning_rate": 6e-2},
    scheduler={"name": "constant"},
    budget={"epochs": 7},
    governor={"steps": 3},
    policy={"strategy": "gradient_merit", "warmup_epochs": 1, "patience": 1, "rent_parameters": 0.001, "rent_flops": 0.001},
    checkpoint_every_s=0.0,
    checkpoint_every_steps=1,
)
"""Measures arms, grows, breaks while seeds live, and is taken back: culls them, and lowers the rate."""


@pytest.fixture(scope="module", autouse=True)
def all_may_be_gauged():
    """In jobs of a few dozen steps a twentieth is not a batch for each arm."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("esperd.policy.gradient_merit.SHARE", 1.0)
        yield


def comparable(events):
    """Events without what differs between two runs of one job: durations, hashes of files that hold them, and how it began."""
    kept = [event for event in events if not isinstance(event, CheckpointSaved | TrainingStarted)]
    return [msgspec.structs.replace(event, seconds=0.0) if hasattr(event, "seconds") else event for event in kept]


def timeless(state):
    point = state.run.point and msgspec.structs.replace(state.run.point, seconds=0.0)
    return msgspec.structs.replace(state, run=msgspec.structs.replace(state.run, seconds=0.0, point=point))


def differences(one, other):
    """What two checkpoints differ in; empty: nothing but durations."""
    (one, tensors, streams), (other, others, others_streams) = decode(one), decode(other)
    differs = [] if timeless(one) == timeless(other) else [(timeless(one), timeless(other))]
    for mine, theirs in ((tensors, others), (streams, others_streams)):
        differs += sorted(mine.keys() ^ theirs.keys())
        differs += [name for name in mine.keys() & theirs.keys() if not torch.equal(nan(mine[name]), nan(theirs[name]))]
    return differs


def nan(tensor):
    return tensor.nan_to_num(12345.0) if tensor.is_floating_point() else tensor


@pytest.fixture
def seldom_good(monkeypatch):
    """The governor keeps a point after the epochs 1 and 4 only, so that seeds come and go between it and where the run stands."""
    decided = Guard.decided
    monkeypatch.setattr(Guard, "decided", lambda guard, cursor: guard.grower.epoch % 3 != 1 or decided(guard, cursor))


@pytest.mark.usefixtures("seldom_good")
def test_from_every_step_a_killed_job_comes_to_the_next_one_and_tells_the_same(tmp_path):
    blobs, whole = Blobs(tmp_path), Desk()
    Session(JOB, desks.PLUGINS, whole, blobs).train()
    rolled = whole.of(RolledBack)
    assert [event.action for event in rolled] == ["cull", "cull", "cut_rate"]
    assert any(event.gone for event in rolled)
    assert any(event.returned for event in rolled)
    assert {Stage.TRAINING, Stage.BLENDING, Stage.CULLED, Stage.RESETTING} <= {event.after for event in whole.of(StageChanged)}
    assert whole.of(ArmGauged)
    for start in range(0, len(whole.checkpoints) - 1, STRIDE):
        end = min(start + STRIDE, len(whole.checkpoints) - 1)
        desk = Desk(kill_at=end - start)
        with pytest.raises(Killed):
            Session(JOB, desks.PLUGINS, desk, blobs, resumed=1).train(whole.checkpoints[start][0])
        for (mine, _), (others, _) in zip(desk.checkpoints, whole.checkpoints[start + 1 : end + 1], strict=True):
            assert not differences(blobs.get(mine), blobs.get(others)), f"killed after checkpoint {start}"
        assert comparable(desk.events) == comparable(whole.events[whole.told[start] : whole.told[end]])
