"""Jobs with ``device = "cuda"``: kernels are proven on the GPU, seeds grow there, and a stopped job ends bit-identical."""

from __future__ import annotations

import desks
import msgspec
import pytest

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.compiler.compile import compile_kernel
from esperd.compiler.keys import kernel_key
from esperd.messages.telemetry import StageChanged
from esperd.store.blobs import Blobs

pytestmark = pytest.mark.gpu
SHAPES = {"cnn": (5, 3, 4), "mlp": (7,), "transformer": (7, 16)}


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
def test_every_blueprint_is_compiled_and_proven_on_the_gpu(blueprint):
    kernel = compile_kernel(kernel_key(blueprint, SHAPES[blueprint.topology], device="cuda"), blueprint)
    assert kernel.manifest.key.device == "cuda"


@pytest.mark.parametrize(
    ("growth", "optimizer"),
    [({}, {}), ({"incubation": "joint"}, {}), ({}, {"implementation": "fused"})],
    ids=["lookahead", "joint", "fused"],
)
def test_a_job_on_the_gpu_grows_and_a_stopped_one_ends_bit_identical(blobs, growth, optimizer):
    plain = desks.growing_job()
    job = desks.growing_job(
        device="cuda",
        growth={**msgspec.to_builtins(plain.growth), **growth},
        optimizer={**msgspec.to_builtins(plain.optimizer), **optimizer},
    )
    undisturbed = desks.train(job, blobs)
    assert undisturbed.desk.of(StageChanged)
    stopped = desks.train_until(job, blobs, desks.after_steps(31))
    resumed = desks.train(job, blobs, resume_from=stopped.checkpoints[-1][0], resumed=1)
    assert resumed.files["model.safetensors"] == undisturbed.files["model.safetensors"]
    assert resumed.comparable_report == undisturbed.comparable_report
