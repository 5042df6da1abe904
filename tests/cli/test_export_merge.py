"""``esper export --merge`` for a model of the user's own: its code is found, and what cannot be merged stays whole."""

from __future__ import annotations

import json
import re
import sys

import msgspec
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
