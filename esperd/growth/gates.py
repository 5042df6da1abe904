"""The gates: pure checks of evidence. What was never measured fails; a number near its threshold says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from esperd.declarations import Gate, resolve
from esperd.growth.lifecycle import GATES
from esperd.messages.growth import Contribution, Stage, Trial, Verdict
from esperd.messages.jobs import Gates, Thresholds

NEAR = 0.1
"""A number within this share of its threshold is near it; the end of an interval, within this share of the interval's width."""

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
    activation_bytes: float | None = None
    """What its module keeps for the backward pass, for one sample; no gate asks for it."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything gates may look at. None means it was never measured."""

    blueprint: str
    slot: str
    epoch: int
    unfit: str = ""
    """Why blueprint and slot do not go together; empty when they do."""
    slot_free: bool = True
    probe: Probe | None = None
    gradient_ratio: float | None = None
    vanished_share: float | None = None
    exploded_share: float | None = None
    host_learns: bool = True
    """Whether the host trains while the seed incubates; one that stands still has no gradient to compare with."""
    isolated: bool = True
    """Whether the seed trains behind the host, so that switching it on would change the network."""
    prospect: Contribution | None = None
    """What the network would gain on the gate split were the seed switched on at its target alpha now."""
    gate_loss: float | None = None
    """Loss of the network as it is, on the gate split."""
    alpha: float = 0.0
    alpha_target: float = 1.0
    alpha_at_rest: bool = False
    gate_losses: tuple[float, ...] = ()
    """Gate loss when the seed reached its target alpha, and after every epoch since."""
    contribution: Contribution | None = None
    trial: Trial | None = None


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
    rise, prospect = None, evidence.prospect
    if evidence.isolated and prospect is not None and prospect.epoch == evidence.epoch and evidence.gate_loss is not None:
        rise = _relative_rise(evidence.gate_loss, evidence.gate_loss - prospect.loss)
    ratio, vanished, exploded = evidence.gradient_ratio, evidence.vanished_share, evidence.exploded_share
    numbers = {
        "gradient_ratio": ratio,
        "min_gradient_ratio": settings.min_gradient_ratio,
        "vanished_share": vanished,
        "exploded_share": exploded,
        "switched_on_rise": rise,
        "max_loss_drift": settings.max_loss_drift,
    }
    near = (
        _near(ratio, settings.min_gradient_ratio)
        or _near(vanished, settings.max_vanished_share)
        or _near(exploded, settings.max_exploded_share)
        or _near(rise, settings.max_loss_drift)
    )
    if vanished is None or exploded is None or (ratio is None and evidence.host_learns):
        reason, passed = "its gradients were never measured", False
    elif evidence.isolated and rise is None:
        reason, passed = "the network with it switched on was not measured at this decision point", False
    elif ratio is not None and not ratio >= settings.min_gradient_ratio:  # also when it is not a number
        reason, passed = f"gradient ratio {ratio:.3g} is below {settings.min_gradient_ratio:.3g}", False
    elif not vanished <= settings.max_vanished_share:
        reason, passed = f"{vanished:.0%} of its gradients have vanished", False
    elif not exploded <= settings.max_exploded_share:
        reason, passed = f"{exploded:.0%} of its gradients have exploded", False
    elif rise is not None and not rise <= settings.max_loss_drift:
        reason, passed = f"switched on it would raise the loss by {rise:.0%}", False
    else:
        learns = "the host stands still" if ratio is None else f"gradient ratio {ratio:.3g}"
        change = "" if rise is None else f", switched on the loss would change by {rise:+.1%}"
        reason, passed = f"{learns}{change}", True
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
    """G5: what the job asks for as proof, measured at this decision point, with its interval above the threshold."""
    what = settings.proof
    measured: Contribution | Trial | None = evidence.trial if what == "trial" else evidence.contribution
    if measured is None or measured.epoch != evidence.epoch:
        return Verdict(gate="G5", passed=False, reason=f"its {what} was not measured at this decision point")
    numbers: dict[str, float | None] = {
        what: measured.loss,
        "lower": measured.lower,
        "upper": measured.upper,
        "samples": measured.samples,
        "min_contribution": settings.min_contribution,
    }
    interval = f"{measured.loss:+.4f} [{measured.lower:+.4f}, {measured.upper:+.4f}]"
    if measured.samples < SMALLEST_GATE_SAMPLE:
        reason, passed = f"{measured.samples} samples are too few, {SMALLEST_GATE_SAMPLE} are needed", False
    elif not measured.lower > settings.min_contribution:
        reason, passed = f"{what} {interval} is not above {settings.min_contribution:g}", False
    else:
        reason, passed = f"{what} {interval}", True
    # the threshold is 0 unless the job says otherwise: what is near it follows from how wide the interval is
    near = abs(measured.lower - settings.min_contribution) <= NEAR * (measured.upper - measured.lower)
    return Verdict(gate="G5", passed=passed, reason=reason, near=near, numbers=numbers)


def thresholds(settings: Gates, topology: str, blueprint: str, declared: float | None) -> Gates:
    """The thresholds that hold for one seed: the job's, the blueprint's own ``min_gradient_ratio`` where it declares one, then
    what the job says for the topology, then what it says for the blueprint.

    Args:
        settings: the job's.
        topology: of the slot.
        blueprint: name.
        declared: the blueprint's ``min_gradient_ratio``.
    """
    for_topology = next((said for name, said in settings.topologies.items() if name == topology), None)
    said = [Thresholds(min_gradient_ratio=declared), for_topology, settings.blueprints.get(blueprint)]
    chosen = {
        name: value
        for other in said
        if other is not None
        for name, value in msgspec.structs.asdict(other).items()
        if value is not None
    }
    return msgspec.structs.replace(settings, **chosen)
