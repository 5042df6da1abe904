"""Merging: affine seeds disappear into the layers beside them, outputs stay, and what cannot be folded says why."""

from __future__ import annotations

import copy

import pytest
import torch
from small_growth import PLUGINS, kernel, same, seed_of
from torch import nn

from esperd.declarations import resolve
from esperd.errors import ExportRejected
from esperd.execution.oplist import load_kernel
from esperd.growth.export import STRUCTURE, WEIGHTS, HostReference, SampleSpec, encode, load
from esperd.growth.merge import TOLERANCE, merge, merge_export
from esperd.growth.network import GrowingNetwork
from esperd.growth.slots import find_slots

WIDTH = 8
X = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """maker makes a slot's tensor; act's is read by reader; head ends it."""

    def __init__(self, bias=True):
        super().__init__()
        self.maker = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.act = nn.Tanh()
        self.reader = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(torch.relu(self.reader(self.act(self.maker(x)))))


class ReadTwice(Plain):
    """Something besides the linear layer reads the slot's tensor."""

    def forward(self, x):
        z = self.act(self.maker(x))
        return self.head(torch.relu(self.reader(z)) + z)


class Tied(Plain):
    """The maker's weights are used elsewhere as well."""

    def __init__(self):
        super().__init__()
        self.reader.weight = self.maker.weight


class Sums(Plain):
    """No linear layer stands beside act."""

    def forward(self, x):
        return self.head(torch.relu(self.act(self.maker(x))))


