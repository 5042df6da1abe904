"""Jobs: what a user asks for, the states a job passes through, and what client, daemon and worker say about it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from esperd.messages.base import LARGEST_INTEGER, Message, Reply, Value
from esperd.messages.growth import IntervalMethod, Topology
from esperd.messages.policy import PolicySettings

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
MOST_LISTED = 100_000
"""Jobs in one answer at most; chosen, not measured."""
Share = Annotated[float, msgspec.Meta(gt=0.0, lt=1.0)]
Fraction = Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
DEFAULT_METRICS: Mapping[str, str] = MappingProxyType({"cross_entropy": "accuracy", "next_token": "token_accuracy"})
"""The metric of a job that names none, by its loss."""


USERS_OWN = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"
"""``module:function``."""
OptimizerName = Annotated[
    str, msgspec.Meta(pattern=f"^(sgd|adam|adamw|{USERS_OWN})$", description="'sgd', 'adam', 'adamw' or your own module:function")
]
BUILT_IN_OPTIMIZERS = ("sgd", "adam", "adamw")
"""Those whose settings are keys of ``[optimizer]``."""
SchedulerName = Annotated[
    str,
    msgspec.Meta(
        pattern=f"^(constant|cosine|linear|{USERS_OWN})$",
        description="'constant', 'cosine', 'linear' or your own module:function",
    ),
]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a job file: strict, so that a mistyped key is an error and never silently a default."""


class Optimizer(Section, frozen=True, kw_only=True):
    """``[optimizer]``: ``sgd`` (momentum), ``adam``, ``adamw``, or the user's own."""

    name: OptimizerName = "adamw"
    """``sgd``, ``adam``, ``adamw``, or ``module:function`` taking (parameter groups, ``lr``, ``**options``), returning a
    ``torch.optim.Optimizer``. Seeds and host share it."""
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0)] = 3e-3
    """The first one; ``[scheduler]`` says how it goes on."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0)] = 0.01
    """As ``torch.optim`` means it: decoupled for ``adamw``, added to the gradient for ``sgd`` and ``adam``."""
    momentum: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.9
    """``sgd`` only."""
    nesterov: bool = False
    """``sgd`` only, with a momentum above 0."""
    betas: tuple[Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)], Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]] = (0.9, 0.999)
    """``adam`` and ``adamw``."""
    implementation: Literal["auto", "foreach", "fused", "single"] = "auto"
    """Torch's: all tensors of a group in few kernels (``foreach``), in one (``fused``), or one by one (``single``)."""
    max_gradient_norm: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """Gradients are scaled down to this norm: the host's as a whole, each seed's as a whole. None: never."""
    options: dict[str, Any] = {}
    """Keyword arguments of the user's own optimiser; those of the others are the keys above, and with them any here is an
    error."""


class Scheduler(Section, frozen=True, kw_only=True):
    """``[scheduler]``: the learning rate over the share of the budget that is spent."""

    name: SchedulerName = "cosine"
    """``constant``, ``cosine``, ``linear``, or ``module:function`` taking the share of the budget that is spent, 0 to 1,
    returning the learning rate as a share of the first."""
    final_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end, as a share of the first; ``cosine`` and ``linear``."""
    warmup_share: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of the budget over which the learning rate rises from 0, linearly, before it follows its shape."""


class Budget(Section, frozen=True, kw_only=True):
    """``[budget]``: the job ends at the first limit it reaches. At least one of epochs, flops, seconds is required."""

    epochs: Positive | None = None
    """Passes over the train split."""
    flops: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """Training FLOPs, everything charged: culled seeds, incubation and ablations too."""
    seconds: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """Seconds of training. A job bound by time cannot be resumed bit-identically."""
    parameters: Positive | None = None
    """Largest parameter count the grown network may have."""
    flops_per_sample: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """Largest forward FLOPs for one sample the grown network may have: what using it costs."""


MOST_PIECES = 64
"""Parts that a batch is trained in at most; chosen, not measured."""


