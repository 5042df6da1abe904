"""Events: what happened, when, in which job. Appended to the log first, then published to watchers."""

from __future__ import annotations

from typing import Annotated, get_args

import msgspec

from esperd.messages.base import LARGEST_INTEGER, Message, Reply, Value
from esperd.messages.control import BreakerStatus
from esperd.messages.evidence import EvidenceSnapshot
from esperd.messages.growth import Contribution, Screened, SeedRecord, SlotRecord, Stage, Trial, Verdict
from esperd.messages.jobs import JobError, JobState
from esperd.messages.policy import ArmMerit, ArmTrial, Decision
from esperd.messages.reports import Metrics

MOST_ASKED = 100_000
"""Events that may be asked for at one time; the log answers with fewer."""


class EventBody(Value, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base of every event; the tag is the class name."""


class JobStateChanged(EventBody, frozen=True, kw_only=True):
    """A job moved to another state."""

    state: JobState
    attempt: int
    error: JobError | None = None


class BreakerChanged(EventBody, frozen=True, kw_only=True):
    """The job's worker leaves a service alone that kept it waiting, tries it, or found it well again."""

    breaker: BreakerStatus


class TrainingStarted(EventBody, frozen=True, kw_only=True):
    """Model, data and slots are ready. Sent again after each resume, with the epoch it resumed from."""

    epoch: int
    epochs: int | None
    """Epochs of the budget; None when FLOPs or seconds bound the job."""
    train_samples: int
    gate_samples: int
    audit_samples: int
    host_parameters: int
    host_flops_per_sample: float
    slots: tuple[SlotRecord, ...]
    device: str
    exact_resume: bool
    inexact_because: str = ""
    """The condition that is missing for a bit-identical resume; empty when nothing is."""


class EpochCompleted(EventBody, frozen=True, kw_only=True):
    """One pass over the train split and one over the gate split."""

    epoch: int
    phase: str
    """``growth`` or ``control``."""
    train_loss: float
    gate_loss: float
    gate_metric: float | None
    learning_rate: float
    parameters: int
    flops_per_sample: float
    training_flops: float
    """Charged so far in this phase."""
    progress: float
    """Share of the budget spent, 0 to 1."""
    seconds: float
    """Duration of this epoch, its gate pass and ablations included."""
    seeds: tuple[SeedRecord, ...]


class DecisionMade(EventBody, frozen=True, kw_only=True):
    """The policy decided. ``applied`` is False when a gate or a surgery operation refused."""

    epoch: int
    decision: Decision
    applied: bool
    refusal: str = ""
    point: int | None = None
    """Number of the decision point; None: told by an older esperd, which did not say."""


class StageChanged(EventBody, frozen=True, kw_only=True):
    """A seed moved from one stage to another."""

    epoch: int
    seed: str
    slot: str
    blueprint: str
    before: Stage
    after: Stage
    reason: str


class GateEvaluated(EventBody, frozen=True, kw_only=True):
    """A gate looked at a seed."""

    epoch: int
    seed: str
    verdict: Verdict


class ContributionMeasured(EventBody, frozen=True, kw_only=True):
    """A seed's contribution at this decision point."""

    epoch: int
    seed: str
    contribution: Contribution


class ProspectMeasured(EventBody, frozen=True, kw_only=True):
    """What switching on a seed that learned behind the host would bring, measured before gate G2 is asked."""

    epoch: int
    seed: str
    prospect: Contribution


class ScreeningEnded(EventBody, frozen=True, kw_only=True):
    """Several candidates had learned behind the host at once: the most promising one goes on, the others are out."""

    epoch: int
    screening: str
    winner: str | None
    """None: no candidate was fit to go on."""
    candidates: tuple[Screened, ...]


class TrialMeasured(EventBody, frozen=True, kw_only=True):
    """A controlled trial: what the network with a seed has over its twin without it, after both trained on for the same FLOPs."""

    epoch: int
    seed: str
    trial: Trial


class ArmGauged(EventBody, frozen=True, kw_only=True):
    """The gradient merit of an arm was measured; nothing was grown."""

    epoch: int
    merit: ArmMerit


class ArmTried(EventBody, frozen=True, kw_only=True):
    """An arm competed with others and with growing nothing; nothing was grown."""

    epoch: int
    tried: ArmTrial


class KernelLoaded(EventBody, frozen=True, kw_only=True):
    """A seed runs on this kernel."""

    epoch: int
    seed: str
    blueprint: str
    manifest_id: str
    source: str


class NetworkCompiled(EventBody, frozen=True, kw_only=True):
    """A training pass waited for ``torch.compile``: the first of a structure, or one of a new shape."""

    epoch: int
    structure: str
    """The seeds that are heard, and how; ``host`` for none."""
    graphs: int
    """Graphs compiled for this pass."""
    seconds: float
    """Duration of the pass, the compiler's work included."""


class NetworkNotCompiled(EventBody, frozen=True, kw_only=True):
    """The job asked for compiled passes, and those of this structure run eager."""

    epoch: int
    structure: str
    reason: str


class CheckpointSaved(EventBody, frozen=True, kw_only=True):
    """A checkpoint is durable."""

    epoch: int
    sha256: str
    size_bytes: int
    seconds: float


class PolicyUnavailable(EventBody, frozen=True, kw_only=True):
    """The policy could not be reached; training went on without structural change."""

    epoch: int
    reason: str


class EvidenceGiven(EventBody, frozen=True, kw_only=True):
    """The policy decides with what other jobs learned. Sent once, at the first decision; ``esper evidence`` shows what is known
    now.
    """

    epoch: int
    evidence: EvidenceSnapshot


class RolledBack(EventBody, frozen=True, kw_only=True):
    """Training met a catastrophe: the network went back to the last good decision point, and goes on differently from there."""

    epoch: int
    """Epochs completed when it was seen."""
    to_epoch: int
    """Epochs completed now; later ones are trained, and told, again."""
    reason: str
    numbers: dict[str, float | None]
    """What was looked at: loss, level, limit; None for what is not finite."""
    action: str
    """``cull``: the living seeds were culled; ``cut_rate``: the learning rate was cut."""
    rate_scale: float
    """What the scheduled learning rate is multiplied with from now on."""
    trip: int
    """Number of this rollback in the run, from 1."""
    gone: tuple[str, ...] = ()
    """Seeds that germinated after ``to_epoch``."""
    returned: tuple[str, ...] = ()
    """Seeds that were culled or fossilized after it and live again."""


class AuditMeasured(EventBody, frozen=True, kw_only=True):
    """The audit split was read, once, for this network."""

    network: str
    """``grown`` or ``control``."""
    metrics: Metrics


class ExportFailed(EventBody, frozen=True, kw_only=True):
    """The copy into ``[export] directory`` could not be written at the end; the job succeeds, its store has everything."""

    directory: str
    reason: str


Body = (
    JobStateChanged
    | BreakerChanged
    | TrainingStarted
    | EpochCompleted
    | DecisionMade
    | StageChanged
    | GateEvaluated
    | ContributionMeasured
    | ProspectMeasured
    | ScreeningEnded
    | TrialMeasured
    | ArmGauged
    | ArmTried
    | KernelLoaded
    | NetworkCompiled
    | NetworkNotCompiled
    | CheckpointSaved
    | PolicyUnavailable
    | EvidenceGiven
    | RolledBack
    | AuditMeasured
    | ExportFailed
)


EVENT_TYPES: tuple[str, ...] = tuple(sorted(kind.__name__ for kind in get_args(Body)))
"""Every event type, by name."""


class Event(Value, frozen=True, kw_only=True):
    """Something that happened. ``sequence`` grows by one per job, without holes, from 1."""

    job: str
    sequence: int
    at: float
    """Seconds since the epoch, by the clock of the process that saw it."""
    body: Body


class NewEvent(Value, frozen=True, kw_only=True):
    """An event that the log has not numbered yet."""

    at: float
    body: Body


class Record(Message, frozen=True, kw_only=True):
    """Append these events to the log of a job, in this order, and publish them.

    ``key`` makes it idempotent: a batch whose key was recorded for the job already is not appended again. Keys are made of
    attempt and running number, so that what a job repeats after a crash is logged as what it is: a second pass.
    """

    job: str
    key: str
    events: tuple[NewEvent, ...]


class GetEvents(Message, frozen=True, kw_only=True):
    """Events of a job after ``after``, oldest first."""

    job: str
    after: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_ASKED)] = 500