class Shift(nn.Module):
    """Affine with a constant: what no built-in blueprint of rank 1 has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x)


SHIFT = (
    '{"format":1,"inputs":["%x"],"parameters":{"linear.weight":[[8,8],"float32"],"linear.bias":[[8],"float32"]},"buffers":{},'
    '"ops":[["%0","aten.linear.default",["%x","linear.weight","linear.bias"],{}],["%1","aten.add.Tensor",["%x","%0"],{}]],'
    '"output":"%1","mutations":{}}'
)


def grown(host, *seeds, seed=0):
    """A network with seeds, (slot, blueprint or None for the shift, alpha) each, whose weights are no longer at birth."""
    torch.manual_seed(seed)
    host = host() if isinstance(host, type) else host
    network = GrowingNetwork(host, find_slots(host, X, patterns=("maker", "act"))).eval()
    for number, (slot, blueprint, alpha) in enumerate(seeds):
        if blueprint is None:
            graph, eager = SHIFT, Shift()
        else:
            graph = kernel(blueprint, (WIDTH,)).graph.decode()
            eager = resolve(PLUGINS.blueprints[blueprint].factory)((WIDTH,))
        module = load_kernel(graph.encode(), None)
        weights = eager.state_dict()
        module.load_state_dict({name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in weights.items()})
        network.insert(seed_of(module, network.port(slot).record, number, alpha=alpha, graph=graph))
    return network.eval()


def error(network, wanted):
    return float(((network(X) - wanted).abs() / (1 + wanted.abs())).max())


@pytest.mark.parametrize("alpha", [0.4, 1.0])
@pytest.mark.parametrize("blueprint", [None, "mlp_low_rank"], ids=["shift", "low-rank"])
@pytest.mark.parametrize("slot", ["maker", "act"])
@torch.no_grad()
def test_an_affine_seed_is_folded_into_the_linear_layer_beside_it(slot, blueprint, alpha):
    network = grown(Plain, (slot, blueprint, alpha))
    wanted, before = network(X), copy.deepcopy(network.host.state_dict())
    result = merge(network, X)
    assert (result.folded, result.kept) == ((f"{slot}#0",), {})
    assert list(network.seeds()) == []
    assert error(network, wanted) <= TOLERANCE
    assert not torch.equal(network(X), grown(Plain)(X))
    layer = "maker" if slot == "maker" else "reader"
    changed = {name for name, tensor in network.host.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= {f"{layer}.weight", f"{layer}.bias"}
    assert f"{layer}.weight" in changed


@torch.no_grad()
def test_several_seeds_are_folded_each_into_its_layer():
    network = grown(Plain, ("maker", None, 1.0), ("maker", "mlp_low_rank", 0.5), ("act", None, 0.7), ("act", None, 1.0))
    wanted = network(X)
    result = merge(network, X)
    assert set(result.folded) == {"maker#0", "maker#1", "act#2", "act#3"}
    assert result.kept == {}
    assert error(network, wanted) <= 2 * TOLERANCE


@torch.no_grad()
def test_a_seed_that_is_not_affine_is_kept_with_the_reason():
    network = grown(Plain, ("maker", "mlp_residual", 1.0))
    before, wanted = copy.deepcopy(network.state_dict()), network(X)
    result = merge(network, X)
    assert result.folded == ()
    assert "it is not affine (aten.gelu.default)" in result.kept["maker#0"]
    assert same(network.state_dict(), before)
    assert torch.equal(network(X), wanted)


@torch.no_grad()
def test_an_affine_seed_behind_a_curved_one_goes_to_the_reader_only():
    network = grown(Plain, ("act", "mlp_residual", 1.0), ("act", None, 1.0))
    wanted = network(X)
    result = merge(network, X)
    assert result.folded == ("act#1",)
    assert list(result.kept) == ["act#0"]
    assert error(network, wanted) <= TOLERANCE


@torch.no_grad()
def test_an_affine_seed_between_curved_ones_is_kept():
    network = grown(Plain, ("act", "mlp_residual", 1.0), ("act", None, 1.0), ("act", "mlp_residual", 1.0))
    assert "no linear layer makes or reads" in merge(network, X).kept["act#1"]


@torch.no_grad()
def test_nothing_is_folded_when_something_else_reads_the_slots_tensor():
    network = grown(ReadTwice, ("act", None, 1.0))
    before, wanted = copy.deepcopy(network.state_dict()), network(X)
    result = merge(network, X)
    assert result.folded == ()
    assert result.kept["act#0"] == "no linear layer makes or reads the output of act beside it"
    assert same(network.state_dict(), before)
    assert torch.equal(network(X), wanted)


@torch.no_grad()
def test_an_undone_fold_leaves_the_order_of_seeds_as_it_was():
    network = grown(Tied, ("maker", None, 1.0), ("maker", "mlp_residual", 1.0))
    before, wanted = copy.deepcopy(network.state_dict()), network(X)
    result = merge(network, X)
    assert result.folded == ()
    assert "folding it would change outputs by" in result.kept["maker#0"]
    assert [seed.name for seed in network.port("maker")] == ["maker#0", "maker#1"]
    assert same(network.state_dict(), before)
    assert torch.equal(network(X), wanted)


@torch.no_grad()
def test_a_constant_needs_a_bias_to_go_to():
    without = lambda: Plain(bias=False)  # noqa: E731
    network = grown(without(), ("maker", None, 1.0), ("act", None, 1.0))
    before = copy.deepcopy(network.state_dict())
    kept = merge(network, X).kept
    assert "the layer before it has no bias" in kept["maker#0"]
    assert "the layer behind it has no bias" in kept["act#1"]
    assert same(network.state_dict(), before)
    linear = grown(without(), ("maker", "mlp_low_rank", 1.0), ("act", "mlp_low_rank", 1.0))
    assert merge(linear, X).folded == ("maker#0", "act#1")


@torch.no_grad()
def test_a_slot_without_a_linear_layer_beside_it_keeps_its_seed():
    network = grown(Sums, ("act", None, 1.0))
    assert merge(network, X).kept["act#0"] == "no linear layer makes or reads the output of act beside it"


def test_a_plain_module_is_kept_because_its_algebra_is_unknown():
    network = grown(Plain)
    network.insert(seed_of(Shift(), network.slots[0]))
    assert "plain module" in merge(network, X).kept["maker#0"]


# --- exports, rewritten in place


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH)
        self.maker = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.act(self.maker(self.embedding(x))))


def write(directory, network, factory, sample):
    weights, structure = encode(
        network,
        host=HostReference(factory=factory, options={}),
        sample=SampleSpec.of(sample),
        manifest={"job": "j1"},
        version="0.1.0",
    )
    (directory / WEIGHTS).write_bytes(weights)
    (directory / STRUCTURE).write_bytes(structure)


@torch.no_grad()
def test_a_merged_export_loads_with_fewer_seeds_and_equal_outputs(tmp_path):
    network = grown(Plain, ("maker", None, 1.0), ("act", "mlp_residual", 1.0))
    wanted = network(X)
    write(tmp_path, network, "test_merge:Plain", X)
    result = merge_export(tmp_path, import_host=True)
    assert result.folded == ("maker#0",)
    merged = load(tmp_path, host=Plain)
    assert [seed.name for seed in merged.seeds()] == ["act#1"]
    assert error(merged, wanted) <= TOLERANCE
    assert b'"merged"' in (tmp_path / STRUCTURE).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STRUCTURE, WEIGHTS])
    assert merge_export(tmp_path, import_host=True).folded == ()


def test_merging_an_export_with_a_foreign_host_needs_permission(tmp_path):
    write(tmp_path, grown(Plain, ("maker", None, 1.0)), "test_merge:Plain", X)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ExportRejected, match="import_host=True"):
        merge_export(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("dtype", ["int64", "load", "float33"])
def test_only_networks_of_real_inputs_can_be_checked(tmp_path, dtype):
    torch.manual_seed(0)
    host, sample = Embeds(), torch.tensor([1, 2, 3])
    write(tmp_path, GrowingNetwork(host, find_slots(host, sample, patterns=("act",))), "test_merge:Embeds", sample)
    text = (tmp_path / STRUCTURE).read_text()
    (tmp_path / STRUCTURE).write_text(text.replace('"dtype": "int64"', f'"dtype": "{dtype}"'))
    with pytest.raises(ExportRejected, match=f"random inputs, and this network takes {dtype}"):
        merge_export(tmp_path, import_host=True)
