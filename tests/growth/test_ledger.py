"""The ledger: everything that runs is charged what it costs, and being counted changes nothing."""

from __future__ import annotations

import pytest
import torch
from small_growth import BATCH, GATE, SAMPLES, TRAIN, batches, epoch, germinate, grower, loss, network, same, steps, tensors_of
from torch import nn

from esperd.growth import BlueprintSource, GrowingNetwork, assemble, find_slots, measure
from esperd.growth.flops import count_flops
from esperd.growth.gate_pass import variants_due
from esperd.growth.ledger import Ledger
from esperd.messages.growth import Stage

LINEAR = 2 * 8 * 5
"""Multiply-adds of an 8 → 5 linear layer, as two FLOPs each."""
FIRST, SECOND, HEAD = 2 * 9 * 1 * 4 * 36, 2 * 9 * 4 * 6 * 9, 2 * 6 * 3
"""The test host by hand: 3x3 convolution 1 → 4 on 6x6, 3x3 convolution 4 → 6 on 3x3, linear 6 → 3."""
FORWARD = FIRST + SECOND + HEAD
TRAINED = FORWARD + FORWARD + (SECOND + HEAD)
"""Forward, gradients of all weights, gradients of the inputs of all layers but the first."""


def test_a_linear_layer_costs_what_a_hand_computes():
    layer = nn.Linear(8, 5)
    output, forward = count_flops(lambda: layer(torch.ones(3, 8)))
    assert forward == 3 * LINEAR
    assert torch.equal(output, layer(torch.ones(3, 8)))
    _, both = count_flops(lambda: layer(torch.ones(3, 8, requires_grad=True)).sum().backward())
    assert both == 3 * (LINEAR + 2 * LINEAR)


def test_a_convolution_costs_what_a_hand_computes():
    layer = nn.Conv2d(3, 7, 3, padding=1, stride=2)
    _, forward = count_flops(lambda: layer(torch.ones(2, 3, 8, 8)))
    assert forward == 2 * (2 * 9 * 3 * 7) * 16


def test_work_is_counted_once_and_charged_by_samples():
    ledger, runs = Ledger(), []
    layer = nn.Linear(8, 5)

    def work(samples):
        runs.append(samples)
        return layer(torch.ones(samples, 8))

    for samples in (3, 5, 1):
        assert ledger.charge("gate", "host", samples, lambda samples=samples: work(samples)).shape == (samples, 5)
    assert runs == [3, 5, 1]
    assert ledger.spent == {"train": 0.0, "incubation": 0.0, "ablation": 0.0, "gate": 9.0 * LINEAR, "trial": 0.0}
    assert ledger.total == 9 * LINEAR
    assert ledger.cost("gate", "host") == LINEAR
    assert ledger.cost("gate", "other") is None
    assert ledger.cost("train", "host") is None


def test_an_epoch_of_the_host_costs_what_a_hand_computes():
    grown = grower()
    epoch(grown)
    assert {purpose: spent for purpose, spent in grown.ledger.spent.items() if spent} == {
        "train": SAMPLES * TRAINED,
        "gate": SAMPLES * FORWARD,
    }
    epoch(grown)
    assert grown.ledger.spent["train"] == 2 * SAMPLES * TRAINED
    assert grown.ledger.spent["gate"] == 2 * SAMPLES * FORWARD


def test_a_seed_is_charged_from_its_probe_to_its_ablations():
    grown = grower()
    epoch(grown)
    grown.apply(germinate("conv_light", "first"))
    probed = grown.ledger.spent["incubation"]
    assert probed > 3 * FORWARD * BATCH, "three lookahead steps"
    epoch(grown)
    # each lookahead pass: from the slot on, the seed included, there and back; back to the seed's weights, no further
    seed = 2 * 9 * 4 * 4 * 36
    lookahead = 2 * (SECOND + HEAD) + 3 * seed
    # before the first of them the host is traced, and one pass from the beginning and two from the slot are compared
    tried = FORWARD + (FIRST + lookahead) + lookahead
    assert grown.ledger.spent["incubation"] - probed == lookahead * SAMPLES + tried * BATCH
    # the network with the seed switched on, fused; before that, fusing was tried: stacked, then each by itself
    switched_on = 2 * (FORWARD + seed)
    assert grown.ledger.spent["ablation"] == SAMPLES * (switched_on - FORWARD + switched_on + (2 * FORWARD + seed))
    while grown.network.seed("first#0").stage is not Stage.PROBATIONARY:
        before = grown.ledger.spent["ablation"]
        epoch(grown)
        assert grown.ledger.spent["ablation"] == before
    spent = dict(grown.ledger.spent)
    epoch(grown)
    assert grown.ledger.spent["train"] - spent["train"] == SAMPLES * (TRAINED + 3 * seed)
    assert grown.ledger.spent["gate"] - spent["gate"] == SAMPLES * (FORWARD + seed)
    assert grown.gate_pass.fused
    for ablations in (1, 2):  # each is one more pass of the split, fused with the network's own
        assert grown.ledger.spent["ablation"] - spent["ablation"] == SAMPLES * (FORWARD + seed) * ablations
        epoch(grown)


