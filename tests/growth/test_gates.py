"""The gates: each reason to refuse is named, what was never measured is refused, and close calls are flagged."""

from __future__ import annotations

import dataclasses
import math
import re

import msgspec
import pytest

from esperd.declarations import GUARDED_STAGES, Gate
from esperd.growth.gates import (
    SMALLEST_GATE_SAMPLE,
    Evidence,
    Probe,
    completion,
    existence,
    fitness,
    gate_checks,
    proof,
    readiness,
    stability,
    thresholds,
)
from esperd.growth.lifecycle import GATES
from esperd.messages.growth import Contribution, Trial, Verdict
from esperd.messages.jobs import Gates, Thresholds
from esperd.plugins import load_plugins

SETTINGS = Gates(min_gradient_ratio=0.1, max_loss_drift=0.2, max_loss_spike=0.4, min_contribution=0.01)
PROBE = Probe(
    shape_kept=True,
    dtype_kept=True,
    device_kept=True,
    finite=True,
    identity_error=0.0,
    birth_error=0.0,
    tensors=4,
    tensors_with_gradient_first=1,
    tensors_with_gradient_third=4,
)
CONTRIBUTION = Contribution(loss=0.1, lower=0.05, upper=0.15, confidence=0.95, samples=100, epoch=7)
SOUND = Evidence(
    blueprint="norm",
    slot="stage1",
    epoch=7,
    probe=PROBE,
    gradient_ratio=0.5,
    vanished_share=0.0,
    exploded_share=0.0,
    prospect=Contribution(loss=0.0, lower=-0.1, upper=0.1, confidence=0.95, samples=100, epoch=7),
    gate_loss=1.0,
    alpha=1.0,
    alpha_at_rest=True,
    gate_losses=(1.0, 1.0, 0.9),
    contribution=CONTRIBUTION,
)
CHECKS = {"G0": existence, "G1": fitness, "G2": readiness, "G3": completion, "G4": stability, "G5": proof}
NAN = math.nan


def evidence(**changes) -> Evidence:
    return dataclasses.replace(SOUND, **changes)


def switched_on(to: float, before: float = 1.0) -> Evidence:
    """The gate loss would go from ``before`` to ``to``."""
    return evidence(gate_loss=before, prospect=msgspec.structs.replace(SOUND.prospect, loss=before - to))


def probe(**changes) -> Evidence:
    return evidence(probe=dataclasses.replace(PROBE, **changes))


def contribution(**changes) -> Evidence:
    fields = {name: getattr(CONTRIBUTION, name) for name in CONTRIBUTION.__struct_fields__}
    return evidence(contribution=Contribution(**{**fields, **changes}))


@pytest.mark.parametrize("gate", CHECKS)
def test_each_gate_lets_a_sound_seed_through_and_says_why(gate):
    verdict = CHECKS[gate](SOUND, SETTINGS)
    assert (verdict.gate, verdict.passed) == (gate, True)
    assert verdict.reason


