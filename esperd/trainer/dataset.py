"""A split over a map-style dataset of the user's: samples are fetched, converted and checked as batches need them."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils.data import Subset, default_collate

from esperd.errors import InvalidData
from esperd.trainer.samples import check_label_range, inputs_from, targets_from

_PAIR = 2


class DatasetSplit:
    """Samples fetched on demand.

    Args:
        name: ``train``, ``gate`` or ``audit``, for messages.
        dataset: has a length; an index from 0 gives ``(x, y)``.
        loss: the job's; decides what targets must be.
    """

    def __init__(self, name: str, dataset: Any, loss: str) -> None:  # noqa: ANN401 - whatever the user's function returned
        self.name = name
        self._where = f"the {name} split"
        self._dataset = dataset
        self._loss = loss
        self._samples = len(dataset)
        self._classes: int | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._samples

    def __len__(self) -> int:
        return self._samples

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fetch, stack, convert and check samples.

        Args:
            indices: (B,) int64.

        Returns:
            x (B, …) and y (B, …).

        Raises:
            InvalidData: when the dataset raises, does not give ``(x, y)``, its samples do not stack, or a value is unusable.
        """
        rows = indices.tolist()
        try:
            samples = [self._dataset[row] for row in rows]
            stacked = default_collate(samples)
        except (Exception, SystemExit) as error:
            raise InvalidData(
                f"{self._where} could not deliver rows {rows[:5]}…: {type(error).__name__}: {error}",
                split=self.name,
                traceback=traceback.format_exc(),
            ) from error
        if not isinstance(stacked, tuple | list) or len(stacked) != _PAIR:
            raise InvalidData(
                f"a sample of {self._where} must be a pair (x, y), not {type(samples[0]).__name__}", split=self.name
            )
        x, y = inputs_from(self._where, stacked[0]), targets_from(self._where, stacked[1], self._loss)
        if self._classes is not None:
            check_label_range(self._where, y, self._classes)
        return x, y

    def check_labels(self, classes: int) -> None:
        """From now on refuse labels outside 0 to ``classes`` - 1, in whichever batch they come."""
        self._classes = classes


def origin(dataset: Any) -> tuple[int, set[int]]:  # noqa: ANN401 - whatever the user's function returned
    """Identity of the dataset under any nested ``Subset``, and the rows of it that are read."""
    rows = list(range(len(dataset)))
    while isinstance(dataset, Subset):
        rows = [int(dataset.indices[row]) for row in rows]
        dataset = dataset.dataset
    return id(dataset), set(rows)
