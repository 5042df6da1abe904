"""Slots: found in models as people write them, refused with the reason, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esperd.builtins.networks.cnn import cnn
from esperd.builtins.networks.mlp import mlp
from esperd.errors import InvalidSlot, UnknownName
from esperd.growth.slots import find_slots

IMAGES = torch.randn(4, 1, 8, 8)
VECTORS = torch.randn(4, 8)


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # runs twice, as torchvision's does
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(1, 4, 1), Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.dropout(self.layer2(self.layer1(x)).mean((2, 3))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(1))[0][:, -1])


class Odd(nn.Module):
    """One module for each reason not to be a slot."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.twice = nn.Linear(8, 8)
        self.sequence = nn.Linear(8, 8)
        self.mean = Mean()
        self.whole = Whole()
        self.never = nn.Linear(1, 1)
        self.good = nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.twice(self.twice(x))
        self.sequence(x.unsqueeze(1))
        self.whole(x)
        return self.out(self.good(x + self.mean(x)))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


class Whole(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Growing(nn.Module):
    """Returns another shape on its second call."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool1d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.pool(self.pool(x)))


def names(slots):
    return [slot.slot for slot in slots]


def test_the_builtin_cnn_has_a_slot_at_the_end_of_each_stage_and_one_for_the_pooled_vector():
    slots = find_slots(cnn(channels=(4, 8)), IMAGES)
    assert [(slot.slot, slot.topology, slot.shape, slot.dtype) for slot in slots] == [
        ("features.stage1", "cnn", (4, 8, 8), "float32"),
        ("features.pool1", "cnn", (4, 4, 4), "float32"),
        ("features", "cnn", (8, 4, 4), "float32"),
        ("flatten", "mlp", (8,), "float32"),
    ]


def test_the_builtin_mlp_has_its_slots_where_the_width_changes():
    slots = find_slots(mlp(in_features=64, hidden=(16, 12)), IMAGES)
    assert [(slot.slot, slot.shape) for slot in slots] == [("flatten", (64,)), ("features.stage1", (16,)), ("features", (12,))]


def test_a_residual_model_is_cut_at_its_layers():
    slots = find_slots(ResNet(), IMAGES)
    assert names(slots) == ["layer1", "layer2", "dropout"]
    assert slots[1].shape == (8, 4, 4)


def test_a_plain_sequential_works_as_a_host():
    host = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    assert names(find_slots(host, VECTORS)) == ["1", "3"]


def test_slots_are_spread_evenly_over_the_depth():
    host = nn.Sequential(*[nn.Linear(width, width + 1) for width in range(8, 18)])
    assert names(find_slots(host, VECTORS, limit=3)) == ["0", "4", "8"]
    assert names(find_slots(host, VECTORS, limit=1)) == ["0"]


def test_named_slots_come_in_order_of_execution():
    assert names(find_slots(ResNet(), IMAGES, patterns=("layer2", "layer1.*.conv?"))) == [
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1",
        "layer1.1.conv2",
        "layer2",
    ]


def test_an_unknown_pattern_lists_what_could_be_named():
    with pytest.raises(UnknownName, match=r"'layer9'.*layer1, .*layer2") as caught:
        find_slots(ResNet(), IMAGES, patterns=("layer1", "layer9"))
    assert "layer1.0.relu" not in caught.value.fields["available"], "it runs twice"


@pytest.mark.parametrize(
    ("host", "batch", "pattern", "reason"),
    [
        (ResNet, IMAGES, "layer1.0.relu", r"'layer1.0.relu' \(ReLU\) cannot be a slot: it runs 2 times"),
        (Recurrent, VECTORS, "lstm", r"'lstm' \(LSTM\) cannot be a slot: it returns tuple"),
        (Odd, VECTORS, "twice", "it runs 2 times"),
        (Odd, VECTORS, "sequence", r"\(4, 1, 8\) is neither \(B, C, H, W\) nor \(B, F\)"),
        (Odd, VECTORS, "mean", r"\(\) does not start with the batch of 4"),
        (Odd, VECTORS, "whole", "is torch.int64, not floating point"),
        (Growing, VECTORS, "pool", "changes shape from call to call"),
    ],
)
def test_a_module_that_cannot_carry_a_seed_is_refused_with_the_reason(host, batch, pattern, reason):
    with pytest.raises(InvalidSlot, match=reason):
        find_slots(host(), batch, patterns=(pattern,))


def test_tracing_passes_over_what_cannot_carry_a_seed():
    assert names(find_slots(Odd(), VECTORS)) == ["good"]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (nn.Linear(8, 2), "it has no submodules"),
        (nn.Sequential(nn.Linear(8, 2)), "has the shape of its own output"),
        (nn.Sequential(nn.LSTM(8, 2)), "it returns tuple"),
    ],
)
def test_a_host_without_any_slot_says_why(host, reason):
    with pytest.raises(InvalidSlot, match=reason):
        find_slots(host, VECTORS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("patterns", [(), ("layer1",), ("nowhere",)])
def test_the_model_is_left_as_it_was(training, patterns):
    host = ResNet().train(training)
    host.layer2.eval()
    state = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    modes = [module.training for module in host.modules()]
    rng = torch.get_rng_state()
    try:
        find_slots(host, IMAGES, patterns=patterns)
    except UnknownName:
        assert patterns == ("nowhere",)
    assert all(torch.equal(host.state_dict()[name], tensor) for name, tensor in state.items())
    assert [module.training for module in host.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_hooks for module in host.modules())
    assert all(parameter.grad is None for parameter in host.parameters())


def test_a_model_that_fails_on_the_batch_is_left_without_hooks():
    host = ResNet()
    with pytest.raises(RuntimeError):
        find_slots(host, torch.randn(4, 3, 8, 8))
    assert not any(module._forward_hooks for module in host.modules())
