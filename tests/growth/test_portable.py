"""torch.export and ONNX: a file answers as the network does at several batch sizes, or there is no file."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import grown_networks
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from esperd.errors import ExportRejected, MissingExtra
from esperd.growth import onnx, portable
from esperd.growth.network import GrowingNetwork
from esperd.growth.onnx import export_onnx
from esperd.growth.parity import difference, inputs_of
from esperd.growth.plain import plain_module
from esperd.growth.portable import export_program, save_program, written_whole

NAMES = ("cnn", "mlp", "channels_last", "tied")


class Halves(nn.Module):
    """Only takes even batches."""

    def forward(self, x):
        return x.view(x.shape[0] // 2, 2, -1).sum(1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x, y):
        return self.left(x) + self.right(y)


class WithLogits(nn.Module):
    """Returns its prediction in an object, as language models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.layer(x), "hidden": x}


# --- round trips


@pytest.mark.parametrize("name", NAMES)
def test_a_program_read_from_its_file_answers_as_the_network(name, tmp_path):
    network, x = grown_networks.build(name)
    state = {key: tensor.clone() for key, tensor in network.train().state_dict().items()}
    parity = save_program(network, x, tmp_path / "model.pt2")
    assert network.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())
    assert (parity.form, parity.file, parity.batch_sizes) == ("torch.export", "model.pt2", tuple(sorted({1, 2, 3, len(x)})))
    assert parity.largest_difference <= parity.tolerance == 1e-5
    program = torch.export.load(tmp_path / "model.pt2").module()
    bigger = torch.randn(9, *x.shape[1:])
    torch.testing.assert_close(program(bigger), network.eval()(bigger))


