"""Samples for everything but training: the gate split, controlled trials and contests; and how such a pass is broken off."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from esperd.messages.jobs import Job
from esperd.trainer.data import Split, Splits, epoch_order
from esperd.trainer.desk import Desk, StopReason

EVALUATION_BATCH = 512
"""Samples in one gate or audit pass; larger than training batches because no graph is kept. Chosen, not measured. Where each
sample has many targets, its outputs are as many times larger, and a training batch is all that is known to fit."""

TRIAL_EPOCHS = 500_000
"""Orders of the train split from here on are for trials: no job trains as many epochs."""


class Stopped(Exception):
    """The run was asked to stop and did.

    Args:
        why: as the daemon said.
        between_steps: whether it stands after a whole step, where it can be saved. In the middle of a decision point it does not,
            and the job goes on from its last checkpoint.
    """

    def __init__(self, why: StopReason, *, between_steps: bool = True) -> None:
        super().__init__(why)
        self.why: StopReason = why
        self.between_steps = between_steps


@dataclass(frozen=True)
class TrialSamples:
    """What controlled trials are run on: the job's own splits, the train split in orders of its own.

    Nothing but the job and the epoch decides them, so a resumed job tries on the same samples.
    """

    splits: Splits
    job: Job
    device: torch.device
    desk: Desk

    def train(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches without end: passes over the train split in orders that no training epoch has.

        Raises:
            Stopped: the daemon asked for it. The trial is abandoned, and run anew when the job goes on.
        """
        for passes in itertools.count():
            order = epoch_order(self.job.rng_seed, TRIAL_EPOCHS + epoch + passes, self.splits.train.samples)
            for indices in torch.split(order, self.job.batch_size):
                why = self.desk.stop_requested()
                if why is not None:
                    raise Stopped(why, between_steps=False)
                inputs, targets = self.splits.train.batch(indices)
                yield inputs.to(self.device), targets.to(self.device)

    def gate(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The gate split."""
        return batches_of(self.splits.gate, self.device, evaluation_batch(self.splits, self.job))


def evaluation_batch(splits: Splits, job: Job) -> int:
    """Samples in one gate or audit pass."""
    _, targets = splits.train.batch(torch.zeros(1, dtype=torch.int64))
    return EVALUATION_BATCH if targets[0].numel() == 1 else job.batch_size


def batches_of(split: Split, device: torch.device, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A whole split in order, in batches of ``size``."""
    for indices in torch.split(torch.arange(split.samples), size):
        inputs, targets = split.batch(indices)
        yield inputs.to(device), targets.to(device)
