"""``esper export`` for a model of the user's own: its code is found, other forms of it answer alike, and what cannot be merged or
written in another form stays whole.
"""

from __future__ import annotations

import json
import re
import sys

import msgspec
import onnxruntime
import pytest
import synthetic_job
import torch
from scripted_daemon import ScriptedDaemon
from test_esper import ran
from torch import nn

from esperd.cli.client import esper
from esperd.cli.exit_codes import run
from esperd.execution.oplist import load_kernel
from esperd.growth.alpha import Ramp
from esperd.growth.export import HostReference, SampleSpec, encode, load
from esperd.growth.lifecycle import Life
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.slots import find_slots
from esperd.messages.card import CARD, MARK
from esperd.messages.growth import Stage
from esperd.messages.jobs import JobState

AFFINE = (
    '{"format":1,"inputs":["%x"],"parameters":{"linear.weight":[[8,8],"float32"],"linear.bias":[[8],"float32"]},"buffers":{},'
    '"ops":[["%0","aten.linear.default",["%x","linear.weight","linear.bias"],{}],["%1","aten.add.Tensor",["%x","%0"],{}]],'
    '"output":"%1","mutations":{}}'
)
MODEL = """
from torch import nn

def network(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
"""
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def own_network(width):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def grown():
    """The user's network, with one affine seed behind its first layer."""
    torch.manual_seed(0)
    host = own_network(8)
    network = GrowingNetwork(host, find_slots(host, X, patterns=("0",))).eval()
    module = load_kernel(AFFINE.encode(), None)
    module.load_state_dict({name: torch.randn_like(tensor) for name, tensor in module.state_dict().items()})
    record = network.port("0").record
    seed = Seed(
        name="0#0",
        blueprint="affine",
        module=module,
        record=record,
        parameters_added=72,
        flops_per_sample=128.0,
        epoch=1,
        kernel=None,
        graph=AFFINE,
    )
    seed.life = Life(stage=Stage.FOSSILIZED)
    seed.alpha, seed.ramp = 1.0, Ramp(target=1.0)
    network.insert(seed)
    return network.eval()


def module_in(directory, name):
    """The user's module in a directory; its names must differ, for Python keeps what it imported."""
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(MODEL)
    return f"{name}:network"


