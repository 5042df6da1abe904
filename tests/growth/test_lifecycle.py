"""The life of a seed: only tabled moves, ever, whatever happens in whatever order."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esperd.errors import IllegalTransition
from esperd.growth.lifecycle import (
    GATES,
    LONGEST_STAY,
    RESTING_AT_TARGET,
    CheckGate,
    CullRequested,
    Entered,
    EpochEnded,
    FossilizeRequested,
    GateAnswered,
    Germinate,
    Life,
    Placed,
    Refused,
    RetargetRequested,
    advance,
    shortest_life,
)
from esperd.messages.growth import LIVE_STAGES, TRANSITIONS, Stage, Verdict
from esperd.messages.jobs import Growth

DURATIONS = Growth(incubation_epochs=2, blending_epochs=2, shadowing_epochs=2, probation_epochs=3, embargo_epochs=2)
DUE = {Stage.TRAINING: "G2", Stage.BLENDING: "G3", Stage.SHADOWING: "G4"}
"""Gates that the end of an epoch asks for."""


def verdict(gate: str, passed: bool) -> Verdict:
    return Verdict(gate=gate, passed=passed, reason="because")


def at(stage: Stage, epochs: int = 0) -> Life:
    return Life(stage=stage, epochs_in_stage=epochs)


def moves(instructions):
    return [(entered.before, entered.after) for entered in instructions if isinstance(entered, Entered)]


class Lives(RuleBasedStateMachine):
    """Anything may happen at any time; what is not tabled raises and changes nothing."""

    @initialize(
        epochs=st.tuples(*[st.integers(1, 3)] * 4), embargo=st.integers(0, 3), incubation=st.sampled_from(["lookahead", "joint"])
    )
    def born(self, epochs, embargo, incubation):
        incubating, blending, shadowing, probation = epochs
        self.durations = Growth(
            incubation=incubation,
            incubation_epochs=incubating,
            blending_epochs=blending,
            shadowing_epochs=shadowing,
            probation_epochs=probation,
            embargo_epochs=embargo,
        )
        self.life = Life()
        self.stay = 0
        """Epochs counted by the test itself."""

    def happen(self, occurrence, allowed: bool):
        before = self.life
        try:
            self.life, instructions = advance(before, occurrence, self.durations)
        except IllegalTransition:
            assert not allowed
            assert self.life is before
            return []
        assert allowed
        stage = before.stage
        for instruction in instructions:
            if isinstance(instruction, Entered):
                assert instruction.before is stage
                assert instruction.after in TRANSITIONS[stage]
                stage = instruction.after
                self.stay = 0
        assert self.life.stage is stage
        return instructions

    @rule()
    def germinates(self):
        assert self.happen(Germinate(), allowed=self.life.stage is Stage.DORMANT) in ([], [CheckGate("G0")])

    @rule()
    def placed(self):
        assert self.happen(Placed(), allowed=self.life.stage is Stage.GERMINATED) in ([], [CheckGate("G1")])

    @rule(gate=st.sampled_from([*GATES.values(), "G9"]), passed=st.booleans())
    def answered(self, gate, passed):
        target = {gate: stage for stage, gate in GATES.items()}.get(gate)
        before, leaving = self.life.stage, self.life.leaving
        instructions = self.happen(GateAnswered(verdict(gate, passed)), allowed=target in TRANSITIONS[before])
        if instructions and passed:
            assert self.life.stage is (Stage.CULLED if leaving else target)
        elif instructions:
            assert self.life.stage in (before, Stage.CULLED), "a refused gate opens nothing"

    @precondition(lambda self: self.life.stage is not Stage.FOSSILIZED)
    @rule()
    def epoch_ends(self):
        before, self.stay = self.life.stage, self.stay + 1
        stay = self.stay
        instructions = self.happen(EpochEnded(), allowed=True)
        if stay > self.durations.probation_epochs and before is Stage.PROBATIONARY:
            assert self.life.stage is Stage.CULLED
            assert "timeout" in self.life.reason
        elif not instructions:
            assert self.life.epochs_in_stage == stay

    @rule()
    def fossilization_wanted(self):
        before = self.life
        instructions = self.happen(FossilizeRequested("proven"), allowed=before.stage is Stage.PROBATIONARY)
        assert self.life.stage is before.stage, "only gate G5 makes a seed permanent"
        assert instructions in ([], [CheckGate("G5")])

    @rule(share=st.sampled_from([0.0, 0.3, 1.0]))
    def another_alpha_wanted(self, share):
        allowed = self.life.stage in RESTING_AT_TARGET
        if self.happen(RetargetRequested(share, "wanted"), allowed=allowed):
            assert self.life.stage is Stage.BLENDING
            assert self.life.leaving is (share == 0.0)

    @invariant()
    def only_a_blending_seed_is_leaving(self):
        if hasattr(self, "life") and self.life.leaving:
            assert self.life.stage is Stage.BLENDING
            assert self.life.reason == "wanted"

    @rule()
    def cull_wanted(self):
        if self.happen(CullRequested("unwanted"), allowed=self.life.stage in LIVE_STAGES):
            assert self.life == Life(stage=Stage.CULLED, reason="unwanted")

    @precondition(lambda self: self.life.stage in DUE)
    @rule(passed=st.booleans())
    def due_gate_answers(self, passed):
        self.happen(GateAnswered(verdict(DUE[self.life.stage], passed)), allowed=True)

    @precondition(lambda self: self.life.stage is Stage.FOSSILIZED)
    @rule()
    def fossilized_is_final(self):
        assert TRANSITIONS[Stage.FOSSILIZED] == frozenset()
        before = self.life
        life, instructions = advance(before, EpochEnded(), self.durations)
        assert (life.stage, instructions) == (Stage.FOSSILIZED, [])

    @invariant()
    def stay_is_counted(self):
        if hasattr(self, "life") and self.life.stage is not Stage.FOSSILIZED:
            assert self.life.epochs_in_stage == self.stay


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def live(durations: Growth, epochs: int, refuse: tuple[str, ...] = ()) -> list[tuple[int, Stage]]:
    """A seed from germination on, every gate passing but those refused; stages entered, with the epoch."""
    life, entered = Life(), []
    occurrences = [(0, Germinate()), (0, Placed())] + [(epoch, EpochEnded()) for epoch in range(1, epochs + 1)]
    for epoch, occurrence in occurrences:
        pending = [occurrence]
        while pending:
            life, instructions = advance(life, pending.pop(0), durations)
            for instruction in instructions:
                if isinstance(instruction, CheckGate):
                    pending.append(GateAnswered(verdict(instruction.gate, instruction.gate not in refuse)))
                if isinstance(instruction, Entered):
                    entered.append((epoch, instruction.after))
    return entered


def test_a_seed_whose_gates_all_pass_reaches_probation_after_its_stays_and_times_out():
    assert live(DURATIONS, 12) == [
        (0, Stage.GERMINATED),
        (0, Stage.TRAINING),
        (2, Stage.BLENDING),
        (3, Stage.SHADOWING),
        (5, Stage.PROBATIONARY),
        (9, Stage.CULLED),
        (10, Stage.EMBARGOED),
        (12, Stage.RESETTING),
    ]


def test_an_undecided_seed_gets_exactly_its_probation_epochs_to_be_decided_in():
    probation = next(epoch for epoch, stage in live(DURATIONS, 12) if stage is Stage.PROBATIONARY)
    culled = next(epoch for epoch, stage in live(DURATIONS, 12) if stage is Stage.CULLED)
    assert culled - probation - 1 == DURATIONS.probation_epochs


@pytest.mark.parametrize(
    ("gate", "stage", "stay"), [("G2", Stage.TRAINING, 2), ("G3", Stage.BLENDING, 2), ("G4", Stage.SHADOWING, 2)]
)
def test_a_stage_may_last_twice_its_stay_then_the_refusal_becomes_a_cull(gate, stage, stay):
    entered = {stage: epoch for epoch, stage in live(DURATIONS, 12, refuse=(gate,))}
    assert entered[Stage.CULLED] - entered[stage] == LONGEST_STAY * stay


def test_a_seed_that_fails_its_probe_is_culled_at_once():
    assert live(DURATIONS, 0, refuse=("G1",)) == [(0, Stage.GERMINATED), (0, Stage.CULLED)]


def test_a_seed_refused_by_g0_was_never_there():
    life, instructions = advance(Life(), GateAnswered(verdict("G0", passed=False)), DURATIONS)
    assert life == Life()
    assert instructions == [Refused("G0: because")]


@pytest.mark.parametrize("embargo", [1, 2, 5])
def test_a_slot_rests_through_embargo_and_reset(embargo):
    durations = Growth(embargo_epochs=embargo)
    life, stages = at(Stage.CULLED), []
    while life.stage is not Stage.DORMANT:
        life, _ = advance(life, EpochEnded(), durations)
        stages.append(life.stage)
    assert stages == [Stage.EMBARGOED] * embargo + [Stage.RESETTING] * durations.resetting_epochs + [Stage.DORMANT]


def test_no_embargo_means_no_epoch_of_it():
    life, instructions = advance(at(Stage.CULLED), EpochEnded(), Growth(embargo_epochs=0))
    assert life.stage is Stage.RESETTING
    assert moves(instructions) == [(Stage.CULLED, Stage.EMBARGOED), (Stage.EMBARGOED, Stage.RESETTING)]


def test_what_is_stored_of_a_stage_never_changes():
    assert [str(stage) for stage in Stage] == [
        *("dormant", "germinated", "training", "blending", "shadowing", "probationary", "fossilized"),
        *("culled", "embargoed", "resetting"),
    ]


@pytest.mark.parametrize("text", ["holding", "pruned", "Training", ""])
def test_a_stage_that_is_not_known_is_refused_when_it_is_read_back(text):
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value"):
        msgspec.json.decode(msgspec.json.encode(text), type=Stage)


def test_a_seed_that_is_fading_out_is_gone_when_its_alpha_is():
    life, entered = advance(at(Stage.PROBATIONARY, 3), RetargetRequested(0.0, "it costs too much"), DURATIONS)
    assert moves(entered) == [(Stage.PROBATIONARY, Stage.BLENDING)]
    waiting, _ = advance(life, GateAnswered(verdict("G3", passed=False)), DURATIONS)
    assert waiting == life, "its reason is kept"
    gone, entered = advance(waiting, GateAnswered(verdict("G3", passed=True)), DURATIONS)
    assert gone == Life(stage=Stage.CULLED, reason="it costs too much")
    assert moves(entered) == [(Stage.BLENDING, Stage.CULLED)]


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize(
    ("occurrence", "allowed"),
    [
        (Germinate(), {Stage.DORMANT}),
        (Placed(), {Stage.GERMINATED}),
        (FossilizeRequested("x"), {Stage.PROBATIONARY}),
        (CullRequested("x"), LIVE_STAGES),
        (RetargetRequested(0.5, "x"), RESTING_AT_TARGET),
    ],
)
def test_a_request_out_of_place_is_refused_with_an_error(stage, occurrence, allowed):
    if stage in allowed:
        advance(at(stage), occurrence, DURATIONS)
    else:
        with pytest.raises(IllegalTransition, match=str(stage)):
            advance(at(stage), occurrence, DURATIONS)


def test_the_reason_of_a_fossilized_seed_is_the_decisions():
    life, _ = advance(at(Stage.PROBATIONARY, 1), FossilizeRequested("it pays its rent"), DURATIONS)
    fossilized, _ = advance(life, GateAnswered(verdict("G5", passed=True)), DURATIONS)
    assert fossilized == Life(stage=Stage.FOSSILIZED, reason="it pays its rent")


def test_a_refused_fossilization_leaves_no_reason_behind():
    life, _ = advance(at(Stage.PROBATIONARY, 1), FossilizeRequested("it pays its rent"), DURATIONS)
    refused, instructions = advance(life, GateAnswered(verdict("G5", passed=False)), DURATIONS)
    assert refused == at(Stage.PROBATIONARY, 1)
    assert instructions == [Refused("G5: because")]


@pytest.mark.parametrize("incubation", ["lookahead", "joint"])
def test_the_shortest_life_is_what_a_first_verdict_takes(incubation):
    durations = Growth(incubation=incubation, incubation_epochs=3, blending_epochs=2, shadowing_epochs=2)
    blending = 2 if incubation == "lookahead" else 1
    assert shortest_life(durations) == 3 + blending + 2 + 1
