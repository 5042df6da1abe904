"""The attribution at the end of growth: what the kept seeds bring to the finished network, alone and together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from esperd.growth.attribution import attribute
from esperd.messages.growth import Attribution, Stage
from esperd.trainer.desk import Desk
from esperd.trainer.passes import Stopped, batches_of, evaluation_batch
from esperd.trainer.run import Run

Batch = tuple[torch.Tensor, torch.Tensor]


def attribution_of(run: Run) -> Attribution | None:
    """Attribute the gate loss to the seeds that were kept, when growth is over and nothing will be decided any more.

    It only reads: the network, its modes and buffers and the RNG streams stay as they are, to the bit. What it costs is no
    training: the ledger is not charged, because the control's budget is what the ledger says. ``Attribution.flops`` says it.

    Args:
        run: whose budget is spent. That, and nothing else, decides what is found: a resumed job finds the same.

    Returns:
        The attribution, as far as the job's ``growth.attribution_share`` of the FLOPs spent reaches; None when that is 0, or no
        seed was kept.

    Raises:
        Stopped: the daemon asked for it; the run stands where it stood.
    """
    job, grower = run.job, run.grower
    oldest_first = sorted(grower.network.seeds(), key=lambda seed: seed.epoch)
    kept = {seed.name: seed.alpha for seed in oldest_first if seed.stage is Stage.FOSSILIZED}
    if not kept or job.growth.attribution_share == 0.0:
        return None
    return attribute(
        grower.network,
        Interruptible(batches_of(run.splits.gate, run.device, evaluation_batch(run.splits, job)), run.desk),
        grower.loss,
        kept,
        cost_of=grower.gate_pass.cost_of(run.flops_per_sample()),
        flops_cap=job.growth.attribution_share * grower.ledger.total,
        epoch=grower.epoch,
        confidence=job.gates.confidence,
        interval=job.gates.interval,
        fused=bool(grower.gate_pass.fused),
        rng_seed=job.rng_seed,
    )


class Interruptible(list[Batch]):
    """Batches of a split that is read many times: between any two the daemon may ask to stop.

    Args:
        batches: the split.
        desk: the daemon.
    """

    def __init__(self, batches: Iterable[Batch], desk: Desk) -> None:
        super().__init__(batches)
        self._desk = desk

    def __iter__(self) -> Iterator[Batch]:
        """The batches, in order.

        Raises:
            Stopped: the daemon asked for it.
        """
        for batch in super().__iter__():
            why = self._desk.stop_requested()
            if why is not None:
                raise Stopped(why)
            yield batch