class Place(Value, frozen=True, kw_only=True):
    """Where a page of events in the order of time ended."""

    at: float
    number: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)]


class FindEvents(Message, frozen=True, kw_only=True):
    """Events of every job, or one, in the order of time; with ``recorded_after`` in the order in which they were recorded."""

    job: str | None = None
    """None: every job."""
    types: tuple[str, ...] = ()
    """Names of event types; none: every type."""
    since: float | None = None
    """Seconds since the epoch; that moment included."""
    until: float | None = None
    """Seconds since the epoch; that moment excluded."""
    after: Place | None = None
    """``next`` of the page before."""
    recorded_until: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] | None = None
    """``recorded`` of the first page: what was recorded later is not in the pages after it, and comes with ``recorded_after``."""
    recorded_after: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] | None = None
    """``recorded`` of an answer: only events that were recorded after it."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_ASKED)] = 500


class EventsFound(Reply, frozen=True, kw_only=True):
    """Answer to :class:`FindEvents`."""

    events: tuple[Event, ...]
    next: Place | None
    """Ask again ``after`` this; None: there are no more, or the order is that of recording: then ask again while any came."""
    recorded: int
    """Number of the last event that this answer speaks for: the log's last, or, in the order of recording, the page's."""


class EventPage(Reply, frozen=True, kw_only=True):
    """Answer to :class:`GetEvents`; ask again after the last one's sequence while ``more``."""

    events: tuple[Event, ...]
    more: bool
