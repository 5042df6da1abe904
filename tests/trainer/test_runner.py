"""A job with ``compile = true``: the same job, compiled passes, and what its log tells of the compiler."""

from __future__ import annotations

import functools

import desks
import msgspec
import pytest

from esperd.errors import CompileUnavailable
from esperd.growth.compiled import Compiled
from esperd.messages.growth import Stage
from esperd.messages.telemetry import EpochCompleted, NetworkCompiled, NetworkNotCompiled, TrainingStarted
from esperd.store.blobs import Blobs
from esperd.trainer import runner

JOB = desks.growing_job(compile=True, budget={"epochs": 6})
PLAIN = desks.growing_job(budget={"epochs": 6})


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path)


@pytest.fixture(autouse=True)
def fast_backend(monkeypatch):
    """Traces as any backend does, and generates no code."""
    monkeypatch.setattr(runner, "Compiled", functools.partial(Compiled, "eager"))


def test_a_compiled_job_learns_what_the_plain_one_learns_and_tells_what_was_compiled(blobs):
    compiled, plain = desks.train(JOB, blobs), desks.train(PLAIN, blobs)
    told = compiled.desk.of(NetworkCompiled)
    assert told[0].structure == "host"
    assert told[0].seconds > 0.0
    assert {event.graphs for event in told} == {1}
    assert len({event.structure for event in told}) == len(told) > 1
    assert [event.epoch for event in told] == sorted(event.epoch for event in told)
    assert not compiled.desk.of(NetworkNotCompiled)
    losses = [[event.gate_loss for event in ended.desk.of(EpochCompleted)] for ended in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not plain.desk.of(NetworkCompiled)


def test_a_compiled_job_resumes_and_says_that_it_promises_no_bit_identity(blobs):
    desk = desks.train_until(JOB, blobs, desks.in_stage(Stage.BLENDING))
    resumed = desks.train(JOB, blobs, resume_from=desk.checkpoints[-1][0], resumed=1)
    assert resumed.report.grown.epochs == 6.0
    for started in (*desk.of(TrainingStarted), *resumed.desk.of(TrainingStarted)):
        assert not started.exact_resume
        assert "compile = true" in started.inexact_because
    assert resumed.desk.of(NetworkCompiled)


def test_what_runs_eager_is_told_and_the_job_goes_on(blobs):
    job = msgspec.structs.replace(JOB, growth=msgspec.structs.replace(JOB.growth, incubation="straight_through"))
    ended = desks.train(job, blobs)
    told = ended.desk.of(NetworkNotCompiled)
    assert told
    assert all("straight-through" in event.reason for event in told)
    assert len({event.structure for event in told}) == len(told)
    assert ended.report.grown.epochs == 6.0


def test_a_machine_that_cannot_compile_is_told_before_training(blobs, monkeypatch):
    monkeypatch.setattr(runner, "Compiled", functools.partial(Compiled, "nonesuch"))
    desk = desks.InProcessDesk()
    with pytest.raises(CompileUnavailable, match="nonesuch"):
        desks.train(JOB, blobs, desk)
    assert desk.events == []