def test_being_counted_changes_no_bit():
    counted, plain = grower(), grower()
    for grown in (counted, plain):
        grown.apply(germinate("bottleneck", "second"))
    plain.ledger.charge = lambda purpose, structure, samples, work, shape=(): work()
    plain.ledger.cost = lambda purpose, structure, shape=None: 1.0
    for grown in (counted, plain):
        torch.manual_seed(3)
        for _ in range(5):
            epoch(grown)
            grown.ledger.costs.clear()  # counted anew, every time
    assert counted.gate_loss == plain.gate_loss
    assert same(tensors_of(counted), tensors_of(plain))


def test_counting_observes_batch_norm_and_dropout_without_a_trace():
    outcomes = []
    for count in (True, False):
        net = network().train()
        torch.manual_seed(0)

        def work(net=net):
            value = loss(net(TRAIN[0]), TRAIN[1]).mean()
            value.backward()
            return value.detach()

        value = count_flops(work)[0] if count else work()
        gradients = {f"grad {name}": parameter.grad for name, parameter in net.named_parameters()}
        outcomes.append({"value": value, "rng": torch.get_rng_state(), **net.state_dict(), **gradients})
    assert same(*outcomes)


def test_a_split_of_several_batches_is_charged_once():
    grown = grower()
    grown.network.train()
    halves = [(GATE[0][:40], GATE[1][:40]), (GATE[0][40:], GATE[1][40:])]
    grown.measure(halves)
    assert grown.ledger.spent["gate"] == SAMPLES * FORWARD


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.mix(self.embed(x)).mean(1))


def test_sequences_of_another_length_cost_what_they_cost():
    short, long = torch.zeros(8, 4, dtype=torch.int64), torch.zeros(8, 64, dtype=torch.int64)
    host, targets = Sequences(), torch.zeros(8, dtype=torch.int64)
    network = GrowingNetwork(host, find_slots(host, short, patterns=("mix",)))
    grown = assemble(network, BlueprintSource(()), loss=loss, steps_per_epoch=4)
    network.train()
    for _ in range(2):
        grown.train_step(short, targets)
        before = grown.ledger.total
        grown.train_step(long, targets)
        _, true = count_flops(lambda: loss(network(long), targets).mean().backward())
        assert grown.ledger.total - before == true
    assert grown.ledger.cost("train", "host") == grown.ledger.cost("train", "host", (64,))


def test_what_is_taught_straight_through_is_in_no_gate_pass_and_not_taken_off_its_price():
    grown = grower(incubation="straight_through", dropout=0.0, incubation_epochs=1)
    epoch(grown)
    grown.apply(germinate("conv_heavy", "first"))
    steps(grown, batches(1))
    grown.gate_pass.fused, grown.gate_pass.tried = False, {"first#0"}
    due = variants_due(grown.network.seeds(), grown.growth)
    _, true = count_flops(lambda: measure(grown.network, [GATE], loss, variants=due))
    grown.gate_pass.run([GATE], grown.structure(), {}, 1)
    before = dict(grown.ledger.spent)
    grown.gate_pass.run([GATE], grown.structure(), due, 1)
    spent = {purpose: grown.ledger.spent[purpose] - before[purpose] for purpose in before}
    assert spent["ablation"] > 0
    assert spent["gate"] + spent["ablation"] == pytest.approx(true)
