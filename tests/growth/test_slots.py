"""Slots: found in models as people write them, refused with the reason, and the model is left as it was."""

from __future__ import annotations

import dataclasses
import random
import typing

import numpy as np
import pytest
import torch
from torch import nn

from esperd.builtins.networks.cnn import cnn
from esperd.builtins.networks.mlp import mlp
from esperd.errors import InvalidModel, InvalidSlot, UnknownName
from esperd.growth.slots import find_slots

IMAGES = torch.randn(4, 1, 8, 8)
VECTORS = torch.randn(4, 8)
TOKENS = torch.randint(20, (4, 4))
"""As many samples as places: whoever takes an axis of four for the batch is wrong half of the time."""
SEQUENCES = torch.randn(4, 3, 8)


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


class Returns(nn.Module):
    """Returns whatever a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Named(typing.NamedTuple):
    scores: torch.Tensor
    state: None


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    weights: None = None


class Odd(nn.Module):
    """One module for each reason not to be a slot."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.twice = nn.Linear(8, 8)
        self.also = self.one = nn.Linear(8, 8)
        self.volume = nn.Linear(8, 8)
        self.mean = Returns(torch.mean)
        self.whole = Returns(lambda x: x.argmax(1))
        self.mixed = Returns(lambda x: x @ x.T)
        self.merged = Returns(lambda x: x.reshape(-1, 4))
        self.turned = Returns(lambda x: x.T.unsqueeze(0))
        self.dictionary = Returns(lambda x: {"hidden": x})
        self.dataclass = Returns(Result)
        self.named = Returns(lambda x: Named(x, None))
        self.nothing = Returns(lambda x: None)
        self.sparse = Returns(lambda x: x.to_sparse())
        self.in_training = nn.Linear(8, 8)
        self.by_mode = Returns(lambda x: x if self.training else x[:, :2])
        self.by_size = nn.Linear(8, 8)
        self.never = nn.Linear(1, 1)
        self.unused = nn.ModuleList([nn.Linear(8, 8)])
        self.good = nn.Linear(8, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        x = self.one(self.twice(self.twice(x)))
        self.volume(x[:, None, None, None])
        for part in (self.whole, self.mixed, self.merged, self.turned, self.dictionary, self.dataclass, self.named):
            part(x)
        self.nothing(x)
        self.sparse(x)
        self.by_mode(x)
        if self.training:
            self.in_training(x)
        if len(x) % 2 == 0:
            self.by_size(x)
        return self.out(self.good(x + self.mean(x)))


class Growing(nn.Module):
    """Returns another shape on its second call."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool1d(2)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.pool(self.pool(x)))


class Encoder(nn.Module):
    """A language model of torch's own layers."""

    def __init__(self, layers, batch_first=True, width=8):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(20, width)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(width, 2, 12, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20)

    def forward(self, ids):
        x = self.dropout(self.embedding(ids))
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(self.norm(x))


class Tupled(nn.Module):
    """A layer that returns its attention weights, too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        attended, weights = self.attention(x, x, x)
        x = x + attended
        return x + self.mlp(self.norm(x)), weights


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 20)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.wide = nn.Conv2d(channels, 3 * channels, 1)
        self.act = nn.ReLU()
        self.back = nn.Conv2d(3 * channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.back(self.act(self.wide(x)))


class Restless(nn.Module):
    """Draws from every stream, keeps a count, and is in two modes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.hidden = nn.Linear(8, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("passes", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.passes = self.passes + 1
        return self.head(self.hidden(self.dropout(self.norm(x)) * (1 + random.random() + np.random.rand())))


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


@pytest.mark.parametrize("layers", [2, 3])
def test_a_transformer_has_its_slots_at_the_ends_of_its_layers(layers):
    slots = find_slots(Encoder(layers), TOKENS)
    assert names(slots) == [f"encoder.layers.{index}" for index in range(layers)]
    assert {(slot.topology, slot.shape, slot.dtype) for slot in slots} == {("transformer", (4, 8), "float32")}


def test_a_deep_transformer_has_its_slots_spread_over_the_depth():
    assert names(find_slots(Encoder(7), TOKENS, limit=3)) == ["encoder.layers.0", "encoder.layers.3", "encoder.layers.6"]


def test_a_transformer_of_one_layer_has_its_slot_behind_it():
    assert names(find_slots(Encoder(1), TOKENS)) == ["encoder"]


def test_a_transformer_as_wide_as_its_vocabulary_has_slots_all_the_same():
    assert names(find_slots(Encoder(2, width=20), TOKENS)) == ["encoder.layers.0", "encoder.layers.1"]


def test_where_blocks_return_more_than_a_tensor_a_slot_stands_behind_their_last_sub_layer():
    slots = find_slots(Layers(Tupled(), Tupled()), TOKENS)
    assert names(slots) == ["layers.0.mlp", "layers.1.mlp"]


def test_the_rows_of_an_embedding_are_a_slot_only_where_there_is_nothing_else():
    bag = nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 2))
    assert names(find_slots(bag, TOKENS)) == ["0"]
    assert names(find_slots(nn.Sequential(nn.EmbeddingBag(20, 8), nn.Linear(8, 6), nn.Linear(6, 2)), TOKENS)) == ["1"]


def test_what_runs_inside_a_repeated_block_is_passed_over():
    host = nn.Sequential(
        nn.Conv2d(1, 4, 1), Residual(4), Residual(4), nn.MaxPool2d(2), Residual(4), nn.Flatten(), nn.Linear(64, 5)
    )
    assert names(find_slots(host, IMAGES)) == ["2", "4", "5"]


def test_an_isotropic_network_has_its_slots_at_the_ends_of_its_blocks():
    host = nn.Sequential(nn.Conv2d(1, 4, 1), *[Residual(4) for _ in range(6)], nn.Flatten(), nn.Linear(256, 5))
    assert names(find_slots(host, IMAGES)) == ["1", "3", "5", "7"]


def test_a_stack_of_equal_layers_has_a_slot_behind_each_of_its_activations():
    layers = [part for _ in range(3) for part in (nn.Linear(8, 8), nn.ReLU())]
    assert names(find_slots(nn.Sequential(*layers, nn.Linear(8, 2)), VECTORS)) == ["1", "3", "5"]
    nested = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)], nn.Linear(8, 2))
    assert names(find_slots(nested, VECTORS)) == ["0", "1", "2"]


