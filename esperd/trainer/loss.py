"""Losses and metrics, always one value per sample: contributions and comparisons are paired sample by sample."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from esperd.declarations import resolve
from esperd.errors import ImportFailed, InvalidModel, UnknownName
from esperd.messages.jobs import Job
from esperd.trainer.samples import check_label_range

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


def mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error, averaged over the numbers of a sample: two tensors of shape (B, …) → (B,)."""
    return _mean_per_sample(functional.mse_loss(output, target, reduction="none"))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of positions whose highest logit is the label: (B, K, …) and (B, …) → (B,)."""
    return _mean_per_sample((output.argmax(dim=1) == target).to(torch.float32))


LOSSES: dict[str, PerSampleFunction] = {"cross_entropy": cross_entropy, "mse": mse}
METRICS: dict[str, PerSampleFunction] = {"accuracy": accuracy}


def resolve_loss(job: Job) -> PerSample:
    """The job's loss.

    Raises:
        UnknownName: when ``job.loss`` is neither built in nor of the form ``module:function``.
        ImportFailed: when its module does not import, has no such name, or the name is not callable.
    """
    return _find("loss", job.loss, LOSSES)


def resolve_metric(job: Job) -> PerSample | None:
    """The job's metric; when it names none: accuracy for cross_entropy, otherwise None.

    Raises:
        UnknownName: when ``job.metric`` is neither built in nor of the form ``module:function``.
        ImportFailed: when its module does not import, has no such name, or the name is not callable.
    """
    if job.metric is None:
        return _find("metric", "accuracy", METRICS) if job.loss == "cross_entropy" else None
    return _find("metric", job.metric, METRICS)


def class_count(loss: PerSample, output: torch.Tensor) -> int | None:
    """K of (B, K, …) logits when the loss is cross_entropy; None for losses that know no classes."""
    return int(output.shape[1]) if loss.function is cross_entropy else None


def check_output(loss: PerSample, output: object, target: torch.Tensor, metric: PerSample | None = None) -> None:
    """Try loss and metric on one batch, before anything is trained.

    Args:
        loss: the job's loss.
        output: what the model returned for the batch.
        target: (B, …) as the split delivers it.
        metric: the job's metric.

    Raises:
        InvalidModel: when the output is no floating-point tensor of the batch's length, its shape does not fit loss or
            metric, either raises, or returns anything but one floating-point value per sample, or the loss has no gradient.
        InvalidData: when cross_entropy meets a label that has no logit.
    """
    if not isinstance(output, torch.Tensor):
        raise InvalidModel(
            f"the model returned a {type(output).__name__}; a job can train models that return one tensor",
            returned=type(output).__name__,
        )
    if not output.is_floating_point():
        raise InvalidModel(f"the model's output must be floating point, not {output.dtype}", dtype=str(output.dtype))
    if output.ndim == 0 or len(output) != len(target):
        raise _misfit(f"the model's output must have one row for each of the {len(target)} samples", output, target)
    for measure in (loss, metric) if metric is not None else (loss,):
        if measure.function in (cross_entropy, accuracy):
            _check_logits(measure, output, target)
            if measure.function is cross_entropy:
                check_label_range("the train split", target, output.shape[1])
        elif measure.function is mse and output.shape != target.shape:
            raise _misfit("mse needs an output of the target's shape", output, target)
        _check_values(measure, output, target)
    if output.requires_grad and not loss(output, target).requires_grad:
        raise InvalidModel(
            f"loss {loss.name!r} cuts the gradient: its result does not depend on the output for autograd", loss=loss.name
        )


def _check_logits(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    if output.ndim < 2 or target.shape != (output.shape[0], *output.shape[2:]):
        raise _misfit(f"{measure.name} needs logits (B, K) for labels (B,), or (B, K, …) for (B, …)", output, target)
    if output.shape[1] == 1:
        raise _misfit(f"{measure.name} of a single logit is always the same; the model needs one per class", output, target)


def _check_values(measure: PerSample, output: torch.Tensor, target: torch.Tensor) -> None:
    try:
        values = measure(output, target)
    except Exception as error:
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


def _misfit(what: str, output: torch.Tensor, target: torch.Tensor) -> InvalidModel:
    return InvalidModel(
        f"{what}; the output is {tuple(output.shape)} and the target {tuple(target.shape)}",
        output=str(tuple(output.shape)),
        target=str(tuple(target.shape)),
    )


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