@pytest.mark.parametrize(
    ("gate", "seen", "reason"),
    [
        ("G0", evidence(unfit="norm is for cnn slots"), "for cnn slots"),
        ("G0", evidence(slot_free=False), "stage1 is taken or at rest"),
        ("G1", evidence(probe=None), "never probed"),
        ("G1", probe(shape_kept=False), "changes the slot's shape"),
        ("G1", probe(dtype_kept=False), "changes the slot's dtype"),
        ("G1", probe(device_kept=False), "another device"),
        ("G1", probe(finite=False), "not finite"),
        ("G1", probe(identity_error=1e-9), "moves the host by 1e-09"),
        ("G1", probe(identity_error=NAN), "moves the host by nan"),
        ("G1", probe(tensors=0, tensors_with_gradient_first=0, tensors_with_gradient_third=0), "no parameters"),
        ("G1", probe(tensors_with_gradient_first=0), "no parameter receives a gradient at step 1"),
        ("G1", probe(tensors_with_gradient_third=3), "only 3 of 4 parameter tensors learn by step 3"),
        ("G2", evidence(gradient_ratio=None), "gradients were never measured"),
        ("G2", evidence(vanished_share=None), "gradients were never measured"),
        ("G2", evidence(exploded_share=None), "gradients were never measured"),
        ("G2", evidence(prospect=None), "switched on was not measured"),
        ("G2", evidence(gate_loss=None), "switched on was not measured"),
        ("G2", evidence(gradient_ratio=0.09), "0.09 is below 0.1"),
        ("G2", evidence(gradient_ratio=NAN), "nan is below 0.1"),
        ("G2", evidence(vanished_share=0.6), "60% of its gradients have vanished"),
        ("G2", evidence(vanished_share=NAN), "have vanished"),
        ("G2", evidence(exploded_share=0.2), "20% of its gradients have exploded"),
        ("G2", evidence(exploded_share=NAN), "have exploded"),
        ("G2", switched_on(1.3), "raise the loss by 30%"),
        ("G2", switched_on(NAN), "raise the loss by nan"),
        ("G3", evidence(alpha_at_rest=False), "alpha 1 of 1"),
        ("G3", evidence(alpha=0.5), "alpha 0.5 of 1"),
        ("G4", evidence(gate_losses=()), "not measured over the window"),
        ("G4", evidence(gate_losses=(1.0,)), "not measured over the window"),
        ("G4", evidence(gate_losses=(1.0, 1.1, 1.3)), r"drifted by \+30% over 2 epochs"),
        ("G4", evidence(gate_losses=(1.0, 0.7, 1.05)), r"jumped by \+50% in one epoch"),
        ("G4", evidence(gate_losses=(1.0, 1.0, NAN, 1.0)), "not finite"),
        ("G4", evidence(gate_losses=(1.0, math.inf)), "not finite"),
        ("G5", evidence(contribution=None), "not measured at this decision point"),
        ("G5", contribution(epoch=6), "not measured at this decision point"),
        ("G5", contribution(samples=SMALLEST_GATE_SAMPLE - 1), "29 samples are too few, 30 are needed"),
        ("G5", contribution(lower=0.01), "is not above 0.01"),
        ("G5", contribution(lower=-math.inf, upper=math.inf), "is not above 0.01"),
        ("G5", contribution(lower=NAN), "is not above 0.01"),
    ],
)
def test_each_gate_refuses_for_each_of_its_reasons(gate, seen, reason):
    verdict = CHECKS[gate](seen, SETTINGS)
    assert not verdict.passed
    assert verdict.gate == gate
    assert re.search(reason, verdict.reason)


def test_g1_names_every_problem_at_once():
    reason = fitness(probe(shape_kept=False, finite=False), SETTINGS).reason
    assert "shape" in reason
    assert "finite" in reason


def test_a_joint_seed_is_switched_on_already():
    verdict = readiness(evidence(isolated=False, prospect=None), SETTINGS)
    assert verdict.passed
    assert verdict.numbers["switched_on_rise"] is None


def test_a_host_that_stands_still_is_compared_with_nothing():
    verdict = readiness(evidence(host_learns=False, gradient_ratio=None), SETTINGS)
    assert verdict.passed
    assert verdict.reason.startswith("the host stands still")
    assert not readiness(evidence(host_learns=False, gradient_ratio=None, vanished_share=None), SETTINGS).passed


def test_thresholds_are_the_jobs_unless_somebody_nearer_to_the_seed_says_otherwise():
    assert thresholds(SETTINGS, "cnn", "norm", None) == SETTINGS
    assert thresholds(SETTINGS, "cnn", "norm", 0.01) == msgspec.structs.replace(SETTINGS, min_gradient_ratio=0.01)


def test_what_the_job_says_for_a_topology_goes_before_what_a_blueprint_declares_and_for_a_blueprint_before_both():
    settings = msgspec.structs.replace(
        SETTINGS,
        topologies={"cnn": Thresholds(min_gradient_ratio=0.2, max_loss_spike=0.9), "mlp": Thresholds(min_contribution=5.0)},
        blueprints={"norm": Thresholds(min_gradient_ratio=0.3)},
    )
    assert thresholds(settings, "cnn", "conv_light", 0.01).min_gradient_ratio == 0.2
    chosen = thresholds(settings, "cnn", "norm", 0.01)
    assert (chosen.min_gradient_ratio, chosen.max_loss_spike, chosen.min_contribution) == (0.3, 0.9, 0.01)


def test_proof_by_trial_looks_at_the_trial_alone():
    settings = msgspec.structs.replace(SETTINGS, proof="trial")
    trial = Trial(
        loss=0.1, lower=0.05, upper=0.2, confidence=0.95, samples=100, steps_with=10, steps_without=12, flops=1e6, epoch=7
    )
    missing = proof(SOUND, settings)
    assert (missing.passed, missing.reason) == (False, "its trial was not measured at this decision point")
    verdict = proof(evidence(trial=trial, contribution=None), settings)
    assert verdict.passed
    assert verdict.numbers["trial"] == 0.1
    assert not proof(evidence(trial=msgspec.structs.replace(trial, lower=0.0)), settings).passed
    assert not proof(evidence(trial=msgspec.structs.replace(trial, epoch=6)), settings).passed


