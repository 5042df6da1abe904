"""What every strategy remembers between two decisions of a job. It travels with the job's checkpoint as msgpack."""

from __future__ import annotations

import msgspec

from esperd.errors import CheckpointRejected
from esperd.messages.policy import Arm, ArmMerit, ArmTrial

STATE_VERSION = 5
READABLE = (4, STATE_VERSION)
"""Versions that are read. 4 did not know gradients at slots: of its tries they stay unknown."""


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """Where and when an arm was tried, as the observation told it. Every number lies between 0 and 1, but for ``gradient``."""

    depth: float
    """Place of the slot among the job's, in the order of the host: 1/n for the first of n, 1 for the last."""
    width: float
    """Channels of the slot's tensor over those of the widest slot."""
    parameters: float
    """Share of the seed in host and seed together."""
    flops: float
    """Share of the seed in the forward FLOPs of host and seed together."""
    progress: float
    """Share of the budget that was spent."""
    gradient: float | None = None
    """Logarithm of the loss's gradient at the slot, against those at all slots that were measured: half its distance from their
    mean in standard deviations, -1 to 1. None: not measured, or nowhere else."""


class ArmStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Rewards of one arm."""

    arm: Arm
    pulls: int
    """Seeds of this arm whose end was credited, refused germinations included."""
    total: float
    """Sum of their rewards."""
    squares: float
    """Sum of their squared rewards."""
    refused: int = 0
    """How many of them never came to live."""
    refused_total: float = 0.0
    """Sum of the rewards of those."""


class Try(msgspec.Struct, frozen=True, kw_only=True):
    """One credited reward. :class:`ArmStatistics` sum them up; strategies that weigh by age or circumstances look here."""

    arm: Arm
    reward: float
    circumstances: Circumstances | None = None
    """None where the observation did not describe the slot."""


class PendingSeed(msgspec.Struct, frozen=True, kw_only=True):
    """A seed that lives: its arm is credited when it ends."""

    seed: str
    arm: Arm
    rent: float
    circumstances: Circumstances | None = None
    """Of the decision that asked for it."""
    measurements: int = 0
    """Contributions seen while it was PROBATIONARY."""
    measured_epoch: int | None = None
    """Epoch of the last of them."""


class AskedArm(msgspec.Struct, frozen=True, kw_only=True):
    """A germination asked for at the last decision point; whether it happened shows in the next observation."""

    arm: Arm
    rent: float
    circumstances: Circumstances | None = None


class BanditState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything. Tuples are sorted, but for ``tries``, so that equal knowledge is equal bytes."""

    version: int = STATE_VERSION
    arms: tuple[ArmStatistics, ...] = ()
    tries: tuple[Try, ...] = ()
    """Oldest first."""
    pending: tuple[PendingSeed, ...] = ()
    credited: tuple[str, ...] = ()
    """Seeds whose end is in the statistics."""
    asked: tuple[AskedArm, ...] = ()
    """Several where arms are screened."""
    merits: tuple[ArmMerit, ...] = ()
    """The latest of each arm that was gauged."""
    gauged_passes: float = 0.0
    """What all gauging has taken, in forward and backward passes of the host over one batch."""
    trials: tuple[ArmTrial, ...] = ()
    """The latest of each arm that competed."""

    def encode(self) -> bytes:
        """Msgpack, the same bytes for the same state."""
        return msgspec.msgpack.encode(self, order="deterministic")


def decode_state(data: bytes) -> BanditState:
    """Read a state; empty bytes are the state of a new job.

    Raises:
        CheckpointRejected: when the bytes are not a state of a version in :data:`READABLE`.
    """
    if not data:
        return BanditState()
    try:
        state = msgspec.msgpack.decode(data, type=BanditState)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointRejected(f"the policy's state cannot be read: {error}", size_bytes=len(data)) from error
    if state.version not in READABLE:
        raise CheckpointRejected(
            f"the policy's state has version {state.version}, this esperd knows {' and '.join(map(str, READABLE))}",
            version=state.version,
        )
    return msgspec.structs.replace(state, version=STATE_VERSION)
