"""What esperd asks of a blueprint, asked of this one. Run with ``pytest`` once the package is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from esperd_example_blueprint import esperd_blueprints, kernel_size
from esperd_example_blueprint.seeds import eca

from esperd.growth.contract import check_blueprint

(BLUEPRINT,) = esperd_blueprints()
SHAPES = [(1, 4, 4), (2, 3, 3), (7, 5, 3), (16, 8, 8), (64, 2, 2), (256, 1, 1)]


def test_keeps_the_contract_of_a_blueprint():
    check_blueprint(BLUEPRINT).raise_for_failures()
    check_blueprint(BLUEPRINT, SHAPES).raise_for_failures()


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (4, 1), (8, 3), (64, 3), (128, 5), (256, 5), (512, 5), (2048, 7)])
def test_the_reach_follows_the_paper(channels, size):
    """Equation 12 as the authors' code has it: the integer part of (log2(C) + 1) / 2; the next odd number where that is even."""
    assert kernel_size(channels) == size


@pytest.mark.parametrize("shape", SHAPES)
def test_returns_its_input_to_the_bit_at_birth(shape):
    x = torch.randn(3, *shape)
    assert torch.equal(eca(shape)(x), x)


def test_a_channel_hears_its_neighbours_and_nobody_else():
    torch.manual_seed(0)
    module = eca((16, 4, 4))  # a reach of 3
    torch.nn.init.ones_(module.conv.weight)
    x = torch.rand(1, 16, 4, 4)
    louder = x.clone()
    louder[:, 8] += 1.0
    changed = (module(louder) != module(x)).flatten(2).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [7, 8, 9]


def test_the_entry_module_imports_no_torch():
    code = "import sys, esperd_example_blueprint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
