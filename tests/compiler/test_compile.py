"""Compiling: a manifest that is true, and rejection with numbers of what is not."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import pytest
import torch
from torch import nn

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.compiler.compile import SELF_TEST_BATCHES, compile_kernel, self_test, self_test_lengths
from esperd.compiler.keys import kernel_key
from esperd.declarations import Blueprint, resolve
from esperd.errors import BlueprintRejected, ImportFailed, KernelRejected
from esperd.execution import load_kernel

BY_NAME = {blueprint.name: blueprint for blueprint in BLUEPRINTS}
SHAPES = {"cnn": (5, 3, 4), "mlp": (7,), "transformer": (7, 16)}


class FailsOnOne(nn.Module):
    """Normalises over the batch, which one sample has no statistics for."""

    def __init__(self, shape):
        super().__init__()
        self.norm = nn.BatchNorm1d(shape[0])

    def forward(self, x):
        return x + self.norm(x)


class Shrinks(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape[0], 1)

    def forward(self, x):
        return self.linear(x)


class NoParameters(nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x):
        return x * 1.0


class MakesNan(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.weight * (x.abs() * -1.0).sqrt()


class CountsItsCalls(nn.Module):
    """Sound while it is exported; afterwards it computes something else each time."""

    calls = 0

    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        factor = 2.0
        if not torch.compiler.is_exporting():
            CountsItsCalls.calls += 1
            factor = float(CountsItsCalls.calls)
        return x + x * self.weight * factor


class FailsOnLongSequences(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape[1], shape[1])

    def forward(self, x):
        if not torch.compiler.is_exporting() and x.shape[1] > 7:
            raise ValueError("too long")
        return x + self.linear(x)


def raises(shape):
    raise ValueError(f"no module for {shape}")


def no_module(shape):
    return 3


class FailsOnUse(nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x):
        raise ArithmeticError("never")


def declare(factory, parameters=lambda shape: 0, flops=lambda shape: 0.0, topology="mlp"):
    return Blueprint(
        name="candidate",
        topology=topology,
        factory=f"{__name__}:{factory.__name__}",
        parameters=parameters,
        flops=flops,
        description="",
        source="",
    )


def compiled(blueprint, shape, **options):
    return compile_kernel(kernel_key(blueprint, shape), blueprint, **options)


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
def test_every_built_in_blueprint_compiles_to_a_kernel_equal_to_the_bit(blueprint):
    shape = SHAPES[blueprint.topology]
    kernel = compiled(blueprint, shape)
    manifest = kernel.manifest
    assert manifest.self_test.max_abs_error == 0.0
    assert manifest.self_test.batches == SELF_TEST_BATCHES
    assert manifest.self_test.lengths == ((1, 2, 4, 10) if blueprint.topology == "transformer" else ())
    assert manifest.graph_sha256 == hashlib.sha256(kernel.graph).hexdigest()
    assert manifest.weights_sha256 == hashlib.sha256(kernel.weights).hexdigest()
    assert manifest.parameters == blueprint.parameters(shape)
    assert manifest.flops_per_sample == blueprint.flops(shape)
    assert manifest.torch == torch.__version__
    assert kernel.seconds > 0
    x = torch.randn(4, *shape)
    assert torch.equal(load_kernel(kernel.graph, kernel.weights)(x), x), "the stored weights are those at birth"


def test_a_kernel_for_tokens_serves_every_length_of_a_sequence():
    blueprint = BY_NAME["causal_attention"]
    short, long = compiled(blueprint, (1, 16)), compiled(blueprint, (7, 16))
    assert short.graph == long.graph
    module = resolve(blueprint.factory)((7, 16))
    nn.init.normal_(module.out.weight)
    kernel = load_kernel(short.graph, None)
    kernel.load_state_dict(module.state_dict())
    for batch, length in ((1, 1), (2, 3), (1, 40)):
        x = torch.randn(batch, length, 16)
        assert torch.equal(kernel(x), module(x))


@pytest.mark.parametrize(("length", "others"), [(1, (2, 4)), (2, (1, 5)), (3, (1, 2, 6)), (64, (1, 2, 32, 67))])
def test_the_lengths_of_a_self_test_are_others_than_its_own(length, others):
    assert self_test_lengths(length) == others


def test_fresh_weights_of_the_factory_load_into_the_kernel():
    blueprint, shape = BY_NAME["bottleneck"], (5, 3, 4)
    kernel = compiled(blueprint, shape)
    module = resolve(blueprint.factory)(shape)
    nn.init.normal_(module.delta[6].weight)
    loaded = load_kernel(kernel.graph, kernel.weights)
    loaded.load_state_dict(module.state_dict())
    x = torch.randn(4, *shape)
    assert torch.equal(loaded(x), module(x))


def test_compiling_twice_gives_the_same_bytes_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (compiled(BY_NAME["mlp_gated"], (7,)) for _ in range(2))
    assert (first.graph, first.weights) == (second.graph, second.weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_profile_is_the_median_by_the_clock_given():
    ticks = itertools.count()
    profile = compiled(BY_NAME["mlp_low_rank"], (7,), clock=lambda: float(next(ticks))).manifest.profile
    assert (profile.forward_us, profile.backward_us) == (1e6, 1e6)


def test_a_wrong_parameter_formula_is_rejected_with_both_numbers():
    blueprint = dataclasses.replace(BY_NAME["mlp_gated"], parameters=lambda shape: 37_000)
    with pytest.raises(BlueprintRejected, match=r"says 37000 .* it has 168") as caught:
        compiled(blueprint, (7,))
    assert (caught.value.fields["claimed"], caught.value.fields["counted"]) == (37_000, 168)


def test_a_wrong_flop_formula_is_rejected_with_both_numbers():
    blueprint = dataclasses.replace(BY_NAME["mlp_gated"], flops=lambda shape: 7.0)
    with pytest.raises(BlueprintRejected, match=r"says 7 .* it takes 336") as caught:
        compiled(blueprint, (7,))
    assert (caught.value.fields["claimed"], caught.value.fields["counted"]) == (7.0, 336.0)


@pytest.mark.parametrize(
    ("blueprint", "message"),
    [
        (declare(raises), "does not build for shape .*no module for"),
        (declare(no_module), "returned int, not a torch.nn.Module"),
        (declare(FailsOnUse), r"fails for shape \(7,\): ArithmeticError: never"),
        (declare(Shrinks), r"must keep shape and dtype \(2, 7\)"),
        (declare(FailsOnOne, parameters=lambda shape: 2 * shape[0]), "fails its self-test at batch 1, training"),
        (declare(NoParameters), r"no parameters for shape \(7,\), so there is nothing to train"),
        (declare(MakesNan, parameters=lambda shape: 7), "something that is not a finite number at batch 1, training"),
        (declare(CountsItsCalls, parameters=lambda shape: 7), r"is not deterministic: at batch \d, training its module differs"),
    ],
    ids=[
        "raises",
        "no module",
        "fails on use",
        "changes shape",
        "fails on one sample",
        "no parameters",
        "not a number",
        "not deterministic",
    ],
)
def test_a_module_that_cannot_be_a_seed_is_rejected(blueprint, message):
    with pytest.raises(BlueprintRejected, match=message):
        compiled(blueprint, (7,))


def test_a_seed_for_tokens_that_fails_at_another_length_is_rejected():
    blueprint = declare(
        FailsOnLongSequences,
        parameters=lambda shape: shape[1] ** 2 + shape[1],
        flops=lambda shape: 2.0 * shape[0] * shape[1] ** 2,
        topology="transformer",
    )
    with pytest.raises(BlueprintRejected, match=r"self-test at batch 1, length 10, training: ValueError: too long"):
        compiled(blueprint, (7, 8))


def test_a_kernel_that_computes_something_else_fails_its_self_test():
    blueprint = BY_NAME["mlp_residual"]
    kernel = compiled(blueprint, (7,))
    module = resolve(blueprint.factory)((7,))
    wrong = load_kernel(kernel.graph.replace(b"aten.gelu.default", b"aten.silu.default"), None)
    with pytest.raises(BlueprintRejected, match=r"differs from its module by .* at batch 1, training"):
        self_test(blueprint.name, module, wrong, kernel.manifest.key)


@pytest.mark.parametrize(("field", "value"), [("dtype", "int64"), ("dtype", "complex64"), ("device", "tpu")])
def test_targets_that_are_not_compiled_for_are_refused(field, value):
    blueprint = BY_NAME["mlp_gated"]
    key = kernel_key(blueprint, (7,), **{field: value})
    with pytest.raises(KernelRejected, match=value):
        compile_kernel(key, blueprint)


def test_a_kernel_in_double_precision_equals_its_module():
    blueprint = BY_NAME["conv_heavy"]
    kernel = compile_kernel(kernel_key(blueprint, (5, 3, 4), dtype="float64"), blueprint)
    assert kernel.manifest.self_test.max_abs_error == 0.0
    assert all(tensor.dtype == torch.float64 for tensor in load_kernel(kernel.graph, kernel.weights).parameters())


# --- keys


def test_a_key_is_the_same_for_the_same_blueprint_and_other_for_anything_else():
    blueprint = BY_NAME["norm"]
    key = kernel_key(blueprint, (4, 2, 2))
    assert kernel_key(blueprint, (4, 2, 2)) == key
    others = [
        kernel_key(BY_NAME["depthwise"], (4, 2, 2)),
        kernel_key(blueprint, (8, 2, 2)),
        kernel_key(blueprint, (4, 2, 2), dtype="float64"),
        kernel_key(blueprint, (4, 2, 2), device="cuda"),
        kernel_key(blueprint, (4, 2, 2), distribution="other 1.0"),
        kernel_key(dataclasses.replace(blueprint, parameters=lambda shape: 1), (4, 2, 2)),
        kernel_key(dataclasses.replace(blueprint, deterministic=False), (4, 2, 2)),
    ]
    assert len({key.digest(), *(other.digest() for other in others)}) == len(others) + 1


def test_a_changed_factory_file_is_another_kernel(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    blueprint = dataclasses.replace(declare(no_module), factory="esperd_changing_seed:make")
    file = tmp_path / "esperd_changing_seed.py"
    file.write_text("def make(shape): ...\n")
    before = kernel_key(blueprint, (7,))
    file.write_text("def make(shape): return 1\n")
    assert kernel_key(blueprint, (7,)).source != before.source


@pytest.mark.parametrize("factory", ["nowhere:make", "no.such.package:make", "sys:exit", ":"])
def test_a_factory_without_a_source_file_is_refused(factory):
    with pytest.raises(ImportFailed):
        kernel_key(dataclasses.replace(BY_NAME["norm"], factory=factory), (4, 2, 2))


def test_a_formula_that_does_not_take_the_shape_is_rejected_by_name():
    with pytest.raises(BlueprintRejected, match=r"formula of blueprint 'bottleneck' fails for shape \(7,\)"):
        kernel_key(BY_NAME["bottleneck"], (7,))