class Resources(Section, frozen=True, kw_only=True):
    """``[resources]``: what the job's worker may take. Its cores are the job's ``threads``."""

    memory_bytes: NonNegative = 0
    """Host memory. The worker is stopped when it holds more, and as much is set aside for it. 0: no limit of its own; what it,
    or a job like it, was measured to take is set aside."""
    gpu_memory_bytes: NonNegative = 0
    """GPU memory of the one card it runs on; likewise."""
    smaller_retry: bool = False
    """When memory runs out, try again with every batch trained in twice as many pieces, whose gradients are added up: the same
    steps on the same samples. Batch norm sees pieces, and sums round otherwise, so the job is no longer bit-identical."""


class Slots(Section, frozen=True, kw_only=True):
    """``[slots]``: where seeds may be placed."""

    patterns: tuple[str, ...] = ()
    """Shell patterns over module paths (``features.*``). Empty: found by tracing one batch."""
    limit: Positive = 4
    """At most this many slots are taken from tracing, spread evenly over the depth."""


class CoAdaptation(Section, frozen=True, kw_only=True):
    """``[growth.co_adaptation]``: whether the host's gradient also passes through a seed from BLENDING on, by topology. False:
    the host learns beside its seeds as if they were constants, and does not come to depend on them through them.
    """

    cnn: bool = True
    """Slots (C, H, W)."""
    mlp: bool = True
    """Slots (F,)."""
    transformer: bool = True
    """Slots (T, D)."""


class Growth(Section, frozen=True, kw_only=True):
    """``[growth]``: what may be grown and how long each stage lasts, in epochs."""

    enabled: bool = True
    """False: the host trains alone."""
    blueprints: tuple[str, ...] = ()
    """Names or shell patterns. Empty: every registered blueprint of the slot's topology."""
    incubation: Literal["lookahead", "straight_through", "frozen_input", "joint"] = "joint"
    """How a seed trains before it is blended in, see ``docs/growth.md``."""
    operator: Literal["add", "multiply", "gate"] = "add"
    """How a seed's output enters its slot, see ``docs/growth.md``."""
    co_adaptation: CoAdaptation = CoAdaptation()
    """Whether the host adapts to its seeds from BLENDING on."""
    screening_epochs: Positive = 1
    """How long candidates of a screening learn side by side before the best one goes on."""
    incubation_epochs: Positive = 1
    """Stay in TRAINING before gate G2 is asked."""
    blending_epochs: Positive = 1
    """Stay in BLENDING: how long alpha takes to its target."""
    shadowing_epochs: Positive = 1
    """Stay in SHADOWING: the window gate G4 looks at."""
    probation_epochs: Positive = 3
    """Longest stay in PROBATIONARY; after it the seed is culled for ``timeout``."""
    embargo_epochs: NonNegative = 1
    """Epochs a slot rests after a cull."""
    resetting_epochs: Positive = 1
    """Epochs between the end of the embargo and the slot's release."""
    alpha_target: Fraction = 1.0
    """Share of a seed's output that flows once it is blended in."""
    alpha_schedule: str = "cosine"
    """Name of a registered alpha schedule."""
    learning_rate_scale: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    """Learning rate of seeds relative to the host's."""
    warmup_epochs: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Epochs over which a new seed's learning rate rises from 0 to its own, linearly; parts of an epoch count."""
    attribution_share: Annotated[float, msgspec.Meta(ge=0.0)] = 0.02
    """Share of the FLOPs spent that attributing the gate loss to the kept seeds may cost, at the end of growth. It decides
    nothing and trains nothing, so it is not charged. 0: not made. Chosen, not measured."""


class Thresholds(Section, frozen=True, kw_only=True):
    """``[gates.topologies.NAME]``, ``[gates.blueprints.NAME]``: other thresholds for some seeds. A blueprint's go before a
    topology's.
    """

    min_gradient_ratio: Annotated[float, msgspec.Meta(ge=0.0)] | None = None
    """As in ``[gates]``, where it is not given."""
    max_vanished_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    """As above."""
    max_exploded_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    """As above."""
    max_loss_drift: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """As above."""
    max_loss_spike: Annotated[float, msgspec.Meta(gt=0.0)] | None = None
    """As above."""
    min_contribution: float | None = None
    """As above."""


