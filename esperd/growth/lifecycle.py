"""The life of one seed as a pure state machine: events in, the next life and instructions out.

Nothing here trains, measures or touches a tensor. Time is counted in epochs: one ``EpochEnded`` per decision point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from esperd.errors import IllegalTransition
from esperd.messages.growth import TRANSITIONS, Stage, Verdict
from esperd.messages.jobs import Growth

LONGEST_STAY = 2
"""TRAINING, BLENDING and SHADOWING may last this many times their shortest stay; then the gate's refusal becomes a cull."""

RESTING_AT_TARGET = frozenset({Stage.SHADOWING, Stage.PROBATIONARY})
"""Stages in which alpha rests on its target and may be given another one."""

GATES: dict[Stage, str] = {
    Stage.GERMINATED: "G0",
    Stage.TRAINING: "G1",
    Stage.BLENDING: "G2",
    Stage.SHADOWING: "G3",
    Stage.PROBATIONARY: "G4",
    Stage.FOSSILIZED: "G5",
}
"""The gate through which each stage is entered."""


@dataclass(frozen=True, kw_only=True)
class Life:
    """Where a seed stands. ``reason`` says why it was culled or fossilized, or is being faded out."""

    stage: Stage = Stage.DORMANT
    epochs_in_stage: int = 0
    reason: str = ""
    leaving: bool = False
    """BLENDING toward alpha 0: when alpha is there the seed is culled."""


@dataclass(frozen=True)
class Germinate:
    """A decision placed the seed at its slot."""


@dataclass(frozen=True)
class Placed:
    """The germinated seed stands at its slot and was probed."""


@dataclass(frozen=True)
class EpochEnded:
    """An epoch passed."""


@dataclass(frozen=True)
class GateAnswered:
    """The gate that a :class:`CheckGate` asked for gave its verdict."""

    verdict: Verdict


@dataclass(frozen=True)
class FossilizeRequested:
    """A decision wants the seed to become permanent."""

    reason: str


@dataclass(frozen=True)
class CullRequested:
    """A decision, or something that went wrong, wants the seed removed."""

    reason: str


@dataclass(frozen=True)
class RetargetRequested:
    """A decision wants another share of the seed's output; 0 is its scheduled removal."""

    target: float
    reason: str


Occurrence = Germinate | Placed | EpochEnded | GateAnswered | FossilizeRequested | CullRequested | RetargetRequested


@dataclass(frozen=True)
class CheckGate:
    """Evaluate this gate and answer with :class:`GateAnswered`."""

    gate: str


@dataclass(frozen=True)
class Entered:
    """The seed moved to another stage; do what that stage asks."""

    before: Stage
    after: Stage
    reason: str


@dataclass(frozen=True)
class Refused:
    """A request was not followed; the seed stays where it is."""

    reason: str


Instruction = CheckGate | Entered | Refused


def shortest_life(durations: Growth, *, screened: bool = False) -> int:
    """Epochs from germination to the first possible verdict on a seed; with those of a screening, where it was ``screened``."""
    blending = 0 if durations.incubation == "joint" else durations.blending_epochs
    return durations.screening_epochs * screened + durations.incubation_epochs + max(blending, 1) + durations.shadowing_epochs + 1


