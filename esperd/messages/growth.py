"""The vocabulary of growing: stages and their transition table, verdicts, contributions, seeds and slots as records."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from esperd.messages.base import Value


class Stage(enum.StrEnum):
    """Where a seed stands in its life. Values are stored on disk: never rename one, only add or retire."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    BLENDING = "blending"
    SHADOWING = "shadowing"
    PROBATIONARY = "probationary"
    FOSSILIZED = "fossilized"
    CULLED = "culled"
    EMBARGOED = "embargoed"
    RESETTING = "resetting"


TRANSITIONS: Mapping[Stage, frozenset[Stage]] = MappingProxyType(
    {
        Stage.DORMANT: frozenset({Stage.GERMINATED}),
        Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CULLED}),
        Stage.TRAINING: frozenset({Stage.BLENDING, Stage.CULLED}),
        Stage.BLENDING: frozenset({Stage.SHADOWING, Stage.CULLED}),
        Stage.SHADOWING: frozenset({Stage.PROBATIONARY, Stage.BLENDING, Stage.CULLED}),
        Stage.PROBATIONARY: frozenset({Stage.FOSSILIZED, Stage.BLENDING, Stage.CULLED}),
        Stage.FOSSILIZED: frozenset(),
        Stage.CULLED: frozenset({Stage.EMBARGOED}),
        Stage.EMBARGOED: frozenset({Stage.RESETTING}),
        Stage.RESETTING: frozenset({Stage.DORMANT}),
    }
)
"""The one table of legal transitions. FOSSILIZED is final; the cool-down runs one way."""

LIVE_STAGES = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.PROBATIONARY})
"""Stages in which a seed occupies its slot and may still be culled."""

COOLDOWN_STAGES = frozenset({Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING})
"""Stages in which the seed's module is gone but its slot does not take a new one yet."""


class Verdict(Value, frozen=True, kw_only=True):
    """What a gate said, with every number it looked at. A number that was never measured is None, and fails the gate."""

    gate: str
    passed: bool
    reason: str
    near: bool = False
    """True when a measured number lies within a tenth of its threshold, on either side."""
    numbers: dict[str, float | None] = {}


class Contribution(Value, frozen=True, kw_only=True):
    """What the network loses without a seed: paired per-sample loss on the gate split, without minus with.

    Positive means the seed helps. Known limit: the host adapts to its seeds, so this overstates what a seed brought; it is
    evidence for culling, never for ranking.
    """

    loss: float
    """Mean of the paired differences, in units of the job's loss."""
    lower: float
    upper: float
    confidence: float
    """Two-sided level of the interval, for example 0.95."""
    samples: int
    metric: float | None = None
    """Mean paired difference of the job's metric (accuracy: a share, not points); None when the job has no metric."""
    epoch: int


class Trial(Value, frozen=True, kw_only=True):
    """What a seed brought, by a controlled trial: from one checkpoint the network with it and its twin without it trained on,
    on the same samples, for the same FLOPs; paired per-sample loss on the gate split, without minus with.

    Unlike a contribution it is not biased by what the host gave up for the seed: the twin has adapted to being without it.
    """

    loss: float
    """Mean of the paired differences, in units of the job's loss; positive: the seed brought something."""
    lower: float
    upper: float
    confidence: float
    samples: int
    metric: float | None = None
    """Mean paired difference of the job's metric; None when the job has no metric."""
    steps_with: int
    """Optimiser steps of the network with the seed."""
    steps_without: int
    """Of its twin, which affords more of them."""
    flops: float
    """Charged for both twins and their gate passes."""
    epoch: int


class SeedRecord(Value, frozen=True, kw_only=True):
    """One seed as others see it."""

    seed: str
    """``<slot>#<n>``: the n-th seed ever germinated in the job."""
    slot: str
    blueprint: str
    stage: Stage
    alpha: float
    parameters: int
    flops_per_sample: float
    """Forward FLOPs of the seed alone, for one sample."""
    germinated_epoch: int
    epochs_in_stage: int
    operator: str = "add"
    alpha_target: float = 1.0
    kernel: str | None = None
    """Manifest id of the kernel it runs on."""
    contribution: Contribution | None = None
    prospect: Contribution | None = None
    """What switching it on would have brought when it was last incubating behind the host; None: never measured."""
    trial: Trial | None = None
    gradient_ratio: float | None = None
    verdict: Verdict | None = None
    """The last gate verdict given on it."""
    reason: str = ""
    """Why it was culled or fossilized; empty while it lives."""


class SlotRecord(Value, frozen=True, kw_only=True):
    """A place of the host where a tensor flows whose shape a seed can keep."""

    slot: str
    """Dotted path of the host module whose output is the slot, as in ``host.named_modules()``."""
    topology: str
    """``cnn`` for (B, C, H, W); ``transformer`` for (B, T, D); ``mlp`` for (B, F)."""
    shape: tuple[int, ...]
    """Shape of one sample's tensor, without the batch dimension."""
    dtype: str
    module: str
    """Class name of the host module."""
