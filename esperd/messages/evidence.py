"""What is known from tries of earlier jobs: one record a try, what they come to, and who asks for it."""

from __future__ import annotations

from typing import Literal

from esperd.messages.base import Message, Reply, Value
from esperd.messages.growth import Contribution, Trial

TryOutcome = Literal["fossilized", "culled", "refused"]
"""How a try ended. ``culled``: it lived, if only to lose a screening. ``refused``: it was asked for, and a gate or a surgery
operation did not let it in."""


class TriedSeed(Value, frozen=True, kw_only=True):
    """One try of an arm and what became of it. What was never measured is None."""

    job: str
    seed: str | None
    """None: it was refused, so it has no name."""
    slot: str
    blueprint: str
    topology: str | None
    """Of the slot; None where the observation did not describe it, as in the two below."""
    depth: float | None
    """Place of the slot among the job's: 1/n for the first of n, 1 for the last."""
    width: float | None
    """Channels of the slot over those of the job's widest slot."""
    outcome: TryOutcome
    contribution: Contribution | None = None
    """The last one measured, kept or not."""
    trial: Trial | None = None
    incubation_loss: float | None = None
    gradient_ratio: float | None = None
    activation_bytes: float | None = None
    """What its module keeps for the backward pass, for one sample; measured as it germinated."""
    seconds_share: float | None = None
    """Its forward seconds over the host's, measured as it germinated; of one that was refused, those of the arm's seed before it.
    Measured where the job charges for seconds."""
    parameters: int
    flops_per_sample: float
    reward: float | None
    """What its arm was credited with, in units of the job's loss; None: nothing was."""
    rent: float
    gate_loss: float
    """Of the job when the try began."""
    begun_epoch: int
    ended_epoch: int
    point: int
    """Decision point that told of the end."""
    recorded_at: float
    """Seconds since the epoch, for people: no decision reads it."""


class Precedent(Value, frozen=True, kw_only=True):
    """What tries of other jobs come to, for one blueprint on slots of one kind.

    A gain is what a try brought before rent: its contribution when it was kept, 0 when it was not. It is told as a share of the
    gate loss that its job had when the try began, so that jobs of different losses can be compared.
    """

    blueprint: str
    topology: str
    third: int | None
    """Third of the job's slots by depth, 1 nearest to the input, 3 nearest to the output; None: wherever they stood."""
    weight: float
    """Tries, each by its age; see ``docs/policy.md``."""
    gain: float
    """Their mean gain."""
    spread: float
    """Standard deviation of their gains; 0 of a single one."""
    kept: float
    """Share of them that was fossilized."""


class EvidenceSnapshot(Value, frozen=True, kw_only=True):
    """What a job was given of other jobs' experience, once, at its first decision."""

    sha256: str
    """Of the precedents, as MessagePack."""
    precedents: int
    tries: int
    """Tries they were made of."""
    jobs: int
    """Jobs those tries are of."""


class EvidenceRow(Value, frozen=True, kw_only=True):
    """What is known about one blueprint on slots of one topology in one third of the depth."""

    blueprint: str
    topology: str | None
    third: int | None
    """As in :class:`Precedent`; None: the slots were not described."""
    tries: int
    kept: int
    refused: int
    jobs: int
    contribution: float | None
    """Mean of the contributions that were measured, kept or not; None: none was."""
    lower: float | None
    """Mean of the lower ends of their intervals."""
    upper: float | None
    gain: float | None
    """Mean gain before rent, as a share of the gate loss; newer tries weigh more."""
    reward: float | None
    """Mean of the rewards, each try alike; None: none was credited."""
    incubation_loss: float | None
    """Mean of those that were measured, as in the two below."""
    gradient_ratio: float | None
    activation_bytes: float | None
    seconds_share: float | None = None
    """Mean of the forward seconds over the host's that were measured."""
    parameters: tuple[int, int]
    """Fewest and most."""
    flops_per_sample: tuple[float, float]
    """Fewest and most."""
    newest: float
    """When the newest was recorded, in seconds since the epoch."""


class ListEvidence(Message, frozen=True, kw_only=True):
    """Ask what earlier tries come to."""

    blueprint: str = "*"
    """A name or a shell pattern."""
    job: str | None = None
    """Tries of this job only; None: of every job."""


class EvidenceList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListEvidence`: by blueprint, topology and depth."""

    rows: tuple[EvidenceRow, ...]


class ForgetEvidence(Message, frozen=True, kw_only=True):
    """Delete what is known. Jobs that were given it already keep what they were given."""

    blueprint: str
    """A name or a shell pattern; ``*``: everything."""


class EvidenceForgotten(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ForgetEvidence`; durable."""

    tries: int
    """Records that are gone."""
