"""Operators: exact at alpha 0, what they say at alpha 1, and a gate that nobody looks into the future through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esperd.errors import InvalidSlot, UnknownName
from esperd.growth.flops import count_flops
from esperd.growth.operators import OPERATORS, Add, Gate, Multiply, operator, operator_flops, operator_parameters
from esperd.messages.growth import SlotRecord

SHAPES = {"cnn": (6, 5, 4), "mlp": (7,), "transformer": (5, 12)}


def slot(topology: str) -> SlotRecord:
    return SlotRecord(slot="s", topology=topology, shape=SHAPES[topology], dtype="float32", module="Module")


def tensors(topology: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    host, other = (torch.randn(3, *SHAPES[topology], generator=generator) for _ in range(2))
    return host, other


@pytest.mark.parametrize("topology", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("alpha", [0.0, torch.zeros(())], ids=["number", "tensor"])
def test_every_operator_passes_the_host_to_the_bit_at_alpha_0(name, topology, alpha):
    host, seed = tensors(topology)
    assert torch.equal(operator(name, slot(topology))(host, 1e4 * seed, alpha), host)


@pytest.mark.parametrize("topology", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_takes_one_alpha_for_each_sample(name, topology):
    host, seed = tensors(topology)
    enters = operator(name, slot(topology))
    alphas = torch.tensor([0.0, 0.3, 1.0])
    together = enters(host, seed, alphas.view(-1, *[1] * len(SHAPES[topology])))
    for index, alpha in enumerate(alphas.tolist()):
        torch.testing.assert_close(together[index], enters(host, seed, alpha)[index])
    assert torch.equal(together[0], host[0])


@pytest.mark.parametrize("topology", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_seed_that_is_the_identity_changes_nothing_through_any_operator(name, topology):
    host, _ = tensors(topology)
    torch.testing.assert_close(operator(name, slot(topology))(host, host.clone(), 0.7), host, rtol=0, atol=1e-6)


def test_adding_is_exact_at_both_ends():
    host, seed = tensors("cnn")
    assert torch.equal(Add()(host, 1e4 * seed, 1.0), 1e4 * seed)
    assert torch.allclose(Add()(host, seed, 0.25), 0.75 * host + 0.25 * seed)


def test_multiplying_scales_by_one_plus_or_minus_alpha_at_most():
    host = torch.ones(1, 2)
    extreme = Multiply()(host, torch.tensor([[1e6, -1e6]]), 0.4)
    torch.testing.assert_close(extreme, torch.tensor([[1.4, 0.6]]))
    assert torch.equal(Multiply()(torch.zeros(1, 2), torch.ones(1, 2), 1.0), torch.zeros(1, 2))


def test_a_gate_decides_for_each_sample_how_much_of_the_seed_it_gets():
    host, seed = tensors("mlp")
    gate = Gate(slot("mlp"))
    share = torch.sigmoid(gate.open(torch.relu(gate.look(host))))
    torch.testing.assert_close(gate(host, seed, 0.5), host + 0.5 * share * (seed - host))
    assert share.std() > 0


def test_a_gate_in_a_sequence_looks_at_no_later_position():
    host, seed = tensors("transformer")
    gate = Gate(slot("transformer"))
    before = gate(host, seed, 1.0)
    later = host.clone()
    later[:, 3:] += 10.0
    assert torch.equal(gate(later, seed, 1.0)[:, :3], before[:, :3])


@pytest.mark.parametrize("topology", SHAPES)
@pytest.mark.parametrize("name", OPERATORS)
def test_formulas_equal_the_true_counts(name, topology):
    record = slot(topology)
    enters = operator(name, record)
    host, seed = tensors(topology)
    assert operator_parameters(name, record) == sum(parameter.numel() for parameter in enters.parameters())
    _, flops = count_flops(lambda: enters(host, seed, 0.5))
    assert operator_flops(name, record) == flops / len(host)


def test_an_unknown_operator_lists_what_exists():
    with pytest.raises(UnknownName, match="'xor'; there are: add, multiply, gate"):
        operator("xor", slot("mlp"))


def test_a_slot_without_features_has_no_gate():
    with pytest.raises(InvalidSlot, match="has no features"):
        operator("gate", SlotRecord(slot="s", topology="mlp", shape=(0,), dtype="float32", module="Module"))


def test_operators_keep_no_state_but_the_gate():
    assert [isinstance(operator(name, slot("cnn")), nn.Module) for name in OPERATORS] == [True] * 3
    assert [bool(operator(name, slot("cnn")).state_dict()) for name in OPERATORS] == [False, False, True]
