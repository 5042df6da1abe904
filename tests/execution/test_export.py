"""Exporting: what can be one kernel equals its module to the bit; what cannot is rejected by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from esperd.compiler.compile import self_test, self_test_lengths
from esperd.declarations import OPEN_DIMENSIONS
from esperd.errors import BlueprintRejected
from esperd.execution import load_kernel
from esperd.execution.export import export_graph
from esperd.execution.graph import TRAINING, decode_graph
from esperd.messages.kernels import KernelKey

SHAPE = (4, 6, 6)
TOKENS = (5, 8)
OF_TOKENS = OPEN_DIMENSIONS["transformer"]


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.delta = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.delta(x)


class FlattensBySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4 * 6 * 6, 4 * 6 * 6)

    def forward(self, x):
        flat = x.view(x.size(0), -1)
        return x + self.linear(flat).view(x.shape[0], 4, 6, 6)


class ChangesInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        z = y
        y += 1.0
        z *= 2.0
        functional.relu_(y)
        return x + y - z.tanh()


class Poolings(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        pooled = functional.adaptive_avg_pool2d(x, 1) + x.mean((2, 3), keepdim=True)
        smooth = functional.avg_pool2d(x, 3, 1, 1) - functional.max_pool2d(x, 3, 1, 1)
        return x + smooth * torch.sigmoid(self.gate(pooled)) / 3.0 + (1.0 - x) ** 2


class AttendsOverPixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(4, 4)

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)  # (B, HW, C)
        mixed = torch.softmax(self.qk(tokens) @ tokens.transpose(1, 2), dim=-1) @ tokens
        return x + mixed.permute(0, 2, 1).reshape(x.shape)


class AttendsOverChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        means = x.mean((2, 3)).unsqueeze(1)  # (B, 1, C)
        return x * torch.sigmoid(self.conv(means)).transpose(1, 2).unsqueeze(-1)


class AttendsOverTokens(nn.Module):
    """Attention between heads, with whatever options."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        parts = x.unflatten(-1, (2, -1)).transpose(1, 2)  # (B, 2, T, 4)
        mixed = functional.scaled_dot_product_attention(parts, parts, parts, **self.options)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class DropsWeights(AttendsOverTokens):
    def forward(self, x):
        dropped = 0.5 if self.training else 0.0
        return x + self.out(functional.scaled_dot_product_attention(x, x, x, dropout_p=dropped, is_causal=True))


class MasksByDistance(AttendsOverTokens):
    def forward(self, x):
        row = torch.ones_like(x.select(0, 0).select(1, 0))
        near = (row.unsqueeze(1) * row.unsqueeze(0)).triu(-1).tril(1) > 0
        return x + self.out(functional.scaled_dot_product_attention(x, x, x, attn_mask=near))