def test_a_parametrized_layer_is_a_layer_and_no_block():
    normed = nn.utils.parametrizations.weight_norm
    assert names(find_slots(nn.Sequential(normed(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 2)), SEQUENCES)) == ["1"]


def test_what_embeds_tokens_is_no_slot_where_blocks_are():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.tokens = nn.Conv2d(1, 8, 4, 4), nn.Flatten(2)
            self.project = nn.Linear(4, 6)
            layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            tokens = self.project(self.tokens(self.patch(x)))
            return self.head(self.encoder(torch.cat([tokens[:, :1], tokens], 1))[:, 0])

    assert names(find_slots(Patches(), IMAGES)) == ["patch", "encoder.layers.0", "encoder.layers.1"]


def test_a_block_whose_output_is_the_hosts_is_no_slot():
    assert names(find_slots(nn.Sequential(Residual(1), Residual(1), Residual(1)), IMAGES)) == ["0", "1"]


def test_a_host_whose_prediction_is_called_logits_is_traced_as_any_other():
    class Mapped(Encoder):
        def forward(self, ids):
            return {"logits": super().forward(ids), "loss": None}

    assert names(find_slots(Mapped(2), TOKENS)) == ["encoder.layers.0", "encoder.layers.1"]


def test_the_network_is_traced_in_the_memory_format_it_is_in():
    host, images = ResNet().to(memory_format=torch.channels_last), IMAGES.contiguous(memory_format=torch.channels_last)
    assert find_slots(host, images) == find_slots(ResNet(), IMAGES)


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
        (Recurrent, VECTORS, "lstm", r"'lstm' \(LSTM\) cannot be a slot: it returns a tuple \(Tensor, tuple\)"),
        (Odd, VECTORS, "dictionary", r"it returns a dict \(hidden: Tensor\)"),
        (Odd, VECTORS, "dataclass", r"it returns a Result \(hidden: Tensor, weights: NoneType\)"),
        (Odd, VECTORS, "named", r"it returns a Named \(scores: Tensor, state: NoneType\)"),
        (Odd, VECTORS, "nothing", "it returns None"),
        (Odd, VECTORS, "sparse", "it returns a sparse_coo tensor"),
        (Odd, VECTORS, "twice", "it runs 2 times"),
        (Odd, VECTORS, "one", "it is the same module as 'also', one place under two names"),
        (Odd, VECTORS, "never", "it does not run"),
        (Odd, VECTORS, "unused*", "it does not run"),
        (Odd, VECTORS, "in_training", "it does not run in evaluation"),
        (Odd, VECTORS, "by_size", "it does not run in every forward pass: it did with 4 samples, not with 5"),
        (Odd, VECTORS, "by_mode", r"changes shape with the mode: \(5, 8\), and \(5, 2\) in evaluation"),
        (Odd, VECTORS, "volume", r"\(4, 1, 1, 1, 8\) is neither \(B, C, H, W\) nor \(B, T, D\) nor \(B, F\)"),
        (Odd, VECTORS, "mean", r"\(\) does not start with the batch of 4"),
        (Odd, VECTORS, "merged", r"\(8, 4\) does not start with the batch of 4"),
        (Odd, VECTORS, "mixed", r"\(4, 4\) changes in axes \[0, 1\] with the number of samples"),
        (Odd, VECTORS, "turned", r"\(1, 8, 4\) has the batch of 4 in axis 2"),
        (Odd, VECTORS, "whole", "is torch.int64, not floating point"),
        (Growing, VECTORS, "pool", "changes shape from call to call"),
    ],
)
def test_a_module_that_cannot_carry_a_seed_is_refused_with_the_reason(host, batch, pattern, reason):
    with pytest.raises(InvalidSlot, match=reason):
        find_slots(host(), batch, patterns=(pattern,))


