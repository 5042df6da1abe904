"""Other forms of an export, from its files alone."""

from __future__ import annotations

import sys

import grown_networks
import pytest
import torch
from torch import nn

from esperd.errors import ExportRejected, MissingExtra, UnknownName
from esperd.growth import forms
from esperd.growth.export import STRUCTURE, WEIGHTS, HostReference, SampleSpec, encode
from esperd.growth.forms import drawn_sample, write_forms
from esperd.growth.network import GrowingNetwork
from esperd.messages.card import CARD


@pytest.fixture
def exported(tmp_path):
    network, x = grown_networks.build("mlp")
    write(tmp_path, network, x, "grown_networks:Perceptron")
    return tmp_path


def write(directory, network, x, factory):
    reference = HostReference(factory=factory, options={})
    weights, structure = encode(network, host=reference, sample=SampleSpec.of(x), version="0.1.0")
    (directory / WEIGHTS).write_bytes(weights)
    (directory / STRUCTURE).write_bytes(structure)


def names(directory):
    return {file.name for file in directory.iterdir()}


def test_a_form_is_written_beside_the_export_and_told_of_in_its_card(exported):
    (parity,) = write_forms(exported, ("pt2", "pt2"), host=grown_networks.Perceptron)
    network, _ = grown_networks.build("mlp")
    x = torch.randn(7, 8)
    assert torch.equal(torch.export.load(exported / "model.pt2").module()(x), network(x))
    assert parity.batch_sizes == (1, 2, 3, 4)
    assert "| `model.pt2` | torch" in (exported / CARD).read_text()
    assert names(exported) == {WEIGHTS, STRUCTURE, "model.pt2", CARD}


def test_forms_before_one_that_fails_stay_and_are_told_of(exported, monkeypatch):
    def fail(network, sample, path):
        raise ExportRejected("no such luck")

    monkeypatch.setitem(forms.WRITERS, "onnx", ("model.onnx", fail))
    with pytest.raises(ExportRejected, match="no such luck"):
        write_forms(exported, ("pt2", "onnx"), host=grown_networks.Perceptron)
    assert names(exported) == {WEIGHTS, STRUCTURE, "model.pt2", CARD}
    assert "model.pt2" in (exported / CARD).read_text()


def test_the_users_code_runs_only_when_they_say_so(exported):
    with pytest.raises(ExportRejected, match="import_host=True"):
        write_forms(exported, ("pt2",))
    write_forms(exported, ("pt2",), import_host=True)


def test_an_unknown_form_is_refused_with_those_there_are(exported):
    with pytest.raises(UnknownName, match="no form is called 'caffe'; there are: pt2, onnx"):
        write_forms(exported, ("pt2", "caffe"), host=grown_networks.Perceptron)
    assert names(exported) == {WEIGHTS, STRUCTURE}


def test_a_missing_package_is_told_before_any_form_is_written(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"esperd\[onnx\]"):
        write_forms(exported, ("pt2", "onnx"), host=grown_networks.Perceptron)
    assert names(exported) == {WEIGHTS, STRUCTURE}


def test_a_network_that_takes_token_ids_is_written_too(tmp_path):
    host = nn.Sequential(nn.Embedding(2, 4), nn.Flatten(), nn.Linear(20, 3)).eval()
    write(tmp_path, GrowingNetwork(host, ()), torch.zeros(2, 5, dtype=torch.int64), "a:b")
    write_forms(tmp_path, ("pt2",), host=host)
    tokens = torch.randint(2, (6, 5))
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(tokens), host(tokens))


@pytest.mark.parametrize(("dtype", "values"), [("float32", None), ("float16", None), ("int64", {0, 1}), ("bool", {False, True})])
def test_a_drawn_sample_is_what_the_network_takes_and_always_the_same(dtype, values):
    drawn = drawn_sample(SampleSpec(shape=(3, 5), dtype=dtype))
    assert (drawn.shape, drawn.dtype) == ((4, 3, 5), getattr(torch, dtype))
    assert torch.equal(drawn, drawn_sample(SampleSpec(shape=(3, 5), dtype=dtype)))
    assert values is None or set(drawn.flatten().tolist()) == values


def test_a_dtype_that_torch_does_not_know_is_refused():
    with pytest.raises(ExportRejected, match="'load', which is not a dtype"):
        drawn_sample(SampleSpec(shape=(3,), dtype="load"))
