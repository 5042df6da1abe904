"""One run, driven to where everything about it has changed: it goes back with its cursor, and on from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import desks
import msgspec
import pytest
import torch
from small_growth import BATCH, GATE, PLUGINS, TRAIN, Kernels, germinate, grower, loss, same

from esperd.errors import ActorUnavailable
from esperd.execution.oplist import load_kernel
from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.jobs import Gates
from esperd.messages.policy import Arm, Decided, Decision
from esperd.messages.telemetry import EpochCompleted
from esperd.trainer.checkpoint import RunState
from esperd.trainer.data import ArraySplit, Splits
from esperd.trainer.passes import Stopped
from esperd.trainer.run import Run

GOOD = 4
"""Epochs whose gate pass is good. The fifth gate loss is an anomaly, so its epoch leaves no point to go back to, and in the sixth
the training breaks: the run goes back over a decision."""
STEPS = 4
BROKEN = (GOOD + 1) * STEPS + 1
"""Steps taken when the loss becomes no number."""
GIVEN = EvidenceSnapshot(sha256="ab" * 32, precedents=6, tries=40, jobs=3)
SPLITS = Splits(
    train=ArraySplit("train", *TRAIN),
    gate=ArraySplit("gate", *GATE),
    audit=ArraySplit("audit", *GATE),
    fingerprint=None,
    inexact_because="",
)
JOB = desks.growing_job(
    batch_size=BATCH,
    budget={"epochs": GOOD + 2},
    optimizer={"learning_rate": 1e-2},
    governor={"steps": 3, "action": "cut_rate"},
    policy={"rent_seconds": 0.01},
)


class Wanting(Kernels):
    """Cannot provide one of the kernels that are wanted."""

    def __init__(self):
        super().__init__()
        self.loaded, self.broken = [], {}

    def grow(self, blueprint, *place):
        if blueprint == "norm":
            raise ActorUnavailable("the cache is between two incarnations")
        return super().grow(blueprint, *place)


@dataclass
class Criterion:
    """The loss, times what the script says."""

    factor: float = 1.0

    def __call__(self, output, target):
        return self.factor * loss(output, target)


@dataclass
class Script:
    """The daemon's side: the policy counts, wants what it cannot have, and is away once; what breaks, breaks once."""

    stop: Callable[[Run], bool]
    criterion: Criterion = field(default_factory=Criterion)
    job_id: str = "job-1"
    run: Run | None = None
    now: float = 100.0

    def stop_requested(self):
        self.now += 1.0
        broke = bool(self.run.guard.watch.trips)
        self.criterion.factor = math.nan if self.run.grower.step == BROKEN and not broke else 1.0
        return "drain" if self.stop(self.run) else None

    def progressed(self, step):
        if step == (GOOD + 1) * STEPS and not self.run.guard.watch.trips:
            self.criterion.factor = 1e3  # of the gate pass that follows

    def decide(self, request):
        if request.point == 2:
            raise ActorUnavailable("policy is between two incarnations")
        decisions = [
            Decision(action="wait", arm=Arm(slot="second", blueprint="conv_light"), reason=f"not at {request.point}"),
            germinate("norm", "second"),
        ]
        if request.point == 1:
            decisions.append(germinate("squeeze_excite", "first"))
        return Decided(decisions=tuple(decisions), state=request.state + b".", evidence=GIVEN)

    def conclude(self, ending):
        raise ActorUnavailable("policy is between two incarnations")


def run_of(script: Script, epoch_ended: Callable[[Run], None] = lambda _run: None) -> Run:
    """A run at its beginning, in float16, so that there is a gradient scaler, too."""
    settings = Gates(max_loss_drift=1e6, max_loss_spike=1e6)
    grown = grower(criterion=script.criterion, source=Wanting(), precision="float16", settings=settings, incubation_epochs=9)
    grown.sample = None
    script.run = Run(
        phase="growth",
        job=JOB,
        budget=JOB.budget,
        grower=grown,
        splits=SPLITS,
        desk=script,
        source=grown.source,
        plugins=PLUGINS,
        schedule=lambda _share: 1.0,
        device=torch.device("cpu"),
        events=[],
        epoch_ended=epoch_ended,
        clock=lambda: script.now,
    )
    return script.run


