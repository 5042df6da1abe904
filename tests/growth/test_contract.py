"""The contract check: it passes what is sound and names, for what is broken, the promise that is."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.declarations import Blueprint
from esperd.errors import BlueprintRejected, ImportFailed
from esperd.growth.contract import check_blueprint

SHAPES = {
    "cnn": [(1, 6, 6), (5, 4, 7), (64, 2, 2)],
    "mlp": [(1,), (5,), (64,)],
    "transformer": [(2, 3), (3, 5), (12, 64)],
}
"""Beside those that the contract is checked at of itself."""
built_in = pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
SHAPE = (4, 5, 5)


class Sound(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], shape[0], 1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        return x + self.conv(x)


class OneWeakParameter(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * 2.0 * torch.sigmoid(0.1 * self.weight * x.mean((2, 3), keepdim=True))


class ChangesShape(Sound):
    def forward(self, x):
        return super().forward(x)[:, :, 1:]


class ChangesDtype(Sound):
    def forward(self, x):
        return super().forward(x).double()


class ReturnsTuple(Sound):
    def forward(self, x):
        return (super().forward(x), x)


class MakesNan(Sound):
    def forward(self, x):
        return super().forward(x) + (x * 0.0).log() * 0.0


class OverflowsOnLargeInputs(Sound):
    def forward(self, x):
        return x + self.conv(x.exp() * 1e10)


class ZeroConvBeforeNorm(nn.Module):
    """The classic trap: relu'(0) = 0, so no parameter ever moves."""

    def __init__(self, shape):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], shape[0], 1, bias=False)
        self.norm = nn.GroupNorm(1, shape[0])
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class UnusedParameter(Sound):
    def __init__(self, shape):
        super().__init__(shape)
        self.forgotten = nn.Parameter(torch.ones(3))


class Frozen(Sound):
    def __init__(self, shape):
        super().__init__(shape)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)


class NoParameters(nn.Module):
    def __init__(self, shape):
        super().__init__()

    def forward(self, x):
        return x * 1.0