@pytest.mark.parametrize(
    ("gate", "seen", "near"),
    [
        ("G2", evidence(gradient_ratio=0.105), True),
        ("G2", evidence(gradient_ratio=0.095), True),
        ("G2", evidence(gradient_ratio=0.2), False),
        ("G2", switched_on(1.19), True),
        ("G2", evidence(gradient_ratio=None), False),
        ("G4", evidence(gate_losses=(1.0, 1.19)), True),
        ("G4", evidence(gate_losses=(1.0, 0.6, 0.9)), False),
        ("G4", evidence(gate_losses=(1.0, 0.6, 0.83)), True),
        ("G5", contribution(lower=0.0105), True),
        ("G5", contribution(lower=0.0095), True),
        ("G5", contribution(lower=0.05), False),
    ],
)
def test_a_number_within_a_tenth_of_its_threshold_is_flagged(gate, seen, near):
    assert CHECKS[gate](seen, SETTINGS).near is near


def test_verdicts_carry_every_number_they_looked_at():
    assert readiness(SOUND, SETTINGS).numbers == {
        "gradient_ratio": 0.5,
        "min_gradient_ratio": 0.1,
        "vanished_share": 0.0,
        "exploded_share": 0.0,
        "switched_on_rise": 0.0,
        "max_loss_drift": 0.2,
    }
    assert proof(SOUND, SETTINGS).numbers == {
        "contribution": 0.1,
        "lower": 0.05,
        "upper": 0.15,
        "samples": 100,
        "min_contribution": 0.01,
    }
    assert stability(SOUND, SETTINGS).numbers == {"drift": pytest.approx(-0.1), "spike": 0.0}


def in_the_mood(evidence, _settings):
    return Verdict(gate="mood", passed=evidence.epoch > 7, reason=f"epoch {evidence.epoch}", numbers={"epoch": evidence.epoch})


def moody(guards="fossilized"):
    return Gate(name="mood", guards=guards, check=f"{__name__}:in_the_mood", description="")


def test_a_gate_of_a_plugin_is_asked_where_the_built_in_one_is():
    check = gate_checks([*load_plugins().gates.values(), moody()])["G5"]
    refused = check(SOUND, SETTINGS)
    assert (refused.gate, refused.passed, refused.reason) == ("G5", False, "mood: epoch 7")
    assert refused.numbers["mood: epoch"] == 7
    assert refused.numbers["samples"] == 100
    later = dataclasses.replace(SOUND, epoch=8, contribution=msgspec.structs.replace(CONTRIBUTION, epoch=8))
    assert check(later, SETTINGS).passed
    assert check(later, SETTINGS).reason == proof(later, SETTINGS).reason


def test_a_gate_of_a_plugin_does_not_overrule_a_refusal():
    check = gate_checks([*load_plugins().gates.values(), moody()])["G5"]
    stale = dataclasses.replace(SOUND, epoch=8)
    assert not check(stale, SETTINGS).passed
    assert check(stale, SETTINGS).reason == proof(stale, SETTINGS).reason


def test_without_plugins_the_gates_are_the_built_in_ones():
    checks = gate_checks(load_plugins().gates.values())
    assert list(checks) == list(GATES.values())
    assert checks["G5"] is proof


def test_a_gate_guards_a_stage_that_is_entered_through_one():
    assert tuple(GATES) == GUARDED_STAGES
    with pytest.raises(ValueError, match="gate 'mood' guards 'culled', must be one of: germinated"):
        moody("culled")


def test_losses_below_zero_rise_when_they_come_nearer_to_zero():
    worse, better = switched_on(-1.0, before=-2.0), switched_on(-3.0, before=-2.0)
    assert not readiness(worse, Gates()).passed
    assert readiness(better, Gates()).passed
    assert not stability(dataclasses.replace(SOUND, gate_losses=(-2.0, -1.0, -0.5)), Gates()).passed
    assert stability(dataclasses.replace(SOUND, gate_losses=(-2.0, -1.99, -1.98)), Gates()).numbers["drift"] == pytest.approx(
        0.01
    )


def test_in_joint_incubation_a_seed_must_start_as_the_identity():
    moved = dataclasses.replace(SOUND, isolated=False, probe=dataclasses.replace(PROBE, birth_error=0.5))
    assert "identity" in fitness(moved, Gates()).reason
    assert not fitness(moved, Gates()).passed
    assert fitness(dataclasses.replace(moved, isolated=True), Gates()).passed