def test_a_batch_in_the_second_axis_is_found_out_although_the_first_is_as_long():
    with pytest.raises(InvalidSlot, match=r"\(4, 4, 8\) has the batch of 4 in axis 1.*batch_first=True"):
        find_slots(Encoder(2, batch_first=False), TOKENS, patterns=("encoder.layers.0",))
    assert names(find_slots(Encoder(2, batch_first=False), TOKENS)) == ["norm"]


def test_a_module_shared_by_two_places_is_refused_because_it_runs_twice():
    shared = Tupled()
    with pytest.raises(InvalidSlot, match="it runs 2 times"):
        find_slots(Layers(shared, shared), TOKENS, patterns=("layers.0.mlp",))


def test_a_module_under_two_names_is_a_slot_under_the_first():
    assert names(find_slots(Odd(), VECTORS, patterns=("also",))) == ["also"]


def test_axes_that_are_not_those_of_a_seed_are_told_by_who_takes_them():
    stage = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(2))
    signal = nn.Sequential(stage, nn.Sigmoid(), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(12, 2))
    for name in ("0.0", "0.1", "0.2", "0", "1", "2"):
        with pytest.raises(InvalidSlot, match=r"is \(B, C, L\), channels first, as"):
            find_slots(signal, SEQUENCES, patterns=(name,))
    assert names(find_slots(signal, SEQUENCES)) == ["3"]

    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.act, self.norm, self.head = nn.Conv2d(1, 4, 2, 2), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.act(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))

    with pytest.raises(InvalidSlot, match=r"is \(B, H, W, C\), channels last, as LayerNorm takes it"):
        find_slots(ChannelsLast(), IMAGES, patterns=("act",))
    assert names(find_slots(ChannelsLast(), IMAGES)) == ["embed"]


