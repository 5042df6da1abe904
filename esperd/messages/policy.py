"""What trainer and policy say to each other: an observation in, decisions with their reasons out.

The policy keeps nothing between two decisions of a job: ``state`` travels with the job's checkpoint. That makes a decision
a pure function of the request, so a restarted policy continues where the job stands and a resumed job replays.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from esperd.messages.base import Message, Reply, Value
from esperd.messages.evidence import EvidenceSnapshot, Precedent
from esperd.messages.growth import SeedRecord, SlotRecord, Trial
from esperd.messages.reports import SeedOutcome


class Arm(Value, frozen=True, kw_only=True, order=True):
    """One thing that could be grown: this blueprint at this slot."""

    slot: str
    blueprint: str


class ArmOption(Value, frozen=True, kw_only=True):
    """An arm with its measured price."""

    arm: Arm
    parameters: int
    flops_per_sample: float
    """Forward FLOPs for one sample."""
    seconds_share: float | None = None
    """Forward seconds of a seed of this arm over the host's, as measured when one last germinated; None: none was measured."""
    available: bool
    why_not: str = ""
    """Why it may not be germinated now (slot taken, embargoed, over a budget, its blueprint does not import); empty when
    available."""


class ArmMerit(Value, frozen=True, kw_only=True):
    """The gradient merit of an arm, measured before anything is grown."""

    arm: Arm
    norm: float | None
    """L2 norm of the mean gradient that a newborn seed of this arm receives; None when the arm could not be grown."""
    batches: int
    """Over which the gradient was averaged."""
    epoch: int
    why_not: str = ""
    """Why there is no norm; empty when there is one."""


class ArmTrial(Value, frozen=True, kw_only=True):
    """How an arm did in a contest: the network with it against the network as it is, both trained for the same FLOPs from one
    state, before anything is grown.
    """

    arm: Arm
    epochs: float
    """What each contender was allowed, in epochs of the network as it is."""
    trial: Trial | None
    """None when the arm could not be grown, or diverged."""
    epoch: int
    why_not: str = ""
    """Why there is no trial; empty when there is one."""


