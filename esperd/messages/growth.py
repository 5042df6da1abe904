"""The vocabulary of growing: stages and their transition table, verdicts, contributions, seeds and slots as records."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from esperd.messages.base import Value

Topology = Literal["cnn", "mlp", "transformer"]
"""What kind of tensor flows at a slot."""


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
    screening: str = ""
    """Name of the screening it is a candidate of; empty: of none."""
    incubation_loss: float | None = None
    """Mean loss of its incubation passes in the last epoch that had any; None: none ran."""
    activation_bytes: float | None = None
    """What its module keeps for the backward pass, for one sample, measured as it germinated; None: it was not."""


class Screened(Value, frozen=True, kw_only=True):
    """A candidate of a screening, as it ended."""

    seed: str
    slot: str
    blueprint: str
    prospect: Contribution | None
    """What switching it on would bring; None: never measured."""
    incubation_loss: float | None
    """Mean loss of its passes in the last epoch; None when none ran."""
    gradient_ratio: float | None


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


IntervalMethod = Literal["t", "bootstrap"]
"""How the interval of a mean of paired differences is computed."""


class SeedAttribution(Value, frozen=True, kw_only=True):
    """What one of several seeds brings, measured by switching them on and off together. Positive means it lowers the loss.

    None means it was not measured; ``Attribution.not_measured`` says why.
    """

    seed: str
    alpha: float
    """Its alpha in every coalition that it is part of."""
    leave_one_out: Contribution | None
    """The network with the other seeds on: without this one minus with it."""
    solo: Contribution | None
    """The network with the other seeds off: without this one minus with it."""
    shapley: float | None
    """Its mean effect over every order in which the seeds could be switched on. Over all seeds these add up to the loss with all
    off minus the loss with all on."""
    shapley_error: float | None
    """Standard error of having sampled orders, not of the split; 0.0 when all were counted, None when one pair was sampled."""


class Interaction(Value, frozen=True, kw_only=True):
    """What two seeds bring together beyond what each of them brings alone, in units of the loss, all others off.

    Positive: each helps the other. Negative: they bring the same thing, or disturb each other.
    """

    first: str
    second: str
    value: float


class Attribution(Value, frozen=True, kw_only=True):
    """How the loss on the gate split divides among seeds. It shares the known limit of every :class:`Contribution`."""

    epoch: int
    samples: int
    loss_all_on: float | None
    loss_all_off: float | None
    seeds: tuple[SeedAttribution, ...]
    interactions: tuple[Interaction, ...]
    exact: bool | None
    """Whether the Shapley values come from every coalition; False when orders were sampled, None when they are not known."""
    permutations: int
    """Orders sampled for the Shapley values; 0 when they are exact or not known."""
    coalitions: int
    """Sets of seeds whose loss was measured."""
    flops: float
    """Spent on the passes."""
    not_measured: tuple[str, ...]
    """What is missing and why: the FLOPs cap, or a loss that was not finite."""