def test_a_pattern_with_wildcards_passes_over_what_does_not_run():
    assert names(find_slots(Encoder(2), TOKENS, patterns=("encoder.layers*.norm2",))) == [
        "encoder.layers.0.norm2",
        "encoder.layers.1.norm2",
    ]
    assert names(find_slots(Layers(nn.Linear(8, 8), nn.Linear(8, 8)), TOKENS, patterns=("layers*",))) == ["layers.0", "layers.1"]


def test_tracing_passes_over_what_cannot_carry_a_seed():
    assert names(find_slots(Odd(), VECTORS)) == ["also", "good"]


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (nn.Linear(8, 2), "it has no submodules"),
        (nn.Sequential(nn.Linear(8, 2)), "has the shape of its own output"),
        (nn.Sequential(nn.LSTM(8, 2)), "it returns a tuple"),
        (nn.Sequential(nn.Sequential()), "has the shape of its own output"),
    ],
)
def test_a_host_without_any_slot_says_why(host, reason):
    with pytest.raises(InvalidSlot, match=reason):
        find_slots(host, VECTORS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("host", [ResNet, Restless])
@pytest.mark.parametrize("patterns", [(), ("fc", "head"), ("nowhere",)])
def test_the_model_is_left_as_it_was(training, host, patterns):
    batch = IMAGES if host is ResNet else VECTORS
    host = host().train(training)
    next(iter(host.children())).eval()
    host(batch).sum().backward()
    state = {name: tensor.clone() for name, tensor in [*host.named_parameters(), *host.named_buffers()]}
    gradients = [parameter.grad.clone() for parameter in host.parameters()]
    modes = [module.training for module in host.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]
    try:
        find_slots(host, batch, patterns=patterns)
    except UnknownName:
        assert patterns
    now = dict([*host.named_parameters(), *host.named_buffers()])
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert [module.training for module in host.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.array_equal(np.random.get_state()[1], streams[2][0])
    assert np.random.get_state()[2] == streams[2][1]
    assert not any(module._forward_hooks for module in host.modules())
    assert all(torch.equal(*pair) for pair in zip((p.grad for p in host.parameters()), gradients, strict=True))


def test_a_model_that_fails_on_the_batch_is_left_without_hooks():
    host = ResNet()
    with pytest.raises(InvalidModel, match=r"ResNet does not run on a batch \(4, 3, 8, 8\).*expected input"):
        find_slots(host, torch.randn(4, 3, 8, 8))
    assert not any(module._forward_hooks for module in host.modules())


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda self, x: x.view(4, 8), "runs on 4 samples, but not on 5"),
        (lambda self, x: x if self.training else x[:, :1].view(5, 8), "but not in evaluation"),
    ],
)
def test_a_model_that_takes_only_some_batches_is_refused(function, told):
    host = nn.Sequential(nn.Linear(8, 8))
    host.act = Returns(lambda x: function(host, x))
    with pytest.raises(InvalidModel, match=told):
        find_slots(host, VECTORS)
    assert host.training


def test_a_single_sample_is_enough_to_trace_with():
    assert (
        names(find_slots(Restless(), VECTORS[:2])) == names(find_slots(Restless().eval(), VECTORS[:2])) == ["dropout", "hidden"]
    )
    assert find_slots(Encoder(2), TOKENS[:1]) == find_slots(Encoder(2), TOKENS)


def test_a_model_that_returns_no_prediction_is_refused_by_what_came():
    class Pair(ResNet):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(InvalidModel, match=r"returned a tuple \(Tensor, Tensor\).*return the first part alone"):
        find_slots(Pair(), IMAGES)
