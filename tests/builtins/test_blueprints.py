"""The built-in blueprints: identity at birth, true formulas, causal where they mix tokens, torch-free declarations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.builtins.seeds.transformer import heads_of
from esperd.declarations import TOPOLOGY_SHAPES, resolve
from esperd.growth.flops import count_flops

SHAPES = {
    "cnn": [(1, 4, 4), (3, 8, 8), (5, 7, 3), (12, 4, 4), (17, 5, 5), (64, 2, 2), (48, 1, 1)],
    "mlp": [(1,), (3,), (10,), (17,), (64,)],
    "transformer": [(1, 8), (2, 2), (4, 8), (7, 16), (5, 33), (12, 64), (3, 256)],
}
CASES = [
    pytest.param(blueprint, shape, id=f"{blueprint.name}-{'x'.join(map(str, shape))}")
    for blueprint in BLUEPRINTS
    for shape in SHAPES[blueprint.topology]
]
BY_NAME = {blueprint.name: blueprint for blueprint in BLUEPRINTS}
FOR_TOKENS = [blueprint for blueprint in BLUEPRINTS if blueprint.topology == "transformer"]


def grown(blueprint, shape):
    """A seed that no longer is at its birth."""
    torch.manual_seed(0)
    module = resolve(blueprint.factory)(shape)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


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
    assert all("arXiv:" in blueprint.source and blueprint.description for blueprint in BLUEPRINTS)


def test_every_topology_has_blueprints():
    assert {blueprint.topology for blueprint in BLUEPRINTS} == TOPOLOGY_SHAPES.keys()


def test_declaring_blueprints_does_not_import_torch():
    code = "import sys, esperd.builtins.blueprints, esperd.builtins.seeds; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- tokens


@pytest.mark.parametrize("blueprint", FOR_TOKENS, ids=lambda blueprint: blueprint.name)
@pytest.mark.parametrize("length", [1, 2, 9, 20])
def test_a_seed_for_tokens_takes_any_length(blueprint, length):
    shape = (6, 16)
    x = torch.randn(2, length, 16)
    assert torch.equal(resolve(blueprint.factory)(shape)(x), x)
    changed = grown(blueprint, shape)(x)
    assert changed.shape == x.shape
    assert not torch.equal(changed, x)


@pytest.mark.parametrize("blueprint", FOR_TOKENS, ids=lambda blueprint: blueprint.name)
def test_no_token_sees_what_comes_after_it(blueprint):
    module = grown(blueprint, (12, 64))
    x = torch.randn(2, 12, 64)
    output = module(x)
    for place in range(12):
        later = x.clone()
        later[:, place:] = torch.randn(2, 12 - place, 64)
        torch.testing.assert_close(module(later)[:, :place], output[:, :place])


@pytest.mark.parametrize(("name", "seen"), [("causal_attention", 12), ("window_attention", 3)])
def test_an_attention_sees_as_far_back_as_it_says(name, seen):
    module = grown(BY_NAME[name], (12, 64))
    x = torch.randn(1, 12, 64)
    output = module(x)
    for source in range(12):
        other = x.clone()
        other[:, source] = torch.randn(1, 64)
        moved = ((module(other) - output).abs().amax(-1)[0] > 1e-5).nonzero().flatten().tolist()
        assert moved == list(range(source, min(12, source + seen)))


def test_the_window_is_a_quarter_of_the_slots_length_and_never_one_token():
    windows = [resolve(BY_NAME["window_attention"].factory)((length, 8)).window for length in (1, 4, 8, 11, 12, 64)]
    assert windows == [2, 2, 2, 2, 3, 16]


@pytest.mark.parametrize(
    ("features", "heads"), [(1, 1), (8, 1), (33, 1), (63, 1), (64, 2), (96, 3), (100, 2), (128, 4), (256, 8), (384, 8), (768, 8)]
)
def test_heads_divide_the_features_and_stay_wide(features, heads):
    assert heads_of(features) == heads


def test_attention_with_several_heads_is_the_sum_over_them_written_out():
    module = grown(BY_NAME["causal_attention"], (5, 64))
    x = torch.randn(2, 5, 64)
    normed = module.norm(x)
    mixed = []
    for part in torch.arange(64).split(32):
        query, key, value = (layer(normed)[..., part] for layer in (module.query, module.key, module.value))
        scores = query @ key.transpose(1, 2) / 32**0.5
        scores = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, float("-inf"))
        mixed.append(scores.softmax(-1) @ value)
    torch.testing.assert_close(module(x), x + module.out(torch.cat(mixed, -1)))