@pytest.fixture
def daemon(tmp_path, monkeypatch):
    """With a finished job whose host is the user's; ``host`` is set by the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    daemon = ScriptedDaemon(tmp_path, state=JobState.SUCCEEDED)

    def finished(host, workdir):
        reference = HostReference(factory=host, options={"width": 8})
        weights, structure = encode(grown(), host=reference, sample=SampleSpec.of(X), version="0.1.0")
        daemon.artifacts = {"model.safetensors": weights, "growth.json": structure}
        job = msgspec.structs.replace(synthetic_job.JOB, host=host, workdir=str(workdir))
        daemon.info = lambda: msgspec.structs.replace(synthetic_job.info(JobState.SUCCEEDED), job=job)
        return daemon

    return finished


@torch.no_grad()
def test_a_users_own_model_is_merged_by_the_name_the_job_gave_it(daemon, tmp_path, capsys):
    finished = daemon(module_in(tmp_path / "project", "named_model"), tmp_path / "project")
    target = tmp_path / "grown"
    assert ran(finished, "export", synthetic_job.JOB_ID, "--to", str(target), "--merge", "--import-host", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["merged"], told["folded"], told["kept"]) == (True, ["0#0"], {})
    merged = load(target, host=own_network)
    assert list(merged.seeds()) == []
    assert torch.allclose(merged(X), grown()(X), atol=1e-4)


def test_a_users_own_model_is_merged_with_a_host_of_the_current_directory(daemon, tmp_path, capsys):
    finished = daemon("trained_elsewhere:network", "/not/on/this/machine")
    host = module_in(tmp_path / "elsewhere", "given_model")
    assert ran(finished, "export", synthetic_job.JOB_ID, "--to", str(tmp_path / "grown"), "--merge", "--host", host) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"merged {tmp_path / 'grown'}: folded 0#0"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], r"not part of esperd\. Add --import-host .* or --host module:function"),
        (["--import-host"], "No module named 'nowhere_to_be_found'"),
        (["--host", "nor_here:network"], "No module named 'nor_here'"),
    ],
)
def test_what_cannot_be_merged_is_written_whole_and_the_error_says_what_to_do(daemon, tmp_path, capsys, words, told):
    finished = daemon("nowhere_to_be_found:network", tmp_path)
    target = tmp_path / "grown"
    assert ran(finished, "export", synthetic_job.JOB_ID, "--to", str(target), "--merge", *words) == 2
    captured = capsys.readouterr()
    assert f"the model is written to {target} and loads as it is, but it was not merged" in captured.err
    assert re.search(told, captured.err)
    assert re.search(told, captured.err)
    assert len(list(load(target, host=own_network).seeds())) == 1


@pytest.mark.parametrize("words", [["--host", "m:f"], ["--import-host"], ["--merge", "--host", "m:f", "--import-host"]])
def test_options_of_merging_that_make_no_sense_are_refused(words, capsys):
    assert run(esper, ["export", "id", "--to", "x", *words]) == 2
    assert "--import-host" in capsys.readouterr().err


# --- other forms


def finished(daemon, tmp_path, name):
    """A finished job whose host is the user's and stands in the job's workdir."""
    return daemon(module_in(tmp_path / "project", name), tmp_path / "project")


@torch.no_grad()
def test_a_model_is_written_in_every_form_asked_for(daemon, tmp_path, capsys):
    job, target = finished(daemon, tmp_path, "formed_model"), tmp_path / "grown"
    words = ["--format", "pt2,safetensors", "--format", "onnx", "--import-host", "--json"]
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(target), *words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [parity["file"] for parity in told["parity"]] == ["model.pt2", "model.onnx"]
    assert all(parity["largest_difference"] <= parity["tolerance"] for parity in told["parity"])
    assert {str(target / name) for name in ("model.pt2", "model.onnx", CARD)} <= set(told["files"])
    wanted = grown()(X)
    assert torch.equal(torch.export.load(target / "model.pt2").module()(X), wanted)
    (output,) = onnxruntime.InferenceSession(target / "model.onnx").run(None, {"input": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), wanted, rtol=1e-4, atol=1e-4)
    assert "model.onnx" in (target / CARD).read_text()


@torch.no_grad()
def test_a_merged_model_is_written_as_it_is_after_merging(daemon, tmp_path, capsys):
    job, target = finished(daemon, tmp_path, "merged_and_formed"), tmp_path / "grown"
    words = ["--merge", "--format", "pt2", "--import-host"]
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(target), *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"merged {target}: folded 0#0"
    assert lines[-1].startswith(f"written {target / 'model.pt2'}: torch {torch.__version__} answers as the network does at batch")
    assert not [name for name in torch.export.load(target / "model.pt2").state_dict if "seeds" in name]


def test_without_the_users_code_the_model_stays_and_the_error_says_what_to_add(daemon, tmp_path, capsys):
    job, target = finished(daemon, tmp_path, "never_imported"), tmp_path / "grown"
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(target), "--format", "pt2") == 2
    told = capsys.readouterr().err
    assert f"the model is written to {target} and loads as it is, but not in every form asked for (pt2)" in told
    assert "Add --import-host" in told
    assert "never_imported" not in sys.modules
    assert not (target / "model.pt2").exists()
    assert list(load(target, host=own_network).seeds())


def test_a_missing_package_is_told_before_anything_is_asked_of_the_daemon(daemon, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    job = daemon("a:b", tmp_path)
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(tmp_path / "grown"), "--format", "onnx", "--json") == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "missing_extra"
    assert 'pip install "esperd[onnx]"' in error["message"]
    assert not job.asked
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("words", [["--format", "caffe"], ["--format", "pt2,"], ["--format", "PT2"]])
def test_an_unknown_format_is_refused_with_those_there_are(words, capsys):
    assert run(esper, ["export", "id", "--to", "x", *words]) == 2
    assert "is not a format; there are: safetensors, pt2, onnx" in capsys.readouterr().err


def test_safetensors_alone_builds_no_network_and_needs_no_host(daemon, tmp_path, capsys):
    job = daemon("nowhere_at_all:network", tmp_path)
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(tmp_path / "grown"), "--format", "safetensors") == 0
    assert "written" in capsys.readouterr().out
    assert run(esper, ["export", "id", "--to", "x", "--format", "safetensors", "--import-host"]) == 2


def test_a_readme_of_the_users_is_left_alone_and_that_is_told(daemon, tmp_path, capsys):
    job, target = finished(daemon, tmp_path, "beside_a_readme"), tmp_path / "grown"
    job.artifacts["README.md"] = f"{MARK}\n".encode()
    target.mkdir()
    (target / CARD).write_text("# My project")
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(target), "--merge", "--import-host") == 0
    assert f"left alone {target / CARD}: it is yours, so no model card was written" in capsys.readouterr().out
    assert (target / CARD).read_text() == "# My project"


def test_a_merged_models_card_says_what_was_folded(daemon, tmp_path, capsys):
    job, target = finished(daemon, tmp_path, "merged_and_told"), tmp_path / "grown"
    job.artifacts |= {"README.md": f"{MARK}\n".encode(), "report.json": msgspec.json.encode(synthetic_job.REPORT)}
    assert ran(job, "export", synthetic_job.JOB_ID, "--to", str(target), "--merge", "--import-host") == 0
    assert "folded into layers of the host: 1" in (target / CARD).read_text()
