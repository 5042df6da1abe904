"""Losses and metrics, always one value per sample: contributions and comparisons are paired sample by sample."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from esperd.declarations import resolve
from esperd.errors import ImportFailed, InvalidModel, UnknownName
from esperd.growth.outputs import prediction
from esperd.messages.jobs import DEFAULT_METRICS, Job
from esperd.trainer.samples import check_label_range

_SEQUENCE_AXES = 3
"""(B, T, V)."""

PerSampleFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PerSample:
    """A loss or a metric by name.

    Args:
        name: as the job names it.
        function: (output, target) → (B,).
    """

    name: str
    function: PerSampleFunction

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One value per sample, shape (B,)."""
        return self.function(output, target)


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of class logits.

    Args:
        output: (B, K) or (B, K, …) logits.
        target: (B,) or (B, …) int64 labels below K.

    Returns:
        (B,), averaged over the positions of a sample where there are several.
    """
    return _mean_per_sample(functional.cross_entropy(output, target, reduction="none"))


def next_token(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a language model.

    Args:
        output: (B, T, V) logits, at each place for the token that follows.
        target: (B, T) int64 tokens below V, already shifted: the one that follows each place.

    Returns:
        (B,), averaged over the places of a sample.
    """
    losses = functional.cross_entropy(output.flatten(0, 1), target.flatten(), reduction="none")  # (B·T,)
    return losses.view(target.shape).mean(dim=1)


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, averaged over the numbers of a sample: two tensors of shape (B, …) → (B,)."""
    return _mean_per_sample(functional.mse_loss(output, target, reduction="none"))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of positions whose highest logit is the label: (B, K, …) and (B, …) → (B,)."""
    return _mean_per_sample((output.argmax(dim=1) == target).to(torch.float32))


def token_accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of places whose highest logit is the token that follows: (B, T, V) and (B, T) → (B,)."""
    return (output.argmax(dim=-1) == target).to(torch.float32).mean(dim=1)


LOSSES: dict[str, PerSampleFunction] = {"cross_entropy": cross_entropy, "next_token": next_token, "mse": mse}
METRICS: dict[str, PerSampleFunction] = {"accuracy": accuracy, "token_accuracy": token_accuracy}


def resolve_loss(job: Job) -> PerSample:
    """The job's loss.

    Raises:
        UnknownName: when ``job.loss`` is neither built in nor of the form ``module:function``.
        ImportFailed: when its module does not import, has no such name, or the name is not callable.
    """
    return _find("loss", job.loss, LOSSES)


def resolve_metric(job: Job) -> PerSample | None:
    """The job's metric; when it names none: accuracy for cross_entropy, token_accuracy for next_token, otherwise None.

    Raises:
        UnknownName: when ``job.metric`` is neither built in nor of the form ``module:function``.
        ImportFailed: when its module does not import, has no such name, or the name is not callable.
    """
    name = job.metric or DEFAULT_METRICS.get(job.loss)
    return None if name is None else _find("metric", name, METRICS)


def class_count(loss: PerSample, output: torch.Tensor) -> int | None:
    """Classes or tokens that the model tells apart; None for losses that know none.

    Args:
        loss: the job's.
        output: (B, K, …) logits for cross_entropy, (B, T, V) for next_token.
    """
    if loss.function is next_token:
        return int(output.shape[-1])
    return int(output.shape[1]) if loss.function is cross_entropy else None


def check_output(loss: PerSample, output: object, target: torch.Tensor, metric: PerSample | None = None) -> None:
    """Try loss and metric on one batch, before anything is trained.

    Args:
        loss: the job's loss.
        output: what the model returned for the batch.
        target: (B, …) as the split delivers it.
        metric: the job's metric.

    Raises:
        InvalidModel: when the output holds no prediction, or one that is no floating-point tensor of the batch's length, its
            shape does not fit loss or metric, either raises, or returns anything but one floating-point value per sample, or
            the loss has no gradient.
        InvalidData: when cross_entropy or next_token meets a label that has no logit.
    """
    output = prediction(output)
    if not output.is_floating_point():
        raise InvalidModel(f"the model's output must be floating point, not {output.dtype}", dtype=str(output.dtype))
    if output.ndim == 0 or len(output) != len(target):
        hint = _hint(output, target)
        raise _misfit(f"the model's output must have one row for each of the {len(target)} samples", output, target, hint)
    for measure in (loss, metric) if metric is not None else (loss,):
        _check_shapes(measure, output, target)
        _check_values(measure, output, target)
    if output.requires_grad and not loss(output, target).requires_grad:
        raise InvalidModel(
            f"loss {loss.name!r} cuts the gradient: its result does not depend on the output for autograd", loss=loss.name
        )


def _check_shapes(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    """What is built in knows which shapes it takes; a function of the user's own is tried as it is."""
    if measure.function in (cross_entropy, accuracy):
        _check_logits(measure, output, target)
    elif measure.function in (next_token, token_accuracy):
        _check_tokens(measure, output, target)
    elif measure.function is mse and output.shape != target.shape:
        raise _misfit("mse needs an output of the target's shape", output, target)
    classes = class_count(measure, output)
    if classes is not None:
        check_label_range("the train split", target, classes)