@pytest.mark.parametrize("name", NAMES)
def test_an_onnx_file_answers_as_the_network(name, tmp_path):
    network, x = grown_networks.build(name)
    parity = export_onnx(network, x, tmp_path / "model.onnx")
    assert (parity.form, parity.file, parity.batch_sizes) == ("onnx", "model.onnx", tuple(sorted({1, 2, 3, len(x)})))
    assert parity.runtime == f"onnxruntime {onnxruntime.__version__}"
    assert parity.largest_difference <= parity.tolerance == 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(one.name, one.shape[0]) for one in session.get_inputs()] == [("input", "batch")]
    bigger = torch.randn(9, *x.shape[1:])
    (output,) = session.run(["output"], {"input": bigger.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(output, network(bigger).numpy(), rtol=1e-4, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_parameters_of_a_program_are_named_as_in_the_plain_module():
    network, x = grown_networks.build("cnn")
    assert export_program(network, x).state_dict.keys() == plain_module(network).state_dict().keys()


def test_a_program_holds_no_sample(tmp_path):
    network, x = grown_networks.build("mlp")
    save_program(network, x, tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as files:
        assert [info.file_size for info in files.infolist() if "sample_inputs" in info.filename] == [0]


def test_a_program_needs_neither_esperd_nor_the_hosts_code(tmp_path):
    network, x = grown_networks.build("cnn")
    save_program(network, x, tmp_path / "model.pt2")
    code = (
        "import sys, torch\n"
        "torch.export.load('model.pt2').module()(torch.rand(2, 1, 6, 6))\n"
        "sys.exit(any(name.partition('.')[0] in ('esperd', 'small_growth') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)


def test_a_sample_of_one_still_gives_a_program_for_any_batch():
    network, x = grown_networks.build("cnn")
    program = export_program(network, x[:1]).module()
    assert torch.equal(program(x), network(x))


def test_a_network_may_take_several_tensors(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(4, 4), torch.randn(4, 5)
    network = GrowingNetwork(TwoInputs().eval(), ())
    program = export_program(network, (x, y)).module()
    assert torch.equal(program(x, y), network(x, y))
    export_onnx(network, (x, y), tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "two.onnx")
    assert [one.name for one in session.get_inputs()] == ["input_0", "input_1"]
    (output,) = session.run(None, {"input_0": x.numpy(), "input_1": y.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(x, y))


def test_a_network_whose_prediction_is_called_logits_is_exported_with_it_alone():
    network, x = GrowingNetwork(WithLogits().eval(), ()), torch.randn(4, 4)
    program = export_program(network, x).module()
    assert torch.equal(program(x), network.host(x)["logits"])


def test_a_fused_path_that_steps_around_seeds_is_not_what_is_exported():
    network, x = grown_networks.build("fused")
    assert torch.equal(export_program(network, x).module()(x), network(x))


def test_a_network_for_one_batch_size_is_exported_for_that_one_when_asked():
    x = torch.randn(4, 6)
    network = GrowingNetwork(nn.Sequential(nn.Linear(6, 6), Halves()).eval(), ())
    with pytest.raises(ExportRejected, match="the network does not take the sample: RuntimeError"):
        export_program(network, x)
    program = export_program(network, x, dynamic_batch=False).module()
    assert torch.equal(program(x), network(x))


# --- what does not answer alike does not leave


class Forgetful(nn.Module):
    """A program that lost a little on the way."""

    def __init__(self, program):
        super().__init__()
        self.inner = program

    def forward(self, *inputs):
        output = self.inner(*inputs)
        return output + 1e-3 * (len(output) == 3)


@pytest.fixture
def before(tmp_path):
    """What stands there already, and must still stand there after a failure."""
    for name in ("model.pt2", "model.onnx"):
        (tmp_path / name).write_bytes(b"of yesterday")
    return tmp_path


def assert_untouched(directory):
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == dict.fromkeys(
        ("model.pt2", "model.onnx"), b"of yesterday"
    )


def test_a_program_that_differs_is_refused_with_the_largest_difference(before, monkeypatch):
    network, x = grown_networks.build("mlp")
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda path: Loaded(load(path)))
    told = r"model\.pt2 does not answer as the network does: at batch size 3 they differ by \d\.\de-04 \(.*1e-05 is allowed\)"
    with pytest.raises(ExportRejected, match=told) as error:
        save_program(network, x, before / "model.pt2")
    assert error.value.fields["batch_size"] == 3
    assert 1e-5 < error.value.fields["difference"] < 1e-3
    assert_untouched(before)


class Loaded:
    def __init__(self, program):
        self.program = program

    def module(self):
        return Forgetful(self.program.module())


def test_a_program_in_memory_is_compared_too(monkeypatch):
    network, x = grown_networks.build("mlp")
    traced = portable.trace
    monkeypatch.setattr(portable, "trace", lambda made: Loaded(traced(made)))
    with pytest.raises(ExportRejected, match="the exported program does not answer"):
        export_program(network, x)


def test_an_onnx_file_that_differs_is_refused(before, monkeypatch):
    network, x = grown_networks.build("mlp")
    traced = onnx.trace

    def tampered(made):
        program = traced(made)
        with torch.no_grad():
            program.state_dict["first.seeds.0.module.delta.1.weight"].mul_(1.5)
        return program

    monkeypatch.setattr(onnx, "trace", tampered)
    with pytest.raises(ExportRejected, match=r"model\.onnx does not answer as the network does"):
        export_onnx(network, x, before / "model.onnx")
    assert_untouched(before)


def test_an_onnx_file_that_no_runtime_loads_is_refused(before, monkeypatch):
    network, x = grown_networks.build("mlp")
    monkeypatch.setattr(onnx, "_write", lambda program, made, names, place: place.write_bytes(b"not onnx"))
    with pytest.raises(ExportRejected, match="onnxruntime cannot load what was written: "):
        export_onnx(network, x, before / "model.onnx")
    assert_untouched(before)


def test_an_operation_without_an_onnx_form_is_named(tmp_path):
    class Rare(nn.Module):
        def forward(self, x):
            return torch.special.zeta(x.abs() + 2.0, torch.ones(()))

    with pytest.raises(ExportRejected, match=r"the network has no ONNX form: .*zeta"):
        export_onnx(GrowingNetwork(Rare(), ()), torch.randn(2, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_torch_cannot_export_is_refused_with_a_way_out(before):
    class Branching(nn.Module):
        def forward(self, x):
            return x + 1.0 if float(x.sum()) > 0.0 else x

    network, x = GrowingNetwork(Branching(), ()), torch.ones(2, 3)
    with pytest.raises(ExportRejected, match=r"torch\.export cannot export the network: .*dynamic_batch=False"):
        save_program(network, x, before / "model.pt2")
    assert_untouched(before)


def test_a_network_that_draws_random_numbers_in_eval_is_compared_on_the_same_ones():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    before = torch.get_rng_state()
    export_program(GrowingNetwork(Noisy(), ()), torch.ones(2, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sample", [torch.zeros(0, 3), torch.zeros(()), (), (torch.zeros(2, 3), torch.zeros(3, 3))])
def test_what_is_no_sample_is_refused(sample):
    with pytest.raises(ExportRejected, match="a sample is one tensor"):
        inputs_of(sample)


def test_an_output_that_is_no_tensor_is_refused():
    class Counting(nn.Module):
        def forward(self, x):
            return x, len(x)

    with pytest.raises(ExportRejected, match="the network does not take the sample: InvalidModel: the model returned a tuple"):
        export_program(GrowingNetwork(Counting(), ()), torch.ones(2, 3))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra_before_anything_is_done(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'ONNX files need {package}: pip install "esperd\[onnx\]"'):
        export_onnx(None, None, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_esperd_imports_no_onnx_until_a_file_is_written():
    code = "import sys, esperd.growth.forms; sys.exit(any(name.startswith('onnx') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what is compared


@pytest.mark.parametrize(
    ("wanted", "given", "apart"),
    [
        ([1.0, -0.0], [1.0, 0.0], 0.0),
        ([float("nan"), float("inf")], [float("nan"), float("inf")], 0.0),
        ([0.0], [float("nan")], float("inf")),
        ([float("inf")], [float("-inf")], float("inf")),
        ([float("inf")], [1.0], float("inf")),
        ([3.0], [5.0], 0.5),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_and_no_nan_hides_in_them(wanted, given, apart):
    assert difference(torch.tensor(wanted), torch.tensor(given)) == apart


def test_files_take_their_place_together_and_what_belongs_to_a_file_before_it(tmp_path, monkeypatch):
    moved = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda self, target: moved.append(self.name) or replace(self, target))
    with written_whole(tmp_path / "new" / "m.onnx") as place:
        place.write_text("model")
        (place.parent / "m.onnx.data").write_text("weights")
        (place.parent / "a").write_text("early in the alphabet")
    assert moved[-1] == "m.onnx"
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"m.onnx", "m.onnx.data", "a"}
