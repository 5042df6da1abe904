"""Arrays and tensors as users bring them → checked tensors as training needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from esperd.errors import InvalidData

IMAGE_CHANNELS = (1, 3, 4)
"""Sizes of an axis that holds grey, RGB or RGBA."""

LABEL_LOSSES = ("cross_entropy", "next_token")
"""Losses whose targets are whole numbers that count from 0."""

_IMAGE_AXES = 4
_GREY_IMAGE_AXES = 3


def inputs_from(where: str, values: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the user's function returned
    """Convert inputs; see :mod:`esperd.trainer.data` for the rules.

    Args:
        where: ``the train split`` or the like, for messages.
        values: (N, …) array, tensor or nested list.

    Returns:
        (N, …) float32, or int64 where the values are whole numbers wider than a byte.

    Raises:
        InvalidData: when they are not numbers, not finite, or uint8 with an ambiguous channel axis.
    """
    found = _tensor(where, "inputs", values)
    if found.dtype == torch.uint8:
        return _pixels(where, found)
    if found.dtype == torch.bool:
        return found.to(torch.float32)
    if not found.is_floating_point():
        return found.to(torch.int64)
    return _finite(where, "inputs", found.to(torch.float32))


def targets_from(where: str, values: Any, loss: str) -> torch.Tensor:  # noqa: ANN401 - whatever the user's function returned
    """Convert targets: labels to int64 for cross_entropy and next_token, float32 for mse, either for a loss of the user's own.

    Args:
        where: ``the train split`` or the like, for messages.
        values: (N, …) array, tensor or nested list.
        loss: the job's.

    Raises:
        InvalidData: when they are not numbers, not finite, or, for cross_entropy and next_token, negative or not whole.
    """
    found = _tensor(where, "targets", values)
    if found.is_floating_point():
        found = _finite(where, "targets", found.to(torch.float32))
    if loss in LABEL_LOSSES:
        if found.is_floating_point() and not torch.equal(found, found.round()):
            raise InvalidData(
                f"targets of {where} are fractions; {loss} needs labels (whole numbers from 0)",
                where=where,
            )
        labels = found.to(torch.int64)
        if labels.numel() and int(labels.min()) < 0:
            row = int((labels < 0).reshape(len(labels), -1).any(dim=1).nonzero()[0])
            raise InvalidData(
                f"label {int(labels.min())} in {where} (first in row {row}) is negative; labels count from 0",
                where=where,
                row=row,
            )
        return labels
    if loss == "mse" or found.is_floating_point():
        return found.to(torch.float32)
    return found.to(torch.int64)


def check_label_range(where: str, labels: torch.Tensor, classes: int) -> None:
    """Refuse labels outside 0 to ``classes`` - 1.

    Raises:
        InvalidData: when a label lies outside; names the first.
    """
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        row = int(outside.reshape(len(labels), -1).any(dim=1).nonzero()[0])
        label = int(labels[outside][0])
        raise InvalidData(
            f"label {label} in row {row} of {where} has no output: the model has {classes}, counted from 0",
            where=where,
            row=row,
            label=label,
            classes=classes,
        )


def _tensor(where: str, what: str, values: Any) -> torch.Tensor:  # noqa: ANN401 - whatever the user's function returned
    if isinstance(values, torch.Tensor):
        found = values.detach().cpu().contiguous()
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise InvalidData(
                f"{what} of {where} are an array of {array.dtype}, not of numbers",
                where=where,
                dtype=str(array.dtype),
            )
        # A fresh copy in native byte order: read-only and foreign arrays are not shared with torch.
        found = torch.from_numpy(np.array(array, dtype=_supported(array.dtype), order="C"))
    if found.ndim == 0:
        raise InvalidData(f"{what} of {where} are a single value; the first axis must count samples", where=where)
    if found.is_complex():
        raise InvalidData(f"{what} of {where} are complex numbers, which cannot be trained on", where=where)
    return found


def _supported(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype torch has for a numpy one."""
    if dtype.kind == "f":
        return np.dtype(np.float32) if dtype.itemsize <= np.dtype(np.float32).itemsize else np.dtype(np.float64)
    if dtype.kind == "b" or dtype == np.uint8:
        return dtype
    return np.dtype(np.int64)


def _finite(where: str, what: str, values: torch.Tensor) -> torch.Tensor:
    bad = ~torch.isfinite(values)
    if bad.any():
        row = int(bad.reshape(len(values), -1).any(dim=1).nonzero()[0])
        raise InvalidData(
            f"{what} of {where} hold {int(bad.sum())} values that are NaN or infinite (first in row {row})",
            where=where,
            row=row,
            count=int(bad.sum()),
        )
    return values


def _pixels(where: str, values: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, C), (N, C, H, W), (N, H, W) or (N, F) → float32 in 0 to 1, channels first."""
    if values.ndim == _GREY_IMAGE_AXES:
        values = values.unsqueeze(1)
    elif values.ndim == _IMAGE_AXES:
        first, last = values.shape[1] in IMAGE_CHANNELS, values.shape[3] in IMAGE_CHANNELS
        if first == last:
            raise InvalidData(
                f"uint8 inputs of {where} have shape {tuple(values.shape)}: the channel axis is not clear; "
                "give float32 (N, C, H, W) instead",
                where=where,
            )
        if last:
            values = values.permute(0, 3, 1, 2).contiguous()
    return values.to(torch.float32) / 255.0