def changed(one: RunState, other: RunState) -> set[str]:
    """Fields in which two states differ."""
    return {name for name in RunState.__struct_fields__ if getattr(one, name) != getattr(other, name)}


def returned(run: Run) -> bool:
    return bool(run.guard.watch.trips)


def test_a_run_that_goes_back_stands_where_it_stood_but_for_what_is_never_taken_back():
    ended: dict[int, RunState] = {}
    broken: list[RunState] = []

    def stop(run):
        if run.grower.step == BROKEN and not returned(run):
            broken.append(run.state()[0])
        return returned(run)

    run = run_of(Script(stop), lambda run: ended.setdefault(run.grower.epoch, run.state()[0]))
    with pytest.raises(Stopped):
        run.train()
    (wrecked,), stood, now = broken, ended[GOOD], run.state()[0]
    taken_back = {"grower", "batch", "loss_samples", "gate_losses", "policy_state", "heard", "refused", "unavailable", "look"}
    assert changed(stood, wrecked) >= taken_back, "all of it had changed since"
    assert changed(stood, now) == {"grower", "seconds", "watch", "decision_points", "rolled_back", "point"}
    assert now.point is not None, "it has left the point it may be taken back to"
    assert now.decision_points == GOOD + 1
    assert now.rolled_back == (f"{now.watch.trips[0].reason}; the network went back to epoch {GOOD}",)
    assert msgspec.structs.replace(now.grower, spent=stood.grower.spent) == stood.grower, "what was spent stays spent"
    assert run.loss_sum is None


def test_a_run_that_went_back_tells_the_policy_what_it_knew_there():
    asked = []
    script = Script(lambda _run: False)
    decide = script.decide
    script.decide = lambda request: asked.append(request) or decide(request)
    run = run_of(script)
    run.train()
    assert [event.epoch for event in run.events if isinstance(event, EpochCompleted)] == [1, 2, 3, 4, 5, 5, 6]
    assert [request.point for request in asked] == [1, 2, 3, 4, 5, 6, 7]
    first, again = asked[GOOD], asked[GOOD + 1]
    assert again.state == first.state == b"." * (GOOD - 1), "once it was away"
    assert (again.heard, first.heard) == (GOOD, GOOD), "the answer after that is none that it went by"
    assert again.observation.gate_losses[:-1] == first.observation.gate_losses[:-1]
    assert len(again.observation.gate_losses) == GOOD + 1
    assert [len(request.observation.rolled_back) for request in asked] == [0, 0, 0, 0, 0, 1, 0]


def test_everything_about_a_run_comes_back_from_its_checkpoint():
    script = Script(lambda run: returned(run) and run.batch == 2)
    run = run_of(script)
    with pytest.raises(Stopped):
        run.train()
    state, tensors = run.state()
    beginning, _ = run_of(Script(lambda _run: False)).state()
    assert changed(beginning, state) == set(RunState.__struct_fields__) - {"phase"}, "no field is as at the beginning"
    written = msgspec.msgpack.encode(state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    again = run_of(Script(lambda _run: False))
    again.go_on_from(msgspec.msgpack.decode(written, type=RunState), tensors, lambda graph: load_kernel(graph.encode(), None))
    came_back, came_with = again.state()
    assert changed(state, came_back) == set()
    unknown = "point.rng.python_gauss"  # NaN: Python has none left over, and no NaN is equal to another
    assert came_with.pop(unknown).isnan()
    assert tensors.pop(unknown).isnan()
    assert same(came_with, tensors)
    assert {"run.loss_sum", "run.look", "run.sample_inputs", "run.sample_targets"} <= tensors.keys()