class Climbs(torch.autograd.Function):
    """Identity forward, reversed gradient backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class LearnsBackwards(Sound):
    def forward(self, x):
        return x + Climbs.apply(self.conv(x))


class Draws(Sound):
    calls = 0

    def forward(self, x):
        Draws.calls += 1
        return super().forward(x) + Draws.calls


class NoisyInEvaluation(Sound):
    """Its last layer hides the noise at birth."""

    def forward(self, x):
        return x + self.conv(x) * (1.0 + 0.1 * torch.rand_like(x))


class CountsInEvaluation(Sound):
    calls = 0

    def forward(self, x):
        self.calls += not self.training
        return x + self.conv(x) * (1.0 + self.calls)


class WithDropout(Sound):
    def forward(self, x):
        return x + self.conv(nn.functional.dropout(x, 0.5, self.training))


class DropsInEvaluation(Sound):
    """The noise that kernels may have."""

    def forward(self, x):
        return x + self.conv(nn.functional.dropout(x, 0.5, training=True))


class WritesToTheHost(Sound):
    def forward(self, x):
        return super().forward(x.add_(1.0))


class AddsToTheHost(Sound):
    """At birth it adds zero, and torch would tell of a backward pass it cannot make."""

    def forward(self, x):
        x += self.conv(x.clone())
        return x


class WritesWhatWasThere(Sound):
    def forward(self, x):
        return super().forward(x.mul_(1.0))


class WritesInEvaluation(Sound):
    def forward(self, x):
        return super().forward(x if self.training else x.add_(1.0))


class Detaches(Sound):
    def forward(self, x):
        return x + self.conv(x.detach())


class HearsTheBatch(Sound):
    def forward(self, x):
        return x + self.conv(x - x.mean(0, keepdim=True))


class DividesByTheBatch(Sound):
    def forward(self, x):
        return x + self.conv(x) / torch.ones_like(x).sum(0, keepdim=True)


class WithBatchNorm(Sound):
    def __init__(self, shape):
        super().__init__(shape)
        self.norm = nn.BatchNorm2d(shape[0], affine=False)

    def forward(self, x):
        return x + self.conv(self.norm(x))


class SeedsTheGenerator(Sound):
    def forward(self, x):
        torch.manual_seed(0)
        return super().forward(x)


class SeedsTheGeneratorInTraining(Sound):
    """And draws from it, which in training it may."""

    def forward(self, x):
        if self.training:
            torch.manual_seed(0)
        return x + self.conv(nn.functional.dropout(x, 0.5, self.training))


class SeedsTheGeneratorByChance(Sound):
    def forward(self, x):
        if self.training:
            torch.seed()
        return super().forward(x)


class DrawsInEvaluation(Sound):
    def forward(self, x):
        return super().forward(x) + 0.0 * nn.functional.dropout(x, 0.5, training=True)


class DrawsFromPython(Sound):
    def forward(self, x):
        random.random()
        return super().forward(x)


class DrawsFromNumpy(Sound):
    def forward(self, x):
        np.random.rand()
        return super().forward(x)


class HearsLaterTokens(nn.Module):
    """What a token hears comes through the last layer alone, which is zero at birth."""

    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape[1], shape[1], bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return x + self.linear(self.heard(x))

    def heard(self, x):
        return x.mean(1, keepdim=True)


class HearsTheNextToken(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.conv = nn.Conv1d(shape[1], shape[1], 3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class HearsEarlierTokens(HearsLaterTokens):
    def heard(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class RaisesOnBuild(Sound):
    def __init__(self, shape):
        raise RuntimeError("no room")


class Positions(nn.Module):
    """Adds what it learned for each place: it takes no sequence but of the length it was built for."""

    def __init__(self, shape):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.places


class MixesPlaces(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.mix = nn.Linear(shape[0], shape[0], bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x):
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


def no_module(shape):
    return "a module"


def declare(
    factory, parameters=lambda shape: shape[0] ** 2, flops=lambda shape: 2.0 * shape[0] ** 2 * shape[1] * shape[2], **fields
):
    return Blueprint(
        name="candidate",
        topology=fields.pop("topology", "cnn"),
        factory=f"{__name__}:{factory.__name__}",
        parameters=parameters,
        flops=flops,
        description="",
        source="",
        **fields,
    )


def failed(blueprint):
    return {check.name for check in check_blueprint(blueprint, [SHAPE]).failures}


@built_in
def test_every_built_in_blueprint_keeps_its_contract(blueprint):
    check_blueprint(blueprint, SHAPES[blueprint.topology]).raise_for_failures()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@built_in
def test_the_built_in_contract_does_not_hang_on_the_seed(blueprint, seed):
    check_blueprint(blueprint, seed=seed).raise_for_failures()


def test_a_sound_blueprint_passes_with_numbers_for_every_check():
    report = check_blueprint(declare(Sound), [SHAPE])
    assert report.passed
    assert [check.title for check in report.checks] == [
        *("builds", "has_parameters", "parameter_formula", "shape", "input_kept", "finite", "deterministic", "independent"),
        *("streams", "exports", "flop_formula"),
        *("identity (add)", "gradient (add)", "learns (add)"),
        *("identity (multiply)", "gradient (multiply)", "learns (multiply)"),
        *("identity (gate)", "gradient (gate)", "learns (gate)"),
    ]
    assert all(check.detail for check in report.checks)


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_of_one_parameter_is_seen_to_learn_although_its_first_step_is_tiny(seed):
    blueprint = declare(OneWeakParameter, parameters=lambda shape: 1, flops=lambda shape: 0.0)
    check_blueprint(blueprint, [(3, 8, 8)], seed=seed).raise_for_failures()


@pytest.mark.parametrize(
    ("factory", "broken"),
    [
        (RaisesOnBuild, {"builds"}),
        (no_module, {"builds"}),
        (ChangesShape, {"shape"}),
        (ChangesDtype, {"shape"}),
        (ReturnsTuple, {"shape"}),
        (ZeroConvBeforeNorm, {"gradient"}),
        (UnusedParameter, {"gradient"}),
        (Frozen, {"has_parameters"}),
        (NoParameters, {"has_parameters"}),
        (LearnsBackwards, {"learns"}),
        (OverflowsOnLargeInputs, {"finite"}),
    ],
)
def test_a_broken_blueprint_fails_the_check_it_breaks(factory, broken):
    assert broken <= failed(declare(factory))


def test_a_dead_gradient_breaks_no_promise_but_gradient_and_learning():
    assert failed(declare(ZeroConvBeforeNorm, parameters=lambda shape: shape[0] ** 2 + 2 * shape[0])) == {"gradient", "learns"}


def test_nan_outputs_are_counted():
    report = check_blueprint(declare(MakesNan), [SHAPE])
    finite = next(check for check in report.checks if check.name == "finite")
    assert not finite.passed
    assert "500 of 500 outputs are not finite" in finite.detail


@pytest.mark.parametrize("factory", [Draws, NoisyInEvaluation, CountsInEvaluation])
def test_a_seed_that_computes_something_else_each_time_is_not_deterministic(factory):
    assert failed(declare(factory)) >= {"deterministic"}


def test_a_blueprint_that_says_it_is_not_deterministic_is_only_held_to_finite_outputs():
    report = check_blueprint(declare(DropsInEvaluation, deterministic=False), [SHAPE])
    report.raise_for_failures()
    made = {check.name for check in report.checks}
    assert {"finite", "streams"} <= made
    assert not {"deterministic", "independent"} & made
    assert failed(declare(DropsInEvaluation)) == {"deterministic", "streams"}


def test_dropout_is_deterministic():
    check_blueprint(declare(WithDropout), [SHAPE]).raise_for_failures()


@pytest.mark.parametrize(
    ("factory", "parameters", "flops", "detail"),
    [
        (Positions, 40, 0.0, "(2, 1, 8) torch.float32 on cpu became (2, 5, 8) torch.float32 on cpu"),
        (MixesPlaces, 25, 400.0, "it fails on (2, 1, 8): RuntimeError"),
    ],
)
def test_a_seed_for_transformers_must_take_any_length(factory, parameters, flops, detail):
    blueprint = declare(factory, lambda shape: parameters, lambda shape: flops, topology="transformer")
    (failure,) = check_blueprint(blueprint, [(5, 8)]).failures
    assert failure.name == "shape"
    assert detail in failure.detail


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (ChangesShape, "shape", r"\(1, 4, 5, 5\) torch.float32 on cpu became \(1, 4, 4, 5\)"),
        (MakesNan, "finite", "500 of 500 outputs are not finite"),
        (NoisyInEvaluation, "deterministic", "two evaluation passes differ by up to .* declare deterministic=False"),
        (NoParameters, "has_parameters", "it has no parameters, so there is nothing to train"),
    ],
)
def test_what_cannot_be_a_seed_is_refused_for_its_own_reason(factory, check, message):
    blueprint = declare(factory, parameters=lambda shape: 0 if factory is NoParameters else shape[0] ** 2)
    with pytest.raises(BlueprintRejected, match=message) as caught:
        check_blueprint(blueprint, [SHAPE]).raise_for_failures()
    assert caught.value.fields["checks"][0] == check


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (
            WritesToTheHost,
            "input_kept",
            "in training it writes to its input, .* 100 of 100 values changed, 1 operations in place; use",
        ),
        (AddsToTheHost, "input_kept", "in training it writes to its input, .* 100 of 100 values changed, 1 operations"),
        (WritesWhatWasThere, "input_kept", "0 of 100 values changed, 1 operations in place"),
        (WritesInEvaluation, "input_kept", "in evaluation it writes to its input, .*; use operations that return a new tensor"),
        (Detaches, "exports", "uses aten.detach.default, .* it would be refused when a job wants to grow it"),
        (HearsTheBatch, "independent", r"a sample alone and within a batch of 5 differ by up to 0\.\d+ of .* rounding: 0.0001"),
        (DividesByTheBatch, "independent", "it computes over the batch; compute over the other dimensions"),
        (SeedsTheGenerator, "streams", "passes in training from two states .* one and the same: .* leave out torch.manual_seed"),
        (SeedsTheGeneratorInTraining, "streams", "passes in training from two states .* one and the same"),
        (SeedsTheGeneratorByChance, "streams", "two passes in training from one state .* stands in two: .* leave out torch.seed"),
        (DrawsInEvaluation, "streams", "in evaluation it draws from torch's generator .* or declare deterministic=False"),
        (DrawsFromPython, "streams", "in training it draws from the global stream of random or seeds it"),
        (DrawsFromNumpy, "streams", "in training it draws from the global stream of numpy.random or seeds it"),
    ],
)
def test_what_would_break_a_network_is_refused_by_one_check_alone(factory, check, message):
    report = check_blueprint(declare(factory), [SHAPE])
    (failure,) = report.failures
    assert failure.name == check
    with pytest.raises(BlueprintRejected, match=message):
        report.raise_for_failures()


@pytest.mark.parametrize(
    ("factory", "parameters", "flops", "broken"),
    [
        (HearsLaterTokens, 64, lambda tokens: 2.0 * 64, ["causal"]),
        (HearsTheNextToken, 192, lambda tokens: 2.0 * 192 * tokens, ["causal"]),
        (HearsEarlierTokens, 64, lambda tokens: 2.0 * 64 * tokens + 4.0 * 8 * tokens**2, []),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_seed_for_transformers_hears_no_later_token(factory, parameters, flops, broken, tokens):
    blueprint = declare(factory, lambda shape: parameters, lambda shape: flops(shape[0]), topology="transformer")
    failures = check_blueprint(blueprint, [(tokens, 8)]).failures
    assert [failure.name for failure in failures] == broken
    for failure in failures:
        assert "from place 1 of 11 on, outputs before it move by up to 0." in failure.detail


def test_batch_norm_is_independent_of_the_batch_in_evaluation():
    check_blueprint(declare(WithBatchNorm), [SHAPE]).raise_for_failures()


def test_a_portable_form_is_looked_for_once():
    report = check_blueprint(declare(Sound), [SHAPE, (3, 2, 2)])
    assert [check.shape for check in report.checks if check.name == "exports"] == [SHAPE]


def test_a_wrong_parameter_formula_is_reported_with_both_numbers():
    report = check_blueprint(declare(Sound, parameters=lambda shape: 37_000), [SHAPE])
    assert [(check.name, check.detail) for check in report.failures] == [
        ("parameter_formula", "the formula says 37000, the module has 16")
    ]


def test_a_wrong_flop_formula_is_reported_with_both_numbers():
    report = check_blueprint(declare(Sound, flops=lambda shape: 1.0), [SHAPE])
    assert [(check.name, check.detail) for check in report.failures] == [
        ("flop_formula", "the formula says 1 FLOPs a sample, the module takes 800")
    ]


def test_raising_for_failures_names_checks_shapes_and_numbers():
    report = check_blueprint(declare(Sound, parameters=lambda shape: 1), [SHAPE, (3, 2, 2)])
    with pytest.raises(BlueprintRejected, match=r"parameter_formula at \(4, 5, 5\).*parameter_formula at \(3, 2, 2\)") as caught:
        report.raise_for_failures()
    assert caught.value.fields["checks"] == ["parameter_formula", "parameter_formula"]


@pytest.mark.parametrize("factory", [Sound, SeedsTheGenerator, DrawsFromPython, DrawsFromNumpy])
def test_checking_leaves_the_process_generators_as_they_were(factory):
    before, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    check_blueprint(declare(factory), [SHAPE])
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy[1])
    assert np.random.get_state()[2:] == numpy[2:]


def test_a_factory_that_does_not_import_is_an_error_of_its_own():
    with pytest.raises(ImportFailed):
        check_blueprint(dataclasses.replace(declare(Sound), factory="nowhere:nothing"))