def advance(life: Life, occurrence: Occurrence, durations: Growth) -> tuple[Life, list[Instruction]]:
    """What becomes of a seed.

    Args:
        life: where it stands.
        occurrence: what happened.
        durations: how long stages last.

    Returns:
        The next life, and what the caller must do about it, in order.

    Raises:
        IllegalTransition: when the event asks for a move that the table does not allow.
    """
    match occurrence:
        case Germinate():
            if life.stage is not Stage.DORMANT:
                raise IllegalTransition(f"a seed can only germinate from dormant, not from {life.stage}", stage=life.stage)
            return _check(life, Stage.GERMINATED)
        case Placed():
            if life.stage is not Stage.GERMINATED:
                raise IllegalTransition(f"only a germinated seed can be placed, not a {life.stage} one", stage=life.stage)
            return _check(life, Stage.TRAINING)
        case EpochEnded():
            return _epoch_ended(replace(life, epochs_in_stage=life.epochs_in_stage + 1), durations)
        case GateAnswered(verdict):
            return _gate_answered(life, verdict, durations)
        case FossilizeRequested(reason):
            if Stage.FOSSILIZED not in TRANSITIONS[life.stage]:
                raise IllegalTransition(f"a {life.stage} seed cannot be fossilized", stage=life.stage)
            return replace(life, reason=reason), [CheckGate(GATES[Stage.FOSSILIZED])]
        case CullRequested(reason):
            return _enter(life, Stage.CULLED, reason)
        case RetargetRequested(target, reason):
            if life.stage not in RESTING_AT_TARGET:
                raise IllegalTransition(f"the alpha of a {life.stage} seed cannot be retargeted", stage=life.stage)
            blending, entered = _enter(life, Stage.BLENDING, reason)
            return replace(blending, leaving=target == 0.0, reason=reason if target == 0.0 else ""), entered


def _enter(life: Life, stage: Stage, reason: str) -> tuple[Life, list[Instruction]]:
    if stage not in TRANSITIONS[life.stage]:
        raise IllegalTransition(f"a seed cannot go from {life.stage} to {stage}", before=life.stage, after=stage)
    kept = reason if stage in (Stage.CULLED, Stage.FOSSILIZED) else life.reason
    return Life(stage=stage, reason=kept), [Entered(life.stage, stage, reason)]


def _check(life: Life, stage: Stage) -> tuple[Life, list[Instruction]]:
    return life, [CheckGate(GATES[stage])]


def _epoch_ended(life: Life, durations: Growth) -> tuple[Life, list[Instruction]]:
    stay = life.epochs_in_stage
    match life.stage:
        case Stage.TRAINING if stay >= durations.incubation_epochs:
            return _check(life, Stage.BLENDING)
        case Stage.BLENDING:
            return _check(life, Stage.SHADOWING)
        case Stage.SHADOWING if stay >= durations.shadowing_epochs:
            return _check(life, Stage.PROBATIONARY)
        case Stage.PROBATIONARY if stay > durations.probation_epochs:
            return _enter(life, Stage.CULLED, f"timeout: undecided after {stay} epochs of probation")
        case Stage.CULLED:
            embargoed, entered = _enter(life, Stage.EMBARGOED, "the slot rests")
            if durations.embargo_epochs > 0:
                return embargoed, entered
            resetting, more = _enter(embargoed, Stage.RESETTING, "no embargo")
            return resetting, entered + more
        case Stage.EMBARGOED if stay >= durations.embargo_epochs:
            return _enter(life, Stage.RESETTING, "embargo over")
        case Stage.RESETTING if stay >= durations.resetting_epochs:
            return _enter(life, Stage.DORMANT, "the slot is free")
    return life, []


def _gate_answered(life: Life, verdict: Verdict, durations: Growth) -> tuple[Life, list[Instruction]]:
    stage = next((stage for stage, gate in GATES.items() if gate == verdict.gate), None)
    if stage is None or stage not in TRANSITIONS[life.stage]:
        raise IllegalTransition(f"gate {verdict.gate} has nothing to say about a {life.stage} seed", gate=verdict.gate)
    if verdict.passed and life.leaving:
        return _enter(life, Stage.CULLED, life.reason)
    if verdict.passed:
        return _enter(life, stage, life.reason if stage is Stage.FOSSILIZED else verdict.reason)
    refusal = f"{verdict.gate}: {verdict.reason}"
    limits = {
        Stage.TRAINING: durations.incubation_epochs,
        Stage.BLENDING: durations.blending_epochs,
        Stage.SHADOWING: durations.shadowing_epochs,
    }
    match life.stage:
        case Stage.DORMANT:
            return life, [Refused(refusal)]
        case Stage.GERMINATED:
            return _enter(life, Stage.CULLED, refusal)
        case Stage.TRAINING | Stage.BLENDING | Stage.SHADOWING if life.epochs_in_stage >= LONGEST_STAY * limits[life.stage]:
            return _enter(life, Stage.CULLED, refusal)
    return (life if life.leaving else replace(life, reason="")), [Refused(refusal)]
