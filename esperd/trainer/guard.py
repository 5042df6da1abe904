"""The governor at work: it is shown what a run loses, keeps the last good point, and takes the run back there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from esperd.errors import TrainingDiverged
from esperd.growth.governor import (
    Fail,
    GateObserved,
    Occurrence,
    Resumed,
    Rollback,
    SeedLost,
    SnapshotTaken,
    StepsObserved,
    TakeSnapshot,
    Watch,
    advance,
)
from esperd.growth.grower import Grower
from esperd.growth.lifecycle import CullRequested
from esperd.growth.rollback import Snapshot
from esperd.messages.jobs import Governor
from esperd.messages.reports import RollbackRecord
from esperd.messages.telemetry import Body, RolledBack

CursorT = TypeVar("CursorT")


class WentBack(Exception, Generic[CursorT]):
    """The network stands at an earlier point again; whoever trains goes on from the cursor of that point."""

    def __init__(self, cursor: CursorT) -> None:
        super().__init__("the run went back to an earlier point")
        self.cursor = cursor


@dataclass
class Guard(Generic[CursorT]):
    """Watches one run.

    Args:
        settings: the job's.
        chance_loss: loss of the best constant answer; None when there is no such number.
        grower: what is taken back.
        emit: takes events as they happen.
    """

    settings: Governor
    chance_loss: float | None
    grower: Grower
    emit: Callable[[Body], None]
    watch: Watch = field(default_factory=Watch)
    snapshot: Snapshot[CursorT] | None = None
    told: list[str] = field(default_factory=list)
    """What was rolled back since the policy was last asked, in words."""
    _good: bool = False

    def stand(self, cursor: CursorT, *, resumed: bool = False) -> None:
        """The run begins here, or goes on from a checkpoint: there is a point to go back to.

        Args:
            cursor: given back by :class:`WentBack`.
            resumed: it goes on from a checkpoint that was written here: this is no new point, what was tried counts on.
        """
        if not self.settings.enabled:
            return
        self.snapshot = Snapshot.take(self.grower, cursor)
        live = len(self.snapshot.live_seeds)
        self._see(Resumed(self.grower.epoch, live) if resumed else SnapshotTaken(self.grower.epoch, live))

    def steps(self, mean_loss: float, steps: int) -> None:
        """Some training steps are done.

        Raises:
            WentBack: a catastrophe was seen, and the network stands at the last good point again.
            TrainingDiverged: nothing is left to try; tells the story.
        """
        self._see(StepsObserved(loss_sum_finite=mean_loss - mean_loss == 0.0, mean_loss=mean_loss, steps=steps))

    def gate(self, loss: float) -> None:
        """The gate split was read. Raises as :meth:`steps` does."""
        self._good = False
        self._see(GateObserved(loss, self.grower.epoch))

    def seed_lost(self) -> None:
        """A seed that was heard was culled at this point: what the losses were says nothing about what they will be."""
        self._see(SeedLost())

    def decided(self, cursor: Callable[[], CursorT]) -> None:
        """The decisions of this point are carried out: a good one is kept to go back to."""
        if self._good:
            self.stand(cursor())

    def _see(self, occurrence: Occurrence) -> None:
        self.watch, instructions = advance(self.watch, occurrence, self.settings, chance_loss=self.chance_loss)
        for instruction in instructions:
            match instruction:
                case TakeSnapshot():
                    self._good = True
                case Rollback():
                    self._go_back(instruction)
                case Fail(story):
                    raise TrainingDiverged(story, epoch=self.grower.epoch)

    def _go_back(self, ordered: Rollback) -> None:
        assert self.snapshot is not None  # noqa: S101 - the governor goes back to what it was told of
        restored = self.snapshot.restore_into(self.grower)
        if ordered.culls:
            for seed in list(self.grower.network.seeds()):
                if seed.lives:
                    self.grower.occur(seed, CullRequested(f"governor: {ordered.reason}"))
        self.told.append(f"{ordered.reason}; the network went back to epoch {ordered.to_epoch}")
        self.emit(
            RolledBack(
                epoch=ordered.epoch,
                to_epoch=ordered.to_epoch,
                reason=ordered.reason,
                numbers=ordered.numbers,
                action=ordered.action,
                rate_scale=ordered.rate_scale,
                trip=ordered.trip,
                gone=restored.gone,
                returned=restored.returned,
            )
        )
        raise WentBack(restored.cursor)


def rollbacks(phase: str, watch: Watch) -> tuple[RollbackRecord, ...]:
    """What a run was taken back from, for the report: of what a checkpoint holds, so a resumed job tells it, too."""
    return tuple(
        RollbackRecord(
            phase=phase,
            trip=number,
            epoch=trip.epoch,
            to_epoch=trip.to_epoch,
            reason=trip.reason,
            action=trip.remedy,
            seeds_culled=trip.seeds_culled,
            rate_scale=trip.rate_scale,
        )
        for number, trip in enumerate(watch.trips, start=1)
    )