class JoinsTokens(nn.Module):
    """Sees all tokens of a batch as one list: a shape with one open size."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x.reshape(-1, 8)).sum(0)


class ReshapesTokens(JoinsTokens):
    def forward(self, x):
        return x + self.linear(x).view(x.shape[0], x.shape[1], 2, 4).flatten(2)


class LearnsPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(TOKENS))

    def forward(self, x):
        return x + self.places


class WritesThroughUnflatten(Residual):
    def forward(self, x):
        y = self.delta(x)
        seen = y.unflatten(-1, (2, 3))
        y.relu_()
        return x + seen.flatten(-2)


class WritesThroughSelect(Residual):
    def forward(self, x):
        y = self.delta(x)
        seen = y.select(1, 0)
        y.relu_()
        return x + seen.unsqueeze(1)


class Cuts(Residual):
    """Uses an operation that no kernel may."""

    def forward(self, x):
        return torch.cat([x[:, :2], self.delta(x)[:, 2:]], dim=1)


class WritesToInput(Residual):
    def forward(self, x):
        x += self.delta(x)
        return x


class WritesThroughView(Residual):
    def forward(self, x):
        y = self.delta(x)
        seen = y.flatten(1)
        y.relu_()
        return x + seen.view(-1, 4, 6, 6)


class WritesToBuffer(Residual):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("level", torch.zeros(1))

    def forward(self, x):
        self.level.mul_(0.9)
        return x + self.delta(x) * self.level


class OtherInTraining(Residual):
    def forward(self, x):
        return x + self.delta(x).relu() if self.training else x + self.delta(x).tanh()


class OtherArgumentsInTraining(Residual):
    def forward(self, x):
        return x + self.delta(x) * (2.0 if self.training else 3.0)


class CountsAlways(nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class HoldsConstant(Residual):
    def forward(self, x):
        return x + self.delta(x) * torch.tensor([2.0])


class BranchesOnData(Residual):
    def forward(self, x):
        return x + self.delta(x) if x.sum() > 0 else x


class TwoOutputs(Residual):
    def forward(self, x):
        return x + self.delta(x), x


class NonPersistent(Residual):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("q", torch.ones(1), persistent=False)

    def forward(self, x):
        return x + self.q * self.delta(x)


class Frozen(Residual):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.q = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        return x + self.q * self.delta(x)


def tied():
    module = Residual(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    module.delta[1].weight = module.delta[0].weight
    return module


def conv():
    return nn.Conv2d(4, 4, 1)


EXPORTABLE = {
    "batch norm": lambda: Residual(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
    "batch norm without statistics": lambda: Residual(nn.BatchNorm2d(4, track_running_stats=False), conv()),
    "batch norm without affine": lambda: Residual(conv(), nn.BatchNorm2d(4, affine=False)),
    "dropout": lambda: Residual(conv(), nn.Dropout(0.3), nn.ReLU()),
    "layer norm": lambda: Residual(nn.LayerNorm([6, 6]), conv()),
    "group norm": lambda: Residual(nn.GroupNorm(2, 4), conv()),
    "relu in place": lambda: Residual(conv(), nn.ReLU(inplace=True), conv()),
    "activations": lambda: Residual(
        conv(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.Mish(), nn.Hardswish(), nn.LeakyReLU(), nn.PReLU(), nn.Softplus(), nn.ReLU6()
    ),
    "grouped and dilated": lambda: Residual(nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4), nn.Conv2d(8, 4, 1, groups=2)),
    "sizes in shapes": FlattensBySize,
    "changes in place": ChangesInPlace,
    "pooling and arithmetic": Poolings,
    "attention": AttendsOverPixels,
    "attention over channels": AttendsOverChannels,
}

REJECTED = {
    "an unknown operation": (lambda: Cuts(conv()), r"'candidate' uses aten\.\w+.*not an operation a kernel may use"),
    "gelu by tanh": (lambda: Residual(conv(), nn.GELU("tanh")), r"aten\.gelu\.default the keyword approximate='tanh'"),
    "padding by name": (lambda: Residual(nn.Conv2d(4, 4, 3, padding="same")), r"aten\.conv2d\.padding"),
    "a write to the input": (lambda: WritesToInput(conv()), r"writes to %x in place with aten\.add_\.Tensor"),
    "a write under a view": (lambda: WritesThroughView(conv()), r"to a tensor that has a view"),
    "a write under an unflattened view": (lambda: WritesThroughUnflatten(conv()), r"to a tensor that has a view"),
    "a write under a selected view": (lambda: WritesThroughSelect(conv()), r"to a tensor that has a view"),
    "a write to a buffer": (lambda: WritesToBuffer(conv()), r"writes to level in place with aten\.mul_\.Tensor"),
    "other operations in training": (lambda: OtherInTraining(conv()), r"other operations in training.*relu.*tanh"),
    "other arguments in training": (lambda: OtherArgumentsInTraining(conv()), r"aten\.mul\.Tensor other arguments in training"),
    "counting in evaluation": (lambda: Residual(CountsAlways(4), conv()), r"counts in .*num_batches_tracked.* also when eval"),
    "too many operations": (lambda: Residual(*[nn.ReLU() for _ in range(600)]), r"600 operations|601 operations"),
    "a constant tensor": (lambda: HoldsConstant(conv()), r"constant tensor|lift_fresh"),
    "a branch on data": (lambda: BranchesOnData(conv()), r"cannot be exported"),
    "two outputs": (lambda: TwoOutputs(conv()), r"exactly one tensor"),
    "a buffer that is not saved": (lambda: NonPersistent(conv()), r"not persistent.* q"),
    "a frozen parameter": (lambda: Frozen(conv()), r"do not train.* q"),
    "tied parameters": (tied, r"shares parameters.*delta\.1\.weight"),
}


OF_ANY_LENGTH = {
    "layer norm": lambda: Residual(nn.LayerNorm(8), nn.Linear(8, 8)),
    "dropout": lambda: Residual(nn.Linear(8, 8), nn.Dropout(0.3)),
    "attention": AttendsOverTokens,
    "causal attention": lambda: AttendsOverTokens(is_causal=True),
    "attention of another scale": lambda: AttendsOverTokens(scale=0.1),
    "attention by a mask": MasksByDistance,
    "one open size of two": JoinsTokens,
}

REJECTED_FOR_TOKENS = {
    "two open sizes in a shape": (ReshapesTokens, r"aten\.view\.default a shape with several open sizes.* unflatten and flatten"),
    "a table of places": (LearnsPlaces, r"cannot be exported for any size of the dimensions 0, 1"),
    "weights dropped in training": (DropsWeights, r"scaled_dot_product_attention.* in training"),
    "weights dropped always": (lambda: AttendsOverTokens(dropout_p=0.5), r"0\.5 is no zero"),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", EXPORTABLE.values(), ids=EXPORTABLE.keys())
def test_an_exported_kernel_equals_its_module_to_the_bit(make):
    module = make()
    kernel = load_kernel(export_graph("candidate", module, torch.randn(3, *SHAPE)).encode(), None)
    key = KernelKey(blueprint="candidate", source="", shape=SHAPE)
    assert self_test("candidate", module, kernel, key) == 0.0
    assert list(dict(kernel.named_parameters())) == list(dict(module.named_parameters()))
    assert kernel.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize(("make", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_what_cannot_be_one_kernel_is_rejected_by_name(make, message):
    with pytest.raises(BlueprintRejected, match=message) as caught:
        export_graph("candidate", make(), torch.randn(3, *SHAPE))
    assert caught.value.fields["blueprint"] == "candidate"


@pytest.mark.parametrize("make", OF_ANY_LENGTH.values(), ids=OF_ANY_LENGTH.keys())
def test_a_kernel_for_tokens_equals_its_module_at_lengths_it_was_not_exported_at(make):
    module = make()
    kernel = load_kernel(export_graph("candidate", module, torch.randn(3, *TOKENS), OF_TOKENS).encode(), None)
    kernel.load_state_dict(module.state_dict())
    for batch, length in ((1, 1), (2, 2), (1, 5), (5, 8), (8, 5), (2, 31)):
        outcomes = []
        for candidate in (module, kernel):
            torch.manual_seed(0)
            x = torch.randn(batch, length, 8, requires_grad=True)
            candidate.zero_grad()
            output = candidate(x)
            output.square().sum().backward()
            outcomes.append([output, x.grad, *(parameter.grad for parameter in candidate.parameters())])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outcomes, strict=True))
    key = KernelKey(blueprint="candidate", source="", shape=TOKENS)
    assert self_test("candidate", module, kernel, key, self_test_lengths(5)) == 0.0


@pytest.mark.parametrize(("make", "message"), REJECTED_FOR_TOKENS.values(), ids=REJECTED_FOR_TOKENS.keys())
def test_what_hangs_on_the_length_or_draws_is_rejected_by_name(make, message):
    with pytest.raises(BlueprintRejected, match=message):
        export_graph("candidate", make(), torch.randn(3, *TOKENS), OF_TOKENS)


def test_a_kernel_for_tokens_is_the_same_at_whatever_length_and_batch_it_was_exported():
    examples = [torch.randn(batch, length, 8) for batch, length in ((1, 1), (2, 2), (8, 8), (3, 40))]
    assert len({export_graph("candidate", AttendsOverTokens(), example, OF_TOKENS).encode() for example in examples}) == 1


def test_without_a_word_only_the_batch_is_left_open():
    assert export_graph("candidate", LearnsPlaces(), torch.randn(3, *TOKENS)).ops


def test_exporting_leaves_the_module_as_it_was():
    module = EXPORTABLE["batch norm"]().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_graph("candidate", module, torch.randn(3, *SHAPE))
    assert not module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_equal_modules_give_equal_bytes_that_decode_to_the_same_graph():
    graphs = [export_graph("candidate", EXPORTABLE["batch norm"](), torch.randn(size, *SHAPE)) for size in (2, 5)]
    first, second = (graph.encode() for graph in graphs)
    assert first == second
    assert decode_graph(first) == graphs[0]
    assert b" " not in first


def test_the_mode_of_batch_norm_and_dropout_is_left_to_the_call():
    graph = export_graph("candidate", Residual(nn.BatchNorm2d(4), nn.Dropout(0.1)), torch.randn(2, *SHAPE))
    assert [step.arguments.count(TRAINING) for step in graph.ops] == [1, 1, 0]
    assert graph.mutations == {"delta.0.num_batches_tracked": 1}
