"""The gates: pure checks of evidence. What was never measured fails; a number near its threshold says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from esperd.declarations import Gate, resolve
from esperd.growth.lifecycle import GATES
from esperd.messages.growth import Contribution, Stage, Verdict
from esperd.messages.jobs import Gates

NEAR = 0.1
"""A number within this share of its threshold is near it."""

LARGEST_VANISHED_SHARE = 0.5
"""G2: most parameter tensors of a healthy seed receive a gradient. Chosen, not measured."""

LARGEST_BIRTH_ERROR = 1e-4
"""G1, joint incubation: how far from the identity a seed may start, relative. Chosen, not measured."""

SMALLEST_LOSS = 1e-6
"""Losses below this size count as this large when a rise is put in relation to them. Chosen, not measured."""

SMALLEST_GATE_SAMPLE = 30
"""G5: pairs below which a t interval of per-sample losses is not trusted. Chosen, not measured."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What three steps of a freshly germinated seed showed, on real activations. The seed is put back afterwards."""

    shape_kept: bool
    dtype_kept: bool
    device_kept: bool
    finite: bool
    identity_error: float
    """Largest difference the seed makes at alpha 0."""
    birth_error: float
    """Largest difference it would make at alpha 1, relative to 1 + the largest of what flows by."""
    tensors: int
    """Parameter tensors of the seed."""
    tensors_with_gradient_first: int
    tensors_with_gradient_third: int
    """Of them, how many had received a non-zero gradient by the first and by the third step."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything gates may look at. None means it was never measured."""

    blueprint: str
    slot: str
    epoch: int
    min_gradient_ratio: float | None = None
    """The blueprint's own threshold for G2; None: the job's."""
    unfit: str = ""
    """Why blueprint and slot do not go together; empty when they do."""
    slot_free: bool = True
    probe: Probe | None = None
    gradient_ratio: float | None = None
    vanished_share: float | None = None
    incubation_loss: float | None = None
    """Mean lookahead loss of the last epoch, with the seed at its target alpha."""
    train_loss: float | None = None
    """Mean loss of the last epoch, with the seed at its alpha."""
    isolated: bool = True
    """Whether the seed trains behind the host, so that its lookahead loss says something of its own."""
    alpha: float = 0.0
    alpha_target: float = 1.0
    alpha_at_rest: bool = False
    gate_losses: tuple[float, ...] = ()
    """Gate loss when the seed reached its target alpha, and after every epoch since."""
    contribution: Contribution | None = None


GateCheck = Callable[[Evidence, Gates], Verdict]


def gate_checks(declared: Iterable[Gate]) -> dict[str, GateCheck]:
    """What is asked at G0 to G5: the gate itself, then every further one that guards the same stage.

    Raises:
        ImportFailed: when a check cannot be imported.
    """
    checks = {gate: resolve(gate.check) for gate in declared}
    own = {gate.name: check for gate, check in checks.items() if gate.name in GATES.values()}
    further: dict[str, dict[str, GateCheck]] = {name: {} for name in own}
    for gate, check in checks.items():
        if gate.name not in own:
            further[GATES[Stage(gate.guards)]][gate.name] = check
    return {name: _joined(check, further[name]) if further[name] else check for name, check in own.items()}


def _joined(own: GateCheck, further: Mapping[str, GateCheck]) -> GateCheck:
    """One verdict over several gates: the first refusal counts, every number is kept."""

    def check(evidence: Evidence, settings: Gates) -> Verdict:
        verdict = own(evidence, settings)
        for name, other in further.items():
            added = other(evidence, settings)
            refused = verdict.passed and not added.passed
            verdict = msgspec.structs.replace(
                verdict,
                passed=verdict.passed and added.passed,
                reason=f"{name}: {added.reason}" if refused else verdict.reason,
                near=verdict.near or added.near,
                numbers={**verdict.numbers, **{f"{name}: {key}": number for key, number in added.numbers.items()}},
            )
        return verdict

    return check


def _near(value: float | None, threshold: float) -> bool:
    return value is not None and abs(value - threshold) <= NEAR * abs(threshold)


def _relative_rise(before: float, after: float) -> float:
    """How far a loss rose, relative to its size: positive is worse for losses below zero, too."""
    return (after - before) / max(abs(before), SMALLEST_LOSS)


def existence(evidence: Evidence, _settings: Gates) -> Verdict:
    """G0: blueprint and slot exist, go together, and the slot is free."""
    if evidence.unfit:
        return Verdict(gate="G0", passed=False, reason=evidence.unfit)
    if not evidence.slot_free:
        return Verdict(gate="G0", passed=False, reason=f"slot {evidence.slot} is taken or at rest")
    return Verdict(gate="G0", passed=True, reason=f"{evidence.blueprint} fits {evidence.slot}")