class Gates(Section, frozen=True, kw_only=True):
    """``[gates]``: thresholds. Sources in ``docs/growth.md``."""

    min_gradient_ratio: Annotated[float, msgspec.Meta(ge=0.0)] = 0.05
    """G2: parameter-normalised gradient norm of the seed over the host's."""
    max_vanished_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.5
    """G2: share of the seed's parameter tensors whose gradient has vanished."""
    max_exploded_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.1
    """G2: share of the seed's parameter tensors whose gradient has exploded."""
    max_loss_drift: Annotated[float, msgspec.Meta(gt=0.0)] = 0.25
    """G2: largest relative rise of the gate loss were the seed switched on; G4: over the shadowing window."""
    max_loss_spike: Annotated[float, msgspec.Meta(gt=0.0)] = 0.5
    """G4: largest relative jump of the gate loss from one epoch to the next in the window."""
    confidence: Annotated[float, msgspec.Meta(gt=0.5, lt=1.0)] = 0.95
    """G5: level of the contribution's interval."""
    interval: IntervalMethod = "t"
    """How intervals are made: Student's t over the paired differences, or a bootstrap of them (BCa)."""
    min_contribution: float = 0.0
    """G5: the interval's lower end must lie above this loss."""
    proof: Literal["contribution", "trial"] = "contribution"
    """What G5 looks at: the contribution, or a controlled trial: twins with and without the seed, trained on for the same
    FLOPs."""
    trial_epochs: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    """Length of a controlled trial, in epochs of the network with the seed; at most ``budget.epochs``."""
    topologies: dict[Topology, Thresholds] = {}
    """Other thresholds by topology of the slot: ``cnn``, ``mlp``, ``transformer``."""
    blueprints: dict[str, Thresholds] = {}
    """Other thresholds by blueprint: its name, no pattern."""


class Governor(Section, frozen=True, kw_only=True):
    """``[governor]``: what counts as a catastrophe of training, and what is done about it. Sources in ``docs/growth.md``."""

    enabled: bool = True
    """False: nothing is kept to roll back to and only numbers are looked at: one that is not finite ends the job."""
    steps: Positive = 8
    """Training steps whose mean loss is looked at as one number."""
    window: Annotated[int, msgspec.Meta(ge=4)] = 8
    """Looks that make the recent level and noise of a loss: of training steps, and of gate passes."""
    divergence_factor: Annotated[float, msgspec.Meta(gt=1.0)] = 3.0
    """A loss above so many times its recent level has diverged; a noisy one at the square of it at the latest."""
    max_rollbacks: NonNegative = 4
    """Rollbacks in one run; the next catastrophe ends the job."""
    action: Literal["cull", "cut_rate"] = "cull"
    """First remedy after a rollback: ``cull`` the living seeds (the rate is cut when there are none, or it was in vain), or
    ``cut_rate`` and spare them."""
    rate_cut: Share = 0.5
    """What a cut multiplies the learning rate with, for the rest of the run."""


class Split(Section, frozen=True, kw_only=True):
    """``[split]``: how one set is divided when the data names no splits. Where it names train and audit only, gate is taken from
    train.
    """

    gate: Share = 0.2
    """Share of the samples that gates and the policy look at."""
    audit: Share = 0.2
    """Share of the samples that is read once, at the end."""
    seed: int = 0
    """Seed of the permutation; independent of the job's ``rng_seed`` so that RNG seeds share splits. A text is not permuted:
    train, gate and audit follow one another."""
    allow_duplicates: bool = False
    """Train although a sample of one split (input and target) also stands in another. Holds for every form of data."""