class PolicySettings(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[policy]``: how it is decided what to grow; see ``docs/policy.md``."""

    strategy: str = "gradient_merit"
    """Name of a registered strategy."""
    exploration: Annotated[float, msgspec.Meta(ge=0.0)] = 0.5
    """How much is tried that does not look best, in units of the reward's spread; which strategy reads it, and how, is in
    ``docs/policy.md``. Chosen, not measured."""
    discount: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.95
    """``discounted_ucb`` only: what a try still counts for when one more is known; 1: evidence never fades. Chosen, not
    measured."""
    temperature: Annotated[float, msgspec.Meta(gt=0.0)] = 0.5
    """``softmax`` only: how evenly it draws, in units of the reward's spread; towards 0 the best mean is always drawn. Chosen,
    not measured."""
    rent_parameters: Annotated[float, msgspec.Meta(ge=0.0)] = 0.02
    """Loss a seed must save per unit of added parameters / host parameters; chosen, not measured."""
    rent_flops: Annotated[float, msgspec.Meta(ge=0.0)] = 0.02
    """Loss a seed must save per unit of added FLOPs / host FLOPs; chosen, not measured."""
    rent_seconds: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0
    """Loss a seed must save per unit of its forward seconds / the host's, as measured when a seed of its arm germinates; before
    that the price is not known and not charged. Above 0 the job cannot be resumed bit-identically: clocks do not repeat."""
    warmup_epochs: Annotated[int, msgspec.Meta(ge=0)] = 2
    """Epochs before the first germination."""
    trigger: str = "always"
    """Name of a registered trigger: when something may be grown at all."""
    plateau_window: Annotated[int, msgspec.Meta(ge=1)] = 3
    """``plateau``: latest gate losses whose best is held against the best before them. Of the order of AutoGrow's K = 3
    (arXiv:1906.02909)."""
    plateau_improvement: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.01
    """``plateau``: it begins when the gate loss improves by less than this share of itself. Chosen, not measured."""
    plateau_release: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.02
    """``plateau``: it ends when the gate loss improves by more than this share; at least ``plateau_improvement``. Chosen, not
    measured."""
    plateau_looks: Annotated[int, msgspec.Meta(ge=1)] = 2
    """``plateau``: looks in a row that must show it before it begins. Chosen, not measured."""
    period: Annotated[int, msgspec.Meta(ge=1)] = 3
    """``periodic``: epochs from one time to grow to the next; AutoGrow's K = 3 (arXiv:1906.02909)."""
    gap_centre: Annotated[float, msgspec.Meta(gt=0.0)] = 0.2
    """``generalisation_gap``: gate loss over train loss, minus 1, at which the interval is half of ``gap_longest``. Chosen, not
    measured."""
    gap_longest: Annotated[int, msgspec.Meta(ge=1)] = 8
    """``generalisation_gap``: epochs from one time to grow to the next when the gap is large. Chosen, not measured."""
    bottleneck_ratio: Annotated[float, msgspec.Meta(ge=1.0)] = 2.0
    """``gradient_bottleneck``: it fires when the gradient at one slot is this many times the median of the others. Chosen, not
    measured."""
    stop_rule: bool = True
    """Whether an arm is left out while it promises less per FLOP than training on, and nothing grown while all do; see
    ``docs/policy.md``."""
    stop_window: Annotated[int, msgspec.Meta(ge=3)] = 5
    """Latest gate losses from which ``stop_rule`` reads what training on brings. Chosen, not measured."""
    min_free_memory: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of the memory (of the device; on a CPU of the machine, or of what its control group may use) that must be free
    for anything to be grown. 0: not looked at."""
    latest_germination: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.6
    """Share of the budget after which nothing is germinated: what is grown late cannot learn any more under a falling
    learning rate, and its incubation is paid for nothing. Chosen, not measured."""
    max_live_seeds: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Seeds that may live (germinated to probationary) at one time; the candidates of one screening count as one."""
    max_fossilized: Annotated[int, msgspec.Meta(ge=0)] = 8
    """Seeds kept at most."""
    nursery: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Arms that are screened at once when something is to be grown; 1: none is, the best arm is grown."""
    patience: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Contribution measurements after which an undecided probationary seed is culled."""
    merit_batches: Annotated[int, msgspec.Meta(ge=1)] = 4
    """``gradient_merit``, ``merit_per_parameter`` and ``successive_halving``: batches that a gradient merit is averaged over at
    most; fewer, or fewer arms, where gauging would take more than a twentieth of the job. Chosen, not measured."""
    contenders: Annotated[int, msgspec.Meta(ge=2)] = 8
    """``successive_halving`` only: arms that enter a contest, those of the highest gradient merit. Chosen, not measured."""
    contest_share: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.15
    """``successive_halving`` only: share of the epochs left that the contest may take. Chosen, not measured."""
    approve: bool = False
    """What the policy wants to do to the structure is proposed to people, and done once one of them approves; training goes on
    meanwhile. See "Overruling" in ``docs/policy.md``."""
    memory: bool = False
    """Whether arms never tried in this job are judged by what earlier jobs learned about their blueprints. Off: that it pays is
    not measured on real networks yet."""
    min_share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """Least exploration: available arms come before every other, whatever the strategy says of them, in time for each to be tried
    as often as this share of an equal part of all tries. 0: none is guaranteed."""


class SlotStatistics(Value, frozen=True, kw_only=True):
    """What was measured at one slot in training steps since the last decision point. None: not measured."""

    slot: str
    gradient: float | None = None
    """Norm of the loss's gradient at what leaves the slot, of one sample: root of the mean square over the samples of a batch,
    mean over the sampled steps."""
    steps: int = 0
    """Sampled steps behind :attr:`gradient`."""
    activation_bytes: int | None = None
    """Bytes of what leaves the slot, for one sample."""
    seconds: float | None = None
    """Forward seconds of the host module whose output the slot is, for one batch, mean over the sampled steps."""


class Headroom(Value, frozen=True, kw_only=True):
    """Memory as measured at a decision point."""

    where: str
    """``cuda``, ``machine``, or ``cgroup`` where a control group leaves less than the machine has."""
    free_bytes: int
    total_bytes: int


class Observation(Value, frozen=True, kw_only=True):
    """What the trainer measured at one decision point. Everything comes from the train and gate splits."""

    epoch: int
    """Epochs completed."""
    progress: float
    """Share of the budget that is spent, 0 to 1 (the largest share over the budget's limits)."""
    epochs_left: float | None
    """Epochs the budget still allows at the current cost, which is estimated where the network has not been trained as it is:
    seeds may have changed stages since; of seconds as many as they allow at the time that an epoch takes. None while that is not
    known."""
    epochs_left_by_cost: float | None = None
    """What the limits on FLOPs and seconds allow of them: fewer, once a seed makes epochs dearer. None where neither is set, or
    not known yet."""
    shortest_life_epochs: int
    """Epochs a seed needs from germination to a first verdict."""
    train_loss: float
    gate_loss: float
    gate_metric: float | None
    gate_losses: tuple[float, ...]
    """Gate loss after every epoch so far, oldest first."""
    host_parameters: int
    host_flops_per_sample: float
    seeds: tuple[SeedRecord, ...]
    slots: tuple[SlotRecord, ...]
    options: tuple[ArmOption, ...]
    screened_out: tuple[SeedRecord, ...] = ()
    """Candidates that lost a screening since the last answer that was heard, as they ended. They are not among :attr:`seeds`:
    their slots do not rest."""
    unavailable: tuple[Arm, ...] = ()
    """Arms whose latest germination failed because the kernel could not be provided: nothing was learned about them."""
    merits: tuple[ArmMerit, ...] = ()
    """What the last answer asked to be measured by ``gauge``; empty when it asked for none."""
    trials: tuple[ArmTrial, ...] = ()
    """What the last answer asked to be measured by ``try``; empty when it asked for none."""
    train_losses: tuple[float, ...] = ()
    """Mean training loss of every epoch so far, oldest first; as many as :attr:`gate_losses`."""
    steps_per_epoch: int | None = None
    """Optimiser steps of an epoch; None: not told."""
    gate_pass_epochs: float | None = None
    """FLOPs of one pass of the network over the gate split, in epochs of training it; None: not told."""
    gate_flops: tuple[float, ...] = ()
    """Training FLOPs spent, everything charged, when each of :attr:`gate_losses` was measured."""
    trial_flops: tuple[float, ...] = ()
    """Those of :attr:`gate_flops` that went into copies of the network: gradient merits, contests and controlled trials. Fewer
    than there are losses, of the latest, where the job was begun by an esperd that did not count them."""
    slot_statistics: tuple[SlotStatistics, ...] = ()
    """One for each slot that was sampled; empty where none could be."""
    headroom: Headroom | None = None
    """Free memory; None where it cannot be measured."""
    rolled_back: tuple[str, ...] = ()
    """Catastrophes since the last decision point, in words: what was seen, and how far the network went back. Seeds that were
    culled for one say so in their outcome."""


class Alternative(Value, frozen=True, kw_only=True):
    """Something a decision could have been, with its score (None: never tried)."""

    arm: Arm
    score: float | None
    pulls: int


class Decision(Value, frozen=True, kw_only=True):
    """One act of the policy. ``action`` names a registered surgery operation; or it is ``wait``; or ``gauge`` or ``try``, which
    measure an arm that is not grown: the network stays as it is, and the policy is asked again, at once, with what was found.
    """

    action: str
    reason: str
    seed: str | None = None
    """For acts on a living seed (``fossilize``, ``cull``)."""
    arm: Arm | None = None
    """For ``germinate``, ``gauge`` and ``try``; and for a ``wait`` that declined an arm: the arm it refused."""
    screening: str = ""
    """For ``germinate``: the seed is a candidate of this screening, together with others of the same name; only the best goes
    on."""
    alpha: float | None = None
    """For ``set_alpha``: the share of the seed's output that is to flow; 0 removes it once it has faded out."""
    batches: int | None = None
    """For ``gauge``: batches that the arm's gradient is averaged over."""
    epochs: float | None = None
    """For ``try``: what each contender may spend, in epochs of the network as it is. All arms that one answer tries for the same
    length compete in one contest."""
    score: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    by: str = ""
    """The person who decided so; empty: the strategy."""
    proposes: str = ""
    """For ``wait``: the action that awaits a person's approval; empty: none does."""


class Signal(Value, frozen=True, kw_only=True):
    """What a trigger says at a decision point."""

    fires: bool
    """Whether this is a time to grow."""
    reason: str
    """Why, in numbers."""


class Decide(Message, frozen=True, kw_only=True):
    """Ask the policy what to do at a decision point."""

    job: str
    point: int
    """Number of the decision point in the job, counted from 1; it never comes twice, also where training went back."""
    rng_seed: int
    settings: PolicySettings
    observation: Observation
    signal: Signal | None = None
    """What the trigger of the settings says; the policy actor asks it before the strategy. None: it was not asked yet."""
    state: bytes = b""
    """What the last answer for this job returned; empty at the first decision."""
    heard: int | None = None
    """Number of the point whose answer that was, the last that the trainer heard; 0: it heard none yet. An answer that came too
    late is none of these, and one from which training went back is none any more. None: not told."""
    evidence: tuple[Precedent, ...] = ()
    """What other jobs learned; the policy actor adds it, where the settings ask for it."""
    given: EvidenceSnapshot | None = None
    """Of which snapshot ``evidence`` is; None: of none."""


class Decided(Reply, frozen=True, kw_only=True):
    """The policy's answer."""

    decisions: tuple[Decision, ...]
    state: bytes
    replayed: bool = False
    """True when the answer was read from the decision log instead of being decided again."""
    evidence: EvidenceSnapshot | None = None
    """What the decisions had of other jobs' experience; None: nothing, the settings do not ask for it."""


class Conclude(Message, frozen=True, kw_only=True):
    """Tell the policy how the seeds ended when no decision point is to come that would; said again, it is heard once."""

    job: str
    point: int
    """The last decision point."""
    epoch: int
    """Epochs completed."""
    seeds: tuple[SeedOutcome, ...]
    """Every seed that was kept or culled. What still lives is gone with the budget: nothing was found out about its arm."""