def fitness(evidence: Evidence, _settings: Gates) -> Verdict:
    """G1: shape, dtype and device kept, identity at alpha 0, a gradient at step 1 and everywhere by step 3."""
    probe = evidence.probe
    if probe is None:
        return Verdict(gate="G1", passed=False, reason="the seed was never probed")
    numbers: dict[str, float | None] = {
        "identity_error": probe.identity_error,
        "birth_error": probe.birth_error,
        "tensors": probe.tensors,
        "with_gradient_first": probe.tensors_with_gradient_first,
        "with_gradient_third": probe.tensors_with_gradient_third,
    }
    problems = [
        text
        for wrong, text in (
            (not probe.shape_kept, "it changes the slot's shape"),
            (not probe.dtype_kept, "it changes the slot's dtype"),
            (not probe.device_kept, "it answers on another device"),
            (not probe.finite, "its output is not finite"),
            (probe.identity_error != 0.0, f"it moves the host by {probe.identity_error:.2g} at alpha 0"),
            (
                not evidence.isolated and not probe.birth_error <= LARGEST_BIRTH_ERROR,
                f"it starts as no identity (off by {probe.birth_error:.2g}), and in joint incubation it is heard at once",
            ),
            (probe.tensors == 0, "it has no parameters"),
            (probe.tensors > 0 and probe.tensors_with_gradient_first == 0, "no parameter receives a gradient at step 1"),
            (
                probe.tensors_with_gradient_third < probe.tensors,
                f"only {probe.tensors_with_gradient_third} of {probe.tensors} parameter tensors learn by step 3",
            ),
        )
        if wrong
    ]
    reason = "; ".join(problems) or f"identity at alpha 0, all {probe.tensors} parameter tensors learn"
    return Verdict(gate="G1", passed=not problems, reason=reason, numbers=numbers)


def readiness(evidence: Evidence, settings: Gates) -> Verdict:
    """G2: the seed still learns, relative to its host, and would not harm the network at its target alpha."""
    threshold = settings.min_gradient_ratio if evidence.min_gradient_ratio is None else evidence.min_gradient_ratio
    rise = None
    if evidence.isolated and evidence.incubation_loss is not None and evidence.train_loss is not None:
        rise = _relative_rise(evidence.train_loss, evidence.incubation_loss)
    numbers = {
        "gradient_ratio": evidence.gradient_ratio,
        "min_gradient_ratio": threshold,
        "vanished_share": evidence.vanished_share,
        "lookahead_rise": rise,
    }
    near = _near(evidence.gradient_ratio, threshold)
    if evidence.gradient_ratio is None or evidence.vanished_share is None:
        reason, passed = "its gradients were never measured", False
    elif evidence.isolated and rise is None:
        reason, passed = "its lookahead loss was never measured", False
    elif not evidence.gradient_ratio >= threshold:  # also when it is not a number
        reason, passed = f"gradient ratio {evidence.gradient_ratio:.3g} is below {threshold:.3g}", False
    elif not evidence.vanished_share <= LARGEST_VANISHED_SHARE:
        reason, passed = f"{evidence.vanished_share:.0%} of its gradients have vanished", False
    elif rise is not None and not rise <= settings.max_loss_drift:
        reason, passed = f"switched on it would raise the loss by {rise:.0%}", False
    else:
        change = "" if rise is None else f", lookahead loss {rise:+.1%}"
        reason, passed = f"gradient ratio {evidence.gradient_ratio:.3g}{change}", True
    return Verdict(gate="G2", passed=passed, reason=reason, near=near, numbers=numbers)


def completion(evidence: Evidence, _settings: Gates) -> Verdict:
    """G3: alpha rests on its target."""
    complete = evidence.alpha_at_rest and evidence.alpha == evidence.alpha_target
    reason = f"alpha {evidence.alpha:.3g} of {evidence.alpha_target:.3g}"
    numbers: dict[str, float | None] = {"alpha": evidence.alpha, "alpha_target": evidence.alpha_target}
    return Verdict(gate="G3", passed=complete, reason=reason, numbers=numbers)


def stability(evidence: Evidence, settings: Gates) -> Verdict:
    """G4: over the shadowing window the gate loss neither drifts up nor spikes."""
    window = evidence.gate_losses
    if len(window) < 2:
        return Verdict(gate="G4", passed=False, reason="the gate loss was not measured over the window")
    if not all(math.isfinite(value) for value in window):
        return Verdict(gate="G4", passed=False, reason="the gate loss was not finite over the window")
    drift = _relative_rise(window[0], window[-1])
    spike = max(_relative_rise(before, after) for before, after in itertools.pairwise(window))
    numbers: dict[str, float | None] = {"drift": drift, "spike": spike}
    near = _near(drift, settings.max_loss_drift) or _near(spike, settings.max_loss_spike)
    if not drift <= settings.max_loss_drift:
        reason, passed = f"the gate loss drifted by {drift:+.0%} over {len(window) - 1} epochs", False
    elif not spike <= settings.max_loss_spike:
        reason, passed = f"the gate loss jumped by {spike:+.0%} in one epoch", False
    else:
        reason, passed = f"stable: drift {drift:+.1%}, largest jump {spike:+.1%}", True
    return Verdict(gate="G4", passed=passed, reason=reason, near=near, numbers=numbers)


def proof(evidence: Evidence, settings: Gates) -> Verdict:
    """G5: a fresh contribution whose interval lies above the threshold."""
    contribution = evidence.contribution
    if contribution is None or contribution.epoch != evidence.epoch:
        return Verdict(gate="G5", passed=False, reason="its contribution was not measured at this decision point")
    numbers: dict[str, float | None] = {
        "contribution": contribution.loss,
        "lower": contribution.lower,
        "upper": contribution.upper,
        "samples": contribution.samples,
        "min_contribution": settings.min_contribution,
    }
    interval = f"{contribution.loss:+.4f} [{contribution.lower:+.4f}, {contribution.upper:+.4f}]"
    if contribution.samples < SMALLEST_GATE_SAMPLE:
        reason, passed = f"{contribution.samples} samples are too few, {SMALLEST_GATE_SAMPLE} are needed", False
    elif not contribution.lower > settings.min_contribution:
        reason, passed = f"contribution {interval} is not above {settings.min_contribution:g}", False
    else:
        reason, passed = f"contribution {interval}", True
    near = _near(contribution.lower, settings.min_contribution)
    return Verdict(gate="G5", passed=passed, reason=reason, near=near, numbers=numbers)