class Export(Section, frozen=True, kw_only=True):
    """``[export]``: where a copy of the grown model is written at the end of the job."""

    directory: str | None = None
    """Relative to ``workdir``; made when the job starts, which fails when it cannot be written. The model is kept in the
    daemon's store whether or not this is set: a copy that fails at the end is told by the event ``ExportFailed``, and the job
    succeeds."""


class Job(Section, frozen=True, kw_only=True):
    """One training job: what to train, on what, how to grow it, and when to stop."""

    host: str
    """Name of a registered host, or ``module:function`` importable from ``workdir``, returning an ``nn.Module``."""
    data: str
    """Name of a registered data set (built in: ``digits``, ``text``, ``idx``, ``cifar``; see ``docs/models.md``), a path to an
    ``.npz`` file, or ``module:function``."""
    name: str = ""
    """For people; need not be unique."""
    host_options: dict[str, Any] = {}
    """Keyword arguments of the host's function."""
    data_options: dict[str, Any] = {}
    """Keyword arguments of the data's function."""
    loss: str = "cross_entropy"
    """``cross_entropy``, ``next_token`` (of (B, T, V) logits, for the (B, T) tokens that follow), ``mse``, or ``module:function``
    taking (output, target), returning one loss per sample."""
    metric: str | None = None
    """``accuracy``, ``token_accuracy``, or ``module:function`` taking (output, target), returning one value per sample. Default:
    accuracy for cross_entropy, token_accuracy for next_token, none otherwise."""
    batch_size: Positive = 64
    """Samples a training step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the network trains."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of training passes: ``bfloat16`` and ``float16`` are mixed precision (autocast), the latter with a gradient scaler."""
    compile: bool = False
    """Training passes run through ``torch.compile``, which needs a C++ compiler (on CUDA: Triton) and makes resume inexact; see
    ``docs/growth.md``."""
    threads: Positive = 1
    """Intra-op threads of the worker. More than one makes resume inexact on some operations."""
    rng_seed: NonNegative = 0
    """Of the host's weights, the order of samples, seeds' weights and the policy's draws."""
    workdir: str = "."
    """Where the user's modules and relative paths are found; made absolute by the client."""
    python: str = ""
    """Interpreter the worker runs under; empty: the daemon's own."""
    control: bool = False
    """Also train the same host without growth for the same FLOPs, to say whether growing paid."""
    checkpoint_every_s: Annotated[float, msgspec.Meta(ge=0.0)] = 5.0
    """Least time between checkpoints that are taken at the end of an epoch; 0: after every epoch."""
    checkpoint_mid_epoch_s: Annotated[float, msgspec.Meta(ge=0.0)] = 600.0
    """Longest time without a checkpoint: after it one is taken in the middle of an epoch, after a whole step. It is about
    twice as large as one at an epoch's end: it also holds what the governor would go back to."""
    checkpoint_every_steps: NonNegative = 0
    """Also take a checkpoint in mid-epoch whenever the job's steps are a multiple of this; 0: never because of steps."""
    budget: Budget
    resources: Resources = Resources()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    split: Split = Split()
    slots: Slots = Slots()
    growth: Growth = Growth()
    policy: PolicySettings = PolicySettings()
    gates: Gates = Gates()
    governor: Governor = Governor()
    export: Export = Export()


class JobState(enum.StrEnum):
    """Where a job stands. Values are stored on disk."""

    QUEUED = "queued"
    LEASED = "leased"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD = "dead"


JOB_TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.LEASED, JobState.PAUSED, JobState.CANCELLED}),
        JobState.LEASED: frozenset(
            {JobState.RUNNING, JobState.QUEUED, JobState.PAUSED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD}
        ),
        JobState.RUNNING: frozenset(
            {
                JobState.SUCCEEDED,
                JobState.FAILED,
                JobState.CANCELLED,
                JobState.PAUSED,
                JobState.QUEUED,
                JobState.DEAD,
            }
        ),
        JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELLED}),
        JobState.SUCCEEDED: frozenset(),
        JobState.FAILED: frozenset({JobState.QUEUED}),
        JobState.CANCELLED: frozenset(),
        JobState.DEAD: frozenset({JobState.QUEUED}),
    }
)
"""LEASED or RUNNING → QUEUED is a lost worker (the job waits for its next attempt) or a drain. FAILED or DEAD →
QUEUED: a person asked for another try."""

FINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD})


class JobError(Value, frozen=True, kw_only=True):
    """Why a job failed: a code of :mod:`esperd.errors`, the message, and the traceback where there was one."""

    code: str
    message: str
    traceback: str = ""


class Peak(Value, frozen=True, kw_only=True):
    """The most memory a worker held. None: not measured."""

    memory_bytes: int | None = None
    gpu_bytes: int | None = None


class JobInfo(Reply, frozen=True, kw_only=True):
    """A job as the daemon knows it."""

    id: str
    name: str
    state: JobState
    attempt: int
    """Leases given so far."""
    submitted_at: float
    """Seconds since the epoch."""
    started_at: float | None = None
    finished_at: float | None = None
    retry_at: float | None = None
    """When a lost job is tried again; None when it waits for a free worker only."""
    epoch: int | None = None
    """Epochs completed, as of the last checkpoint."""
    checkpoint: str | None = None
    """SHA-256 of the last checkpoint; None before the first, and when the job succeeded or was cancelled: it is deleted then."""
    previous_checkpoint: str | None = None
    """SHA-256 of the one before, which the job goes back to when the last one does not verify; or of a newer one, which could
    not be read when the job went back."""
    previous_epoch: int | None = None
    """Epochs completed as of that one."""
    error: JobError | None = None
    waits_for: str = ""
    """What a queued job waits for, where it does not fit beside those that run; empty: a free worker, or nothing."""
    card: str = ""
    """The GPU that its worker was given; empty: none, or it does not run."""
    peak: Peak = Peak()
    """The most memory its workers held."""
    pieces: int = 1
    """Parts in which each batch is trained, since memory ran out."""
    job: Job


class Artifact(Value, frozen=True, kw_only=True):
    """A file a job left in the store."""

    name: str
    """``model.safetensors``, ``growth.json``, ``report.json`` or ``README.md``."""
    sha256: str
    size_bytes: int


# --- between a client and the daemon -------------------------------------------------------------------------------------


class SubmitJob(Message, frozen=True, kw_only=True):
    """Admit a job. Durable before it is acknowledged."""

    job: Job
    idempotency_key: str
    """The same key and the same job return the first job; the same key with another job is a ``conflict``."""


class JobSubmitted(Reply, frozen=True, kw_only=True):
    """The job is on disk and will run."""

    id: str
    duplicate: bool


class ListJobs(Message, frozen=True, kw_only=True):
    """All jobs, newest first."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MOST_LISTED)] = 100


class JobList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListJobs`."""

    jobs: tuple[JobInfo, ...]


class GetJob(Message, frozen=True, kw_only=True):
    """One job; answered by :class:`JobInfo`."""

    id: str


class PauseJob(Message, frozen=True, kw_only=True):
    """Checkpoint and stop, to be resumed later; answered by :class:`JobInfo` as soon as it is recorded."""

    id: str


class ResumeJob(Message, frozen=True, kw_only=True):
    """Queue a paused job again."""

    id: str


class CancelJob(Message, frozen=True, kw_only=True):
    """Stop a job for good."""

    id: str


class ListArtifacts(Message, frozen=True, kw_only=True):
    """What a finished job left in the store."""

    id: str


class ArtifactList(Reply, frozen=True, kw_only=True):
    """Answer to :class:`ListArtifacts`."""

    artifacts: tuple[Artifact, ...]


class FetchArtifact(Message, frozen=True, kw_only=True):
    """A piece of an artifact of a job."""

    id: str
    name: str
    offset: Annotated[int, msgspec.Meta(ge=0, le=LARGEST_INTEGER)] = 0


class ArtifactChunk(Reply, frozen=True, kw_only=True):
    """Up to 4 MiB from ``offset``; ``size_bytes`` is the whole file's."""

    offset: int
    data: bytes
    size_bytes: int
