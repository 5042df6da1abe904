"""Export and load: outputs equal to the bit, and nothing in a file runs, whatever it says."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_growth import GATE, Host, epoch, germinate, grower, host, same, seed_of, until
from torch import nn

from esperd.builtins.networks.cnn import cnn
from esperd.errors import EsperError, ExportRejected, KernelRejected
from esperd.growth.export import STRUCTURE, WEIGHTS, HostReference, SampleSpec, encode, load, read
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots
from esperd.messages.growth import Contribution, Stage
from esperd.messages.policy import Decision

FOREIGN = HostReference(factory="small_growth:Host", options={"dropout": 0.2})


@pytest.fixture(scope="module")
def grown():
    """A network with two seeds that went through their whole lives."""
    grown = grower(probation_epochs=9, alpha_target=0.9)
    torch.manual_seed(0)
    epoch(grown)
    for name, blueprint, slot in (("first#0", "conv_light", "first"), ("second#1", "squeeze_excite", "second")):
        grown.apply(germinate(blueprint, slot))
        seed = until(grown, name, Stage.PROBATIONARY)
        seed.contribution = Contribution(loss=1.0, lower=0.5, upper=1.5, confidence=0.95, samples=99, epoch=grown.epoch)
        assert grown.apply(Decision(action="fossilize", seed=name, reason="it pays")) is None
    epoch(grown)
    grown.network.eval()
    return grown


def write(directory: Path, grown, reference=FOREIGN, **options) -> Path:
    weights, structure = encode(
        grown.network,
        host=reference,
        sample=SampleSpec.of(GATE[0]),
        history=tuple(grown.outcomes),
        version="0.1.0",
        **options,
    )
    (directory / WEIGHTS).write_bytes(weights)
    (directory / STRUCTURE).write_bytes(structure)
    return directory


@pytest.fixture
def exported(tmp_path, grown):
    return write(tmp_path, grown, manifest={"job": "j1"})


def edit(directory: Path, change, weights: bytes | None = None) -> Path:
    """Rewrite growth.json as someone who knows its hashes would."""
    structure = json.loads((directory / STRUCTURE).read_text())
    if weights is not None:
        (directory / WEIGHTS).write_bytes(weights)
        structure["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    change(structure)
    (directory / STRUCTURE).write_text(json.dumps(structure))
    return directory


# --- what comes back


@pytest.mark.parametrize("give", [Host, host(), None], ids=["function", "module", "imported"])
def test_a_loaded_network_answers_to_the_bit(exported, grown, give):
    rng = torch.get_rng_state()
    loaded = load(exported, host=give, import_host=give is None)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(GATE[0]), grown.network(GATE[0]))
    assert same(loaded.state_dict(), grown.network.state_dict())
    assert loaded.slots == grown.network.slots
    for ours, theirs in zip(loaded.seeds(), grown.network.seeds(), strict=True):
        assert (ours.name, ours.stage, ours.alpha, ours.ramp.at_rest) == (theirs.name, Stage.FOSSILIZED, 0.9, True)
        assert (ours.kernel, ours.graph, ours.parameters_added) == (theirs.kernel, theirs.graph, theirs.parameters_added)
    assert give is not Host or torch.equal(torch.get_rng_state(), rng)


def test_the_path_may_be_the_directory_or_its_structure_file(exported):
    assert same(load(exported, host=Host).state_dict(), load(str(exported / STRUCTURE), host=Host).state_dict())


def test_a_loaded_network_trains_on(exported):
    loaded = load(exported, host=Host).train()
    loaded(GATE[0]).square().sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_an_export_says_what_it_is_and_where_it_comes_from(exported, grown):
    structure, tensors = read(exported)
    assert (structure.host, structure.input) == (FOREIGN, SampleSpec(shape=(1, 6, 6), dtype="float32"))
    assert [outcome.seed for outcome in structure.history] == ["first#0", "second#1"]
    assert structure.manifest == {"job": "j1"}
    assert tensors.keys() == grown.network.state_dict().keys()


def test_equal_networks_give_equal_bytes(tmp_path, grown):
    first, second = (tmp_path / name for name in "ab")
    for directory in (first, second):
        directory.mkdir()
        write(directory, grown)
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert (first / STRUCTURE).read_bytes() == (second / STRUCTURE).read_bytes()


def test_a_builtin_host_needs_no_permission(tmp_path):
    torch.manual_seed(0)
    model = cnn(channels=(3, 5)).eval()
    x = torch.randn(2, 1, 8, 8)
    network = GrowingNetwork(model, find_slots(model, x))
    reference = HostReference(factory="esperd.builtins.networks.cnn:cnn", options={"channels": [3, 5]})
    weights, structure = encode(network, host=reference, sample=SampleSpec.of(x), version="0.1.0")
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / STRUCTURE).write_bytes(structure)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x), model(x))


def test_tied_weights_survive(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.b(self.a(x)))

    model, x = Tied().eval(), torch.randn(3, 4)
    network = GrowingNetwork(model, find_slots(model, x))
    weights, structure = encode(network, host=HostReference(factory="a:b", options={}), sample=SampleSpec.of(x), version="0.1.0")
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / STRUCTURE).write_bytes(structure)
    loaded = load(tmp_path, host=Tied)
    assert torch.equal(loaded(x), model(x))
    assert loaded.host.a.weight is loaded.host.b.weight


# --- what is not exported


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY])
def test_a_seed_on_trial_is_not_exported(stage):
    trial = grower()
    epoch(trial)
    trial.apply(germinate("conv_light", "first"))
    until(trial, "first#0", stage)
    with pytest.raises(ExportRejected, match=f"first#0 is {stage}; only fossilized"):
        encode(trial.network, host=FOREIGN, sample=SampleSpec.of(GATE[0]), version="0.1.0")


def test_a_seed_without_a_portable_kernel_is_not_exported():
    trial = grower()
    trial.network.insert(seed_of(nn.Identity(), trial.network.slots[0]))
    with pytest.raises(ExportRejected, match="no portable kernel"):
        encode(trial.network, host=FOREIGN, sample=SampleSpec.of(GATE[0]), version="0.1.0")


# --- what is not loaded


@pytest.mark.parametrize("missing", [STRUCTURE, WEIGHTS])
def test_a_missing_file_is_named(exported, missing):
    (exported / missing).unlink()
    with pytest.raises(ExportRejected, match=f"holds no grown model.*{missing}"):
        load(exported, host=Host)


def test_a_flipped_bit_in_the_weights_is_noticed(exported):
    weights = bytearray((exported / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (exported / WEIGHTS).write_bytes(weights)
    with pytest.raises(ExportRejected, match=r"model\.safetensors has SHA-256"):
        load(exported, host=Host)


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff\xfe", b"{", b"[" * 100_000, b'{"format": 2}', b'{"format": 2, "seeds": 3}'])
def test_a_malformed_structure_is_rejected(exported, text):
    (exported / STRUCTURE).write_bytes(text)
    with pytest.raises(ExportRejected, match="malformed"):
        load(exported, host=Host)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_an_unknown_format_is_rejected_with_its_number(exported, version):
    edit(exported, lambda structure: structure.update(format=version))
    with pytest.raises(ExportRejected, match=f"has format {version}; this esperd reads 2"):
        load(exported, host=Host)


def test_a_foreign_host_is_not_imported_without_permission(tmp_path, exported, monkeypatch):
    (tmp_path / "evil_host.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(exported, lambda structure: structure["host"].update(factory="evil_host:build"))
    with pytest.raises(ExportRejected, match=r"'evil_host:build'.*host=<your module or function>"):
        load(exported)
    assert "evil_host" not in sys.modules


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("esperd.builtins.networks.cnn:torch.os.system", {"command": "touch {}"}),
        ("esperd.builtins.networks.cnn:nn.modules.module.torch.os.mkdir", {"path": "{}"}),
        ("esperd.builtins.networks.options:positive", {"host": "a", "name": "b", "value": 1}),
        ("esperd.builtins.networks.cnn:nn", {}),
        ("esperd.builtins.networks.cnn:Sequence", {}),
        ("esperd.builtins.networks.cnn:__builtins__.exec", {}),
        ("esperd.builtins.networks.nowhere:cnn", {}),
        ("esperd.builtins.networks.cnn", {}),
        ("esperd.builtins.networks.cnn:cnn", {"channels": [-1]}),
        ("esperd.builtins.networks.cnn:cnn", {"surprise": 1}),
    ],
)
def test_what_a_file_calls_a_builtin_host_runs_nothing_else(tmp_path, exported, factory, options):
    proof = tmp_path / "proof"
    filled = {name: value.format(proof) if isinstance(value, str) else value for name, value in options.items()}
    edit(exported, lambda structure: structure.update(host={"factory": factory, "options": filled}))
    with pytest.raises(EsperError):
        load(exported)
    assert not proof.exists()


def test_a_host_function_that_returns_no_module_is_rejected(exported):
    with pytest.raises(ExportRejected, match=r"returned int, not a torch\.nn\.Module"):
        load(exported, host=lambda dropout: 3)


def test_a_host_that_does_not_fit_the_weights_is_rejected(exported):
    other = nn.ModuleDict({"first": nn.Conv2d(1, 4, 3), "second": nn.Conv2d(4, 6, 3)})
    with pytest.raises(ExportRejected, match="the weights do not fit the host"):
        load(exported, host=other)


def test_a_host_without_the_slots_is_rejected(exported):
    with pytest.raises(ExportRejected, match="no module 'first'"):
        load(exported, host=nn.Linear(2, 2))


def hostile(graph):
    def change(structure):
        text = json.loads(structure["seeds"][0]["graph"])
        graph(text)
        structure["seeds"][0]["graph"] = json.dumps(text)

    return change


@pytest.mark.parametrize(
    "change",
    [
        hostile(lambda graph: graph["ops"].append(["%9", "os.system", ["%x"], {}])),
        hostile(lambda graph: graph["ops"][0].__setitem__(1, "aten.from_file.default")),
        hostile(lambda graph: graph.update(output="%nowhere")),
        hostile(lambda graph: graph["parameters"].update({"__class__": [[1], "float32"]})),
        hostile(lambda graph: graph.update(parameters={"a": [[2**20, 2**20], "float32"]})),
        lambda structure: structure["seeds"][0].update(graph="import os"),
        lambda structure: structure["seeds"][0].update(graph=""),
    ],
)
def test_a_hostile_graph_is_rejected(exported, change):
    edit(exported, change)
    with pytest.raises(KernelRejected):
        load(exported, host=Host)


@pytest.mark.parametrize(
    "change",
    [
        lambda structure: structure["seeds"][0].update(name="first#a.b"),
        lambda structure: structure["seeds"][0].update(name="first"),
        lambda structure: structure["seeds"][0].update(name="second#0"),
        lambda structure: structure["seeds"][0].update(name="first#pop"),
        lambda structure: structure["seeds"].append(structure["seeds"][0]),
        lambda structure: structure["seeds"][0]["slot"].update(slot="nowhere"),
        lambda structure: structure["seeds"].pop(),
        lambda structure: structure["slots"].append(structure["slots"][0]),
        lambda structure: structure["slots"][0].update(slot="first.9"),
        lambda structure: structure["slots"][0].update(slot=""),
        lambda structure: structure["seeds"][0].update(alpha=2.0),
        lambda structure: structure["seeds"][0].update(alpha=-1.0),
    ],
)
def test_a_structure_that_contradicts_itself_is_rejected(exported, change):
    edit(exported, change)
    with pytest.raises(ExportRejected):
        load(exported, host=Host)


@pytest.mark.parametrize("weights", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_weights_that_are_no_safetensors_are_rejected_whatever_their_hash(exported, weights):
    edit(exported, lambda structure: None, weights)
    with pytest.raises(ExportRejected):
        load(exported, host=Host)


def test_weights_of_another_dtype_or_shape_are_rejected(exported):
    tensors = safetensors.torch.load((exported / WEIGHTS).read_bytes())
    tensors["host.head.bias"] = torch.zeros(7)
    edit(exported, lambda structure: None, safetensors.torch.save(tensors))
    with pytest.raises(ExportRejected, match=r"host\.head\.bias"):
        load(exported, host=Host)
