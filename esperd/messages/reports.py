"""What a finished job found: networks, seeds, refusals, rollbacks, and the comparison with the control."""

from __future__ import annotations

from esperd.messages.base import Value
from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.growth import Attribution, Contribution, SlotRecord, Stage, Trial


class Metrics(Value, frozen=True, kw_only=True):
    """A network measured on the audit split, once."""

    loss: float
    metric: float | None
    parameters: int
    flops_per_sample: float
    """Forward FLOPs."""
    training_flops: float
    """Everything charged to reach it."""
    training_seconds: float
    epochs: float
    """Passes over the train split."""


class SeedOutcome(Value, frozen=True, kw_only=True):
    """How a seed ended."""

    seed: str
    slot: str
    blueprint: str
    stage: Stage
    """FOSSILIZED, CULLED, or the stage it was in when the budget ended (it is then removed as CULLED)."""
    reason: str
    contribution: Contribution | None
    trial: Trial | None = None
    parameters: int
    flops_per_sample: float
    germinated_epoch: int
    ended_epoch: int
    operator: str | None = None
    """How its output entered the slot; None: told by an older esperd, which did not say."""
    alpha: float | None = None
    """With which it stands in the network; 0 when it is gone, None as above."""


class RollbackRecord(Value, frozen=True, kw_only=True):
    """A catastrophe of training that the governor took back; told by the event ``RolledBack`` when it happened."""

    phase: str
    """``growth`` or ``control``."""
    trip: int
    """Number of this rollback in its phase, from 1."""
    epoch: int
    """Epochs completed when it was seen."""
    to_epoch: int
    """Epochs completed where training went on from."""
    reason: str
    action: str
    """``cull`` or ``cut_rate``: what was done differently from there."""
    seeds_culled: int
    rate_scale: float
    """What the scheduled learning rate was multiplied with from there on."""


class RefusedArm(Value, frozen=True, kw_only=True):
    """An arm that was wanted but not grown, and why."""

    slot: str
    blueprint: str
    epoch: int
    by: str
    """``policy`` declined it; ``gate``: a gate or a check refused it; ``unavailable``: its kernel could not be provided."""
    reason: str


class Comparison(Value, frozen=True, kw_only=True):
    """Grown network minus control on the audit split, paired per sample."""

    metric: float | None
    metric_lower: float | None
    metric_upper: float | None
    loss: float
    """Control's loss minus the grown network's: positive means growth helped."""
    loss_lower: float
    loss_upper: float
    confidence: float
    samples: int


class Report(Value, frozen=True, kw_only=True):
    """What a finished job found. Stored as canonical JSON beside the model. Format 1 did not tell attribution and rollbacks."""

    format: int = 2
    job: str
    name: str
    rng_seed: int
    metric_name: str | None
    grown: Metrics
    control: Metrics | None
    """The same host, same seed, without growth, for the same FLOPs; None when the job asked for no control."""
    comparison: Comparison | None
    seeds: tuple[SeedOutcome, ...]
    refused: tuple[RefusedArm, ...]
    slots: tuple[SlotRecord, ...]
    flops: dict[str, float]
    """Training FLOPs by purpose: ``train``, ``incubation``, ``ablation``, ``gate``."""
    policy_unavailable: int
    """Decision points at which the policy could not be reached."""
    device: str
    torch: str
    esperd: str
    resumed: int
    """Times the job went on from a checkpoint."""
    attribution: Attribution | None = None
    """How the gate loss of the finished network divides among the seeds that were kept; its FLOPs are in no other number here.
    None: no seed was kept, or the job's ``growth.attribution_share`` is 0."""
    rollbacks: tuple[RollbackRecord, ...] | None = None
    """Catastrophes that training was taken back from, oldest first; None: format 1, which did not say."""
    evidence: EvidenceSnapshot | None = None
    """What the policy was given of other jobs' experience; None: nothing, ``policy.memory`` is off."""