def _check_logits(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    if output.ndim < 2 or target.shape != (output.shape[0], *output.shape[2:]):
        needs = f"{measure.name} needs logits (B, K) for labels (B,), or (B, K, …) for (B, …)"
        raise _misfit(needs, output, target, _hint(output, target))
    if output.shape[1] == 1:
        raise _misfit(f"{measure.name} of a single logit is always the same; the model needs one per class", output, target)


def _check_tokens(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    if output.ndim != _SEQUENCE_AXES or target.shape != output.shape[:2]:
        raise _misfit(f"{measure.name} needs logits (B, T, V) for tokens (B, T)", output, target, _hint(output, target))
    if output.shape[2] == 1:
        raise _misfit(f"{measure.name} of a single logit is always the same; the model needs one per token", output, target)


def _check_values(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    try:
        values = measure(output, target)
    except (Exception, SystemExit) as error:
        raise InvalidModel(
            f"{measure.name!r} raised {type(error).__name__} on output {tuple(output.shape)} {output.dtype} and target "
            f"{tuple(target.shape)} {target.dtype}: {error}",
            function=measure.name,
            traceback=traceback.format_exc(),
        ) from error
    if not isinstance(values, torch.Tensor):
        raise InvalidModel(
            f"{measure.name!r} must return a tensor of one value per sample, not a {type(values).__name__}",
            function=measure.name,
        )
    if values.shape != (len(output),) or not values.is_floating_point():
        raise InvalidModel(
            f"{measure.name!r} must return one floating-point value per sample, shape ({len(output)},), not "
            f"{tuple(values.shape)} {values.dtype}; use reduction='none' and average over a sample's own positions only",
            function=measure.name,
            returned=str(tuple(values.shape)),
        )


def _misfit(what: str, output: torch.Tensor, target: torch.Tensor, hint: str = "") -> InvalidModel:
    return InvalidModel(
        f"{what}; the output is {tuple(output.shape)} and the target {tuple(target.shape)}{hint}",
        output=str(tuple(output.shape)),
        target=str(tuple(target.shape)),
    )


def _hint(output: torch.Tensor, target: torch.Tensor) -> str:
    """What people who meet this combination of shapes usually have to do: recurrent and language models, most of them."""
    if output.ndim != _SEQUENCE_AXES:
        return ""
    if len(output) != len(target):
        in_axis_1 = output.shape[1] == len(target)
        return ". The batch seems to stand in axis 1: recurrent layers take batch_first=True" if in_axis_1 else ""
    if target.ndim == 1:
        return ". For one label a sample return the last step's logits, as in output[:, -1], or their mean over the steps"
    if target.shape == output.shape[:2]:
        return '. For a token at each place set loss = "next_token", metric = "token_accuracy"'
    if target.shape == (output.shape[0], output.shape[2]):
        return ". The logits stand in axis 1; next_token wants them last, cross_entropy in axis 1"
    return ""


def _mean_per_sample(values: torch.Tensor) -> torch.Tensor:
    """(B,) or (B, …) → (B,)."""
    return values if values.ndim == 1 else values.flatten(1).mean(dim=1)


def _find(kind: str, name: str, known: dict[str, PerSampleFunction]) -> PerSample:
    if name in known:
        return PerSample(name, known[name])
    if ":" not in name:
        raise UnknownName(
            f"no {kind} is called {name!r}; there are: {', '.join(known)}, or name your own as 'module:function'",
            kind=kind,
            name=name,
            available=sorted(known),
        )
    function = resolve(name)
    if not callable(function):
        raise ImportFailed(f"{kind} {name!r} is a {type(function).__name__}, not a function", reference=name)
    return PerSample(name, function)
