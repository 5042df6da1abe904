"""Losses and metrics give one value per sample, or the job is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from esperd.errors import ImportFailed, InvalidData, InvalidModel, UnknownName
from esperd.messages.jobs import Budget, Job
from esperd.trainer.loss import PerSample, check_output, class_count, resolve_loss, resolve_metric

LABELS = torch.tensor([0, 2, 1, 0])


def job(**fields):
    return Job(host="mlp", data="digits", budget=Budget(epochs=1), **fields)


def test_cross_entropy_is_per_sample_and_means_to_torchs_own():
    logits = torch.randn(4, 3)

    values = resolve_loss(job())(logits, LABELS)
    assert values.shape == (4,)
    assert torch.allclose(values.mean(), functional.cross_entropy(logits, LABELS))


def test_cross_entropy_averages_over_the_positions_of_a_sample():
    logits, labels = torch.randn(4, 3, 5), torch.randint(3, (4, 5))

    values = resolve_loss(job())(logits, labels)
    assert torch.allclose(values[1], functional.cross_entropy(logits[1].T, labels[1]))


def test_mse_averages_over_the_features_of_a_sample():
    output, target = torch.randn(4, 2, 3), torch.randn(4, 2, 3)

    assert torch.allclose(resolve_loss(job(loss="mse"))(output, target)[2], functional.mse_loss(output[2], target[2]))


def test_accuracy_is_the_default_metric_of_cross_entropy_only():
    metric = resolve_metric(job())

    assert metric is not None
    assert metric(functional.one_hot(LABELS, 3) * 1.0, torch.tensor([0, 2, 0, 0])).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert resolve_metric(job(loss="mse")) is None


def test_a_function_of_the_users_own_is_found():
    assert resolve_loss(job(loss="esperd.trainer.loss:mse")).name == "esperd.trainer.loss:mse"
    assert resolve_metric(job(metric="esperd.trainer.loss:accuracy")) is not None


def test_unknown_and_unusable_names_are_refused():
    with pytest.raises(UnknownName, match=r"hinge.*cross_entropy, next_token, mse"):
        resolve_loss(job(loss="hinge"))
    with pytest.raises(UnknownName, match="accuracy"):
        resolve_metric(job(metric="f1"))
    with pytest.raises(ImportFailed, match="not a function"):
        resolve_loss(job(loss="esperd.trainer.loss:LOSSES"))


def test_an_output_that_fits_is_accepted():
    check_output(resolve_loss(job()), torch.randn(4, 3, requires_grad=True), LABELS, resolve_metric(job()))


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        ((torch.zeros(4, 3), torch.zeros(4, 3)), LABELS, "returned a tuple"),
        (torch.zeros(4, 3, dtype=torch.int64), LABELS, "floating point"),
        (torch.zeros(3, 3), LABELS, r"\(3, 3\) and the target \(4,\)"),
        (torch.zeros(()), LABELS, "one row for each"),
        (torch.zeros(4), LABELS, r"needs logits \(B, K\)"),
        (torch.zeros(4, 3, 8, 8), LABELS, r"\(4, 3, 8, 8\)"),
        (torch.zeros(4, 1), LABELS, "single logit"),
    ],
)
def test_an_output_that_does_not_fit_cross_entropy_is_refused_with_both_shapes(output, target, message):
    with pytest.raises(InvalidModel, match=message):
        check_output(resolve_loss(job()), output, target)


def test_mse_does_not_broadcast():
    with pytest.raises(InvalidModel, match=r"\(4, 1\) and the target \(4,\)"):
        check_output(resolve_loss(job(loss="mse")), torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functional.mse_loss, r"shape \(4,\), not \(\)"),
        (lambda output, target: (output - target).argmax(1), "floating-point value"),
        (lambda output, target: 3.0, "not a float"),
        (lambda output, target: output @ target, "raised RuntimeError"),
        (lambda output, target: (output - target).detach().mean(1), "cuts the gradient"),
    ],
)
def test_a_loss_of_the_users_own_must_give_one_differentiable_value_per_sample(function, message):
    with pytest.raises(InvalidModel, match=message):
        check_output(PerSample("mine:loss", function), torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3))


def test_a_metric_is_checked_too():
    with pytest.raises(InvalidModel, match="mine:metric"):
        check_output(
            resolve_loss(job()), torch.zeros(4, 3), LABELS, PerSample("mine:metric", lambda output, target: output.mean())
        )


def test_only_cross_entropy_knows_classes():
    assert class_count(resolve_loss(job()), torch.zeros(4, 7)) == 7
    assert class_count(resolve_loss(job(loss="mse")), torch.zeros(4, 7)) is None


TOKENS = torch.tensor([[0, 2, 1], [1, 1, 0]])


def test_next_token_is_the_mean_cross_entropy_over_the_places_of_a_sample():
    logits = torch.randn(2, 3, 5)

    values = resolve_loss(job(loss="next_token"))(logits, TOKENS)
    assert values.shape == (2,)
    assert torch.allclose(values[1], functional.cross_entropy(logits[1], TOKENS[1]))


def test_token_accuracy_is_the_default_metric_of_next_token():
    metric = resolve_metric(job(loss="next_token"))

    assert metric is not None
    assert metric.name == "token_accuracy"
    assert metric(functional.one_hot(torch.tensor([[0, 2, 2], [1, 1, 0]]), 3) * 1.0, TOKENS).tolist() == pytest.approx([2 / 3, 1])


def test_next_token_counts_tokens_in_the_last_axis():
    loss = resolve_loss(job(loss="next_token"))

    assert class_count(loss, torch.zeros(2, 3, 5)) == 5
    with pytest.raises(InvalidData, match=r"label 2 in row 0 .* has 2"):
        check_output(loss, torch.zeros(2, 3, 2), TOKENS)


@pytest.mark.parametrize("wrapped", [{"logits": torch.zeros(2, 3, 5)}, SimpleNamespace(logits=torch.zeros(2, 3, 5), loss=None)])
def test_an_output_may_carry_its_logits_by_name(wrapped):
    check_output(resolve_loss(job(loss="next_token")), wrapped, TOKENS, resolve_metric(job(loss="next_token")))


@pytest.mark.parametrize(
    ("loss", "output", "target", "message"),
    [
        ("next_token", torch.zeros(2, 5), torch.tensor([0, 1]), r"needs logits \(B, T, V\)"),
        ("next_token", torch.zeros(2, 5, 3), TOKENS, "logits stand in axis 1"),
        ("next_token", torch.zeros(2, 3, 5), torch.tensor([0, 1]), r"output\[:, -1\]"),
        ("next_token", torch.zeros(2, 3, 1), TOKENS, "one per token"),
        ("next_token", torch.zeros(3, 2, 5), TOKENS, "batch seems to stand in axis 1"),
        ("cross_entropy", torch.zeros(2, 3, 5), TOKENS, 'set loss = "next_token"'),
        ("cross_entropy", torch.zeros(2, 6, 5), torch.tensor([0, 1]), r"last step's logits, as in output\[:, -1\]"),
        ("cross_entropy", torch.zeros(6, 2, 5), torch.tensor([0, 1]), "batch_first=True"),
    ],
)
def test_a_sequence_models_mistake_is_told_with_what_to_do(loss, output, target, message):
    with pytest.raises(InvalidModel, match=message):
        check_output(resolve_loss(job(loss=loss)), output, target)


def test_the_state_that_a_recurrent_layer_returns_is_told_with_what_to_do():
    output = torch.nn.LSTM(4, 3, batch_first=True)(torch.zeros(4, 5, 4))

    with pytest.raises(InvalidModel, match=r"returned a tuple \(Tensor, tuple\).*\(output, state\)"):
        check_output(resolve_loss(job()), output, LABELS)
