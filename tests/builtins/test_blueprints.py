"""The built-in blueprints: identity at birth, true formulas, torch-free declarations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.declarations import resolve
from esperd.growth.flops import count_flops

CNN_SHAPES = [(1, 4, 4), (3, 8, 8), (5, 7, 3), (12, 4, 4), (17, 5, 5), (64, 2, 2), (48, 1, 1)]
MLP_SHAPES = [(1,), (3,), (10,), (17,), (64,)]
CASES = [
    pytest.param(blueprint, shape, id=f"{blueprint.name}-{'x'.join(map(str, shape))}")
    for blueprint in BLUEPRINTS
    for shape in (CNN_SHAPES if blueprint.topology == "cnn" else MLP_SHAPES)
]


@pytest.mark.parametrize(("blueprint", "shape"), CASES)
def test_a_seed_is_its_input_to_the_bit_at_birth(blueprint, shape):
    torch.manual_seed(0)
    module = resolve(blueprint.factory)(shape)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        assert torch.equal(module(x), x)


@pytest.mark.parametrize(("blueprint", "shape"), CASES)
def test_formulas_are_the_true_counts(blueprint, shape):
    module = resolve(blueprint.factory)(shape)
    x = torch.randn(2, *shape)
    assert blueprint.parameters(shape) == sum(parameter.numel() for parameter in module.parameters())
    assert blueprint.flops(shape) == count_flops(lambda: module(x))[1] / 2


def test_names_are_unique_and_each_blueprint_names_its_source():
    assert len({blueprint.name for blueprint in BLUEPRINTS}) == len(BLUEPRINTS)
    assert all(blueprint.source and blueprint.description for blueprint in BLUEPRINTS)


def test_declaring_blueprints_does_not_import_torch():
    code = "import sys, esperd.builtins.blueprints, esperd.builtins.seeds; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
