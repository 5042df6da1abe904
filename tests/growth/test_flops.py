"""FLOPs of what torch's own counter does not know, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esperd.growth.flops import count_flops, uncounted_modules


def forward(module, *inputs):
    with torch.no_grad():
        return count_flops(lambda: module(*inputs))[1]


@pytest.mark.parametrize("training", [True, False])
def test_a_recurrent_layer_costs_its_two_matrices_at_every_position(training):
    module = nn.LSTM(8, 16, batch_first=True).train(training)
    x = torch.randn(4, 6, 8)
    assert forward(module, x) == 2 * 4 * 6 * (4 * 16 * 8 + 4 * 16 * 16)
    assert uncounted_modules(module, x) == []


def test_the_gradient_of_a_recurrent_layer_costs_twice_its_forward_pass():
    module = nn.LSTM(8, 16, batch_first=True)
    x = torch.randn(4, 6, 8, requires_grad=True)
    _, total = count_flops(lambda: module(x)[0].sum().backward())
    assert total == 3 * 2 * 4 * 6 * (4 * 16 * 8 + 4 * 16 * 16)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_convolution_costs_twice_its_forward_pass_whatever_its_groups(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(8, 16, 3, padding=1, stride=2, groups=groups)
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    product = forward(module, x)
    assert product == 2 * 4 * (10 * 10 if transposed else 5 * 5) * (8 * 16 // groups) * 9
    assert count_flops(lambda: module(x).sum().backward())[1] == 3 * product
    assert count_flops(lambda: module(x.detach()).sum().backward())[1] == 2 * product, "the first layer's input has no gradient"


def test_a_bilinear_layer_costs_its_weights_for_every_sample():
    assert forward(nn.Bilinear(5, 6, 7), torch.randn(4, 5), torch.randn(4, 6)) == 2 * 4 * 5 * 6 * 7


def test_attention_costs_the_same_in_training_and_in_eval_mode():
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(4, 6, 8)
    projections = 4 * 6 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)
    products = 2 * (4 * 2 * 6 * 6 * 4)
    assert forward(module.train(), x) == forward(module.eval(), x) == 2 * (projections + products)


def test_a_module_with_matrices_and_no_counted_product_is_named():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return (x[:, None, :] * self.weight).sum(-1)

    network = nn.Sequential(nn.Linear(5, 4), Outer(), nn.Linear(3, 2))
    assert uncounted_modules(network, torch.randn(2, 5)) == ["1"]


def test_a_table_is_no_product():
    assert uncounted_modules(nn.Embedding(10, 3), torch.tensor([[1, 2]])) == []
