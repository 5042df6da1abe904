"""A user: starts the daemon, submits a model of their own, loses a worker in mid-training, and gets what they asked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest
import torch

import esperd
from esperd.config import Config, Jobs
from esperd.errors import ExportRejected
from esperd.messages.growth import Stage
from esperd.messages.jobs import JobState
from esperd.messages.telemetry import CheckpointSaved, EpochCompleted, JobStateChanged, KernelLoaded, TrainingStarted
from esperd.testing import process_id, running_daemon

PROJECT = Path(__file__).parent / "project"
FILES = {"model.safetensors", "growth.json", "report.json", "README.md"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return shutil.copytree(PROJECT, tmp_path_factory.mktemp("user") / "project")


@pytest.fixture(scope="module")
def shapes(project):
    """The user's module, imported by the user."""
    spec = importlib.util.spec_from_file_location("users_shapes", project / "shapes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def journey(project, tmp_path_factory):
    """A job whose worker is killed while a seed is blended in, then the same job left alone."""
    quick = Config(jobs=Jobs(backoff_s=0.05, backoff_max_s=0.1))
    with running_daemon(tmp_path_factory.mktemp("service") / "state", quick) as daemon, daemon.sync_client() as esper:
        disturbed = esper.submit(project / "job.toml")
        killed, seen = None, []
        for event in disturbed.watch():
            seen.append(event)
            if killed is None and isinstance(event.body, EpochCompleted) and blends(event.body):
                (worker,) = [actor for actor in esper.actors().actors if actor.name == f"trainer/{disturbed.id}.1"]
                killed = process_id(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
        shutil.move(project / "grown", project / "grown-disturbed")
        alone = esper.submit(project / "job.toml")
        alone.wait()
        yield {"disturbed": disturbed, "alone": alone, "killed": killed, "seen": seen}


def blends(body):
    return any(seed.stage is Stage.BLENDING for seed in body.seeds)


def bodies(events, kind):
    return [event.body for event in events if isinstance(event.body, kind)]


def test_a_worker_killed_in_mid_training_is_replaced_and_the_job_resumes_from_its_checkpoint(journey):
    job, seen = journey["disturbed"], journey["seen"]
    info = job.info()
    assert (info.state, info.attempt, info.epoch, info.error) == (JobState.SUCCEEDED, 2, 16, None)
    assert journey["killed"] is not None
    assert not journey["killed"].is_alive
    states = [(body.state.value, body.attempt) for body in bodies(seen, JobStateChanged)]
    before, after = [("queued", 0), ("leased", 1), ("running", 1)], [("leased", 2), ("running", 2), ("succeeded", 2)]
    assert states == [*before, ("queued", 1), *after]
    lost = next(body for body in bodies(seen, JobStateChanged) if body.error is not None)
    assert "was killed by SIGKILL" in lost.error.message
    started = bodies(seen, TrainingStarted)
    assert [body.exact_resume for body in started] == [True, True]
    # The epoch that the kill answered may have been checkpointed in time or not; the one before it was.
    killed_in = next(body.epoch for body in bodies(seen, EpochCompleted) if blends(body))
    assert started[1].epoch >= killed_in - 1 >= 1
    assert started[1].epoch in [body.epoch for body in bodies(journey["alone"].events(), CheckpointSaved)]
    assert job.report().resumed == 1


def test_a_watcher_sees_every_event_once_and_in_order_across_the_crash(journey):
    seen = journey["seen"]
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert tuple(seen) == journey["disturbed"].events()


def test_the_disturbed_job_ends_bit_identical_to_one_left_alone(journey, project):
    disturbed, alone = (bodies(journey[name].events(), EpochCompleted)[-1] for name in ("disturbed", "alone"))
    assert (disturbed.train_loss, disturbed.gate_loss) == (alone.train_loss, alone.gate_loss)
    one, other = (dict(fetched(journey[name], "model.safetensors")) for name in ("disturbed", "alone"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert journey["disturbed"].report().seeds == journey["alone"].report().seeds


def fetched(job, name):
    from safetensors.torch import load

    return load(job.fetch(name)).items()


def test_something_was_grown_and_the_second_run_compiled_nothing(journey):
    assert journey["disturbed"].report().seeds
    assert {body.source for body in bodies(journey["seen"], KernelLoaded)} >= {"compiled"}
    again = {body.source for body in bodies(journey["alone"].events(), KernelLoaded)}
    assert again
    assert again <= {"memory", "disk"}


def test_the_export_rebuilds_the_trained_network_without_a_daemon(journey, shapes, tmp_path):
    written = journey["disturbed"].export(tmp_path / "mine")
    assert {path.name for path in written} == FILES
    network = esperd.load(tmp_path / "mine", host=shapes.reader)
    report = journey["disturbed"].report()
    inputs, labels = (torch.from_numpy(part) for part in shapes.pictures()["audit"])
    with torch.no_grad():
        scores = network(inputs)
    # The audit pass of the trained network, repeated by the user on the reloaded one.
    assert float(torch.nn.functional.cross_entropy(scores, labels)) == pytest.approx(report.grown.loss, rel=1e-6)
    assert float((scores.argmax(1) == labels).double().mean()) == pytest.approx(report.grown.metric, rel=1e-6)
    assert report.grown.metric > 0.5  # four shapes


def test_the_copy_the_job_wrote_into_the_users_folder_is_the_same_network(journey, project, shapes):
    for name, folder in (("disturbed", "grown-disturbed"), ("alone", "grown")):
        assert {path.name for path in (project / folder).iterdir()} == FILES
        assert (project / folder / "model.safetensors").read_bytes() == journey[name].fetch("model.safetensors")
    inputs = torch.from_numpy(shapes.pictures()["audit"][0])
    with torch.no_grad():
        outputs = [esperd.load(project / folder, host=shapes.reader)(inputs) for folder in ("grown-disturbed", "grown")]
    assert torch.equal(*outputs)


def test_loading_asks_for_the_users_host_and_says_how(journey, project):
    with pytest.raises(ExportRejected, match=r"shapes:reader.*import_host=True"):
        esperd.load(project / "grown")


def test_report_and_structure_name_the_job_and_its_data(journey, project):
    structure = msgspec.json.decode((project / "grown" / "growth.json").read_bytes())
    assert structure["manifest"]["job"] == journey["alone"].id
    assert structure["manifest"]["data"] == "shapes:pictures"
    assert structure["manifest"]["audit_loss"] == journey["alone"].report().grown.loss
