"""The governor: every catastrophe trips it, no healthy training does, and it never asks for what cannot be done."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from esperd.growth.governor import (
    IN_A_ROW,
    NEAR_CHANCE,
    ONCE_BETTER,
    SHORTEST_HISTORY,
    SMALLEST_SHARE,
    Fail,
    GateObserved,
    Resumed,
    Rollback,
    SeedLost,
    SnapshotTaken,
    StepsObserved,
    TakeSnapshot,
    Watch,
    advance,
)
from esperd.messages.jobs import Governor

SETTINGS = Governor(steps=4, window=6, divergence_factor=3.0, max_rollbacks=4, rate_cut=0.5)
CHANCE = math.log(10)
FACTOR = SETTINGS.divergence_factor
NOT_FINITE = [math.nan, math.inf, -math.inf]
finite = st.floats(-1e6, 1e6)


def look(loss: float, steps: int = SETTINGS.steps) -> StepsObserved:
    return StepsObserved(loss_sum_finite=math.isfinite(loss), mean_loss=loss, steps=steps)


def follow(watch: Watch, occurrences, *, chance_loss=None, governor=SETTINGS):
    """Everything that happens, one after the other: the last state, and all instructions."""
    told = []
    for occurrence in occurrences:
        watch, instructions = advance(watch, occurrence, governor, chance_loss=chance_loss)
        told += instructions
    return watch, told


def trained(losses=(1.0,) * SETTINGS.window, *, live_seeds=0, epoch=3, gate=(), governor=SETTINGS, chance_loss=None) -> Watch:
    """A run whose training losses were these, with a snapshot at its last decision point."""
    gates = [GateObserved(loss, epoch) for loss in gate]
    watch, told = follow(Watch(epoch=epoch), [*map(look, losses), *gates], governor=governor, chance_loss=chance_loss)
    assert not [each for each in told if not isinstance(each, TakeSnapshot)]
    return follow(watch, [SnapshotTaken(epoch=epoch, live_seeds=live_seeds)])[0]


def rollbacks(told) -> list[Rollback]:
    return [each for each in told if isinstance(each, Rollback)]


# --- what trips it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", NOT_FINITE)
@pytest.mark.parametrize("before", [(), (1.0,) * 9], ids=["at the very start", "after a while"])
def test_a_loss_that_is_not_finite_trips_at_once(loss, before):
    watch = trained(before)
    for occurrence in (look(loss), look(loss, steps=1), GateObserved(loss, 4), StepsObserved(False, 1.0, 1)):
        (rollback,) = rollbacks(follow(watch, [occurrence])[1])
        assert "is not finite" in rollback.reason
        assert rollback.numbers == {"loss": None}


def test_a_loss_that_rises_because_a_seed_was_culled_is_no_catastrophe_and_a_later_one_is():
    watch = trained([0.1] * 6, gate=[0.1] * 6, chance_loss=CHANCE)
    alone = [look(1.9)] * 6 + [GateObserved(1.9, 4)] * 6
    assert rollbacks(follow(watch, alone, chance_loss=CHANCE)[1])
    watch, told = follow(watch, [SeedLost(), *alone], chance_loss=CHANCE)
    assert not rollbacks(told)
    assert rollbacks(follow(watch, [look(30.0)] * IN_A_ROW, chance_loss=CHANCE)[1])
    assert rollbacks(follow(watch, [look(math.nan)], chance_loss=CHANCE)[1])


def test_a_training_loss_far_above_its_level_trips_when_it_stays_there():
    watch = trained([1.0, 1.1, 0.9, 1.0, 1.05, 0.95])
    watch, told = follow(watch, [look(3.1)] * (IN_A_ROW - 1))
    assert told == []
    _, (rollback,) = follow(watch, [look(3.1)])
    assert rollback.reason == "the training loss in epoch 4 is 3.1, above the 3 that its recent level of 1 allows"
    assert rollback.numbers == {"loss": pytest.approx(3.1), "level": 1.0, "limit": 3.0, "noise": pytest.approx(0.1048, rel=1e-3)}


def test_one_bad_batch_is_forgiven():
    watch, told = follow(trained(), [*[look(50.0)] * (IN_A_ROW - 1), look(1.0)] * 5)
    assert told == []
    assert set(watch.train.history) == {1.0}


def test_a_gate_loss_far_above_its_level_trips_when_it_stays_there():
    watch, told = follow(trained(gate=(1.0, 0.9, 0.95, 0.9)), [GateObserved(3.0, 4)])
    assert told == [], "one is forgiven, but this is no good point"
    _, (rollback,) = follow(watch, [GateObserved(3.0, 5)])
    assert rollback.reason == "the gate loss after epoch 5 is 3, above the 2.85 that its recent level of 0.95 allows"
    assert (rollback.epoch, rollback.to_epoch) == (5, 3)


@given(
    history=st.lists(st.floats(1e-3, 1e3), min_size=SHORTEST_HISTORY, max_size=12),
    beyond=st.floats(1.01, 100.0),
    gate=st.booleans(),
    chance=st.none() | st.floats(0.5, 10.0),
)
def test_the_square_of_the_factor_trips_whatever_the_noise(history, beyond, gate, chance):
    """No noise, however wild, makes the limit wider than this: nothing is so noisy that it never trips."""
    quiet = Governor(steps=4, window=12, divergence_factor=1e6)
    watch = trained(history, gate=history, governor=quiet)
    untrained = watch.train.first if chance is None else chance
    size = max(watch.train.level, SMALLEST_SHARE * untrained)
    loss = watch.train.level + beyond * (FACTOR**2 - 1) * size
    occurrences = [GateObserved(loss, 4) if gate else look(loss)] * IN_A_ROW
    assert len(rollbacks(follow(watch, occurrences, chance_loss=chance)[1])) == 1


@given(level=st.floats(1e-3, 1e3), noise=st.lists(st.floats(-0.1, 0.1), min_size=4, max_size=12), beyond=st.floats(1.35, 10.0))
def test_a_quiet_loss_trips_at_the_factor_within_the_window(level, noise, beyond):
    watch = trained([level * (1 + part) for part in noise])
    assert SETTINGS.window >= IN_A_ROW
    assert rollbacks(follow(watch, [look(FACTOR * level * beyond)] * IN_A_ROW)[1])


@given(start=st.floats(0.01, 100.0), growth=st.floats(1.5, 3.0))
def test_a_divergence_that_grows_step_by_step_trips_before_it_is_learned(start, growth):
    watch, told = follow(trained([start] * 6), [look(start * growth**step) for step in range(1, 25)])
    assert rollbacks(told) or isinstance(told[-1], Fail)
    assert watch.train.lowest <= start * 1.0001


def test_a_loss_below_zero_has_a_level_as_well():
    watch = trained([-2.0, -2.1, -2.2, -2.1, -2.0, -2.1])
    assert follow(watch, [look(1.9)] * 9)[1] == []
    assert rollbacks(follow(watch, [look(2.2)] * IN_A_ROW)[1])


def test_a_network_that_answers_like_a_constant_has_collapsed():
    watch = trained([1.2] * 6, gate=[1.2] * 4, chance_loss=CHANCE)
    for occurrences in ([look(CHANCE)] * IN_A_ROW, [GateObserved(CHANCE, 4)] * IN_A_ROW):
        (rollback,) = rollbacks(follow(watch, occurrences, chance_loss=CHANCE)[1])
        assert "is 2.303, no better than a constant answer (2.303), after it had been 1.2" in rollback.reason
        assert rollback.numbers["chance"] == CHANCE
        assert rollbacks(follow(watch, occurrences, chance_loss=None)[1]) == [], "not applicable: not looked for"


def test_a_network_that_never_was_better_than_a_constant_has_not_collapsed():
    _, told = follow(Watch(), [look(CHANCE), GateObserved(CHANCE, 1)] * 20, chance_loss=CHANCE)
    assert told == [TakeSnapshot()] * 20
    assert follow(trained([ONCE_BETTER * CHANCE * 1.01] * 6), [look(CHANCE)] * 9, chance_loss=CHANCE)[1] == []


def test_a_collapse_that_creeps_is_seen_in_training_and_overfitting_at_the_gate_is_none():
    slowly = [1.2 + 0.01 * step for step in range(120)]
    told = follow(trained([1.2] * 6, chance_loss=CHANCE), [look(loss) for loss in slowly], chance_loss=CHANCE)[1]
    assert "no better than a constant" in rollbacks(told)[0].reason
    watch = trained(gate=[1.2] * 6, chance_loss=CHANCE)
    told = follow(watch, [GateObserved(loss, 4) for loss in slowly], chance_loss=CHANCE)[1]
    assert told == [TakeSnapshot()] * len(slowly)


# --- what does not -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(SHORTEST_HISTORY))
def test_a_short_history_says_nothing(length):
    losses = [1.0] * length
    assert follow(trained(losses), [look(1e9)] * (IN_A_ROW - 1))[1] == []
    assert follow(trained(gate=losses), [GateObserved(1e9, 4)] * (IN_A_ROW - 1))[1] == [TakeSnapshot()] * (IN_A_ROW - 1)


def test_a_tiny_loss_may_multiply():
    tiny = trained([2.0, 2.0, 2.0, 2.0, *[1e-4] * 6])
    assert follow(tiny, [look(5e-2)] * 9)[1] == []
    assert rollbacks(follow(tiny, [look(0.5)] * IN_A_ROW)[1]), "a tenth of the untrained loss, three times"
    of_classes = trained([1e-4] * 6)
    assert follow(of_classes, [look(5e-2)] * 9, chance_loss=CHANCE)[1] == []
    assert rollbacks(follow(of_classes, [look(0.8)] * IN_A_ROW, chance_loss=CHANCE)[1])


def test_a_loss_that_was_always_zero_has_no_scale():
    assert follow(trained([0.0] * 6), [look(1.0)] * 9)[1] == []


@st.composite
def healthy(draw):
    """A loss around a falling level, with bounded noise; at a restart of the learning rate its level doubles."""
    level = draw(st.floats(1e-2, 1e2))
    restarts = draw(st.sets(st.integers(1, 5), max_size=3))
    losses, noise = [], st.floats(-0.15, 0.15)
    for step in range(6 * (SETTINGS.window + 2)):
        level *= draw(st.floats(0.8, 1.0))
        if step and step % (SETTINGS.window + 2) == 0 and step // (SETTINGS.window + 2) in restarts:
            level *= draw(st.floats(1.0, 2.0))
        losses.append(level * (1 + draw(noise)))
    return losses


@given(losses=healthy(), known=st.booleans())
@settings(max_examples=200, deadline=None)
def test_healthy_training_never_trips(losses, known):
    chance = 1.2 * max(losses) / (1 - NEAR_CHANCE) if known else None  # never as bad as a constant answer
    occurrences = [occurrence for loss in losses for occurrence in (look(loss), GateObserved(loss, 4))]
    watch, told = follow(trained(()), occurrences, chance_loss=chance)
    assert told == [TakeSnapshot()] * len(losses)
    assert watch.train.anomalies == 0


@given(shares=st.lists(st.integers(1, 9), min_size=1, max_size=60), data=st.data())
def test_a_look_is_as_many_steps_as_settings_say_however_often_the_loss_is_read(shares, data):
    losses = [data.draw(st.floats(0.9, 1.1)) for _ in shares]
    watch, told = follow(trained(()), [look(loss, steps) for loss, steps in zip(losses, shares, strict=True)])
    assert told == []
    looks, total, steps = [], 0.0, 0
    for loss, share in zip(losses, shares, strict=True):
        total, steps = total + loss * share, steps + share
        if steps >= SETTINGS.steps:
            looks.append(total / steps)
            total, steps = 0.0, 0
    assert watch.train.history == pytest.approx(looks[-SETTINGS.window :])
    assert watch.train.steps == steps


# --- the history -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1e6), max_size=40))
@example([1.0] * 6 + [20.0, 1.0, 20.0, 20.0])
def test_the_history_never_learns_from_an_anomaly(losses):
    watch = trained([1.0] * 6)
    for loss in losses:
        after, told = advance(watch, look(loss), SETTINGS)
        if rollbacks(told):
            assert after.train == after.point.train, "what was seen since the snapshot is forgotten"
        elif after.train.anomalies:
            assert after.train.history == watch.train.history
            assert after.train.lowest == watch.train.lowest
        else:
            assert after.train.history[-1] == loss
        watch = after
        if watch.story:
            break


def test_a_decision_point_in_suspicious_training_is_no_good_point():
    watch, told = follow(trained(), [look(50.0), GateObserved(1.0, 4)])
    assert told == []
    assert follow(watch, [look(1.0), GateObserved(1.0, 5)])[1] == [TakeSnapshot()]


# --- what it says to do ------------------------------------------------------------------------------------------------------


def nan(epoch: int) -> GateObserved:
    return GateObserved(math.nan, epoch)


def test_first_the_living_seeds_are_culled_then_the_rate_is_cut_then_it_gives_up():
    watch = trained(live_seeds=2, epoch=3)
    watch, (first,) = advance(watch, nan(4), SETTINGS)
    assert (first.action, first.culls, first.rate_scale, first.trip, first.to_epoch) == ("cull", True, 1.0, 1, 3)
    watch, (second,) = advance(watch, nan(4), SETTINGS)
    assert (second.action, second.culls, second.rate_scale, second.trip) == ("cut_rate", True, 0.5, 2)
    assert watch.rate_scale == 0.5
    watch, (fail,) = advance(watch, nan(4), SETTINGS)
    assert fail.story == (
        "the gate loss after epoch 4 is not finite: went back to epoch 3 and culled 2 living seeds; then "
        "the gate loss after epoch 4 is not finite: went back to epoch 3 and culled 2 living seeds and cut the learning rate to "
        "0.5 of its schedule; then "
        "the gate loss after epoch 4 is not finite, and nothing is left to try from epoch 3; lower optimizer.learning_rate"
    )
    assert advance(watch, look(1.0), SETTINGS) == (watch, [fail]), "who gave up says so again"


def test_without_living_seeds_the_rate_is_cut_first():
    watch, (first,) = advance(trained(live_seeds=0), nan(4), SETTINGS)
    assert (first.action, first.culls, first.rate_scale) == ("cut_rate", False, 0.5)
    assert isinstance(advance(watch, nan(4), SETTINGS)[1][0], Fail)


def test_action_cut_rate_spares_the_seeds():
    governor = msgspec.structs.replace(SETTINGS, action="cut_rate")
    watch, (first,) = advance(trained(live_seeds=2), nan(4), governor)
    assert (first.action, first.culls) == ("cut_rate", False)
    assert "culled" not in advance(watch, nan(4), governor)[1][0].story


def test_a_new_snapshot_makes_a_new_point_where_everything_may_be_tried_again():
    watch, _ = advance(trained(live_seeds=0), nan(4), SETTINGS)
    watch, told = follow(watch, [look(1.0), GateObserved(1.0, 4)])
    assert told == [TakeSnapshot()]
    watch, _ = follow(watch, [SnapshotTaken(epoch=4, live_seeds=1)])
    watch, (again,) = advance(watch, nan(5), SETTINGS)
    assert (again.action, again.to_epoch, again.trip, again.rate_scale) == ("cull", 4, 2, 0.5)
    assert advance(watch, nan(5), SETTINGS)[1][0].rate_scale == 0.25, "cuts add up"


def test_a_good_decision_point_whose_snapshot_was_not_taken_is_no_new_point():
    watch, _ = advance(trained(live_seeds=0), nan(4), SETTINGS)
    watch, told = follow(watch, [GateObserved(1.0, 4), nan(5)])
    assert told[0] == TakeSnapshot()
    assert "nothing is left to try from epoch 3" in told[1].story


def test_a_resumed_process_goes_back_to_where_it_resumed_and_repeats_no_remedy():
    watch, _ = advance(trained(live_seeds=1, epoch=3), nan(4), SETTINGS)
    watch, told = follow(watch, [look(1.0, steps=1), Resumed(epoch=3, live_seeds=0)])
    assert told == []
    assert watch.point.train == watch.train
    watch, (second,) = advance(watch, nan(4), SETTINGS)
    assert (second.action, second.culls) == ("cut_rate", True)
    assert isinstance(advance(watch, nan(4), SETTINGS)[1][0], Fail)
    fresh, _ = advance(Watch(epoch=2), Resumed(epoch=2, live_seeds=0), SETTINGS)
    assert isinstance(advance(fresh, look(math.nan), SETTINGS)[1][0], Rollback)


def test_after_so_many_rollbacks_it_gives_up():
    watch = trained(live_seeds=0)
    for trip in range(SETTINGS.max_rollbacks):
        watch, (rollback,) = advance(watch, nan(4), SETTINGS)
        assert rollback.trip == trip + 1
        watch, _ = advance(watch, SnapshotTaken(epoch=3, live_seeds=0), SETTINGS)
    assert "and 4 rollbacks are allowed; lower" in advance(watch, nan(4), SETTINGS)[1][0].story


def test_without_a_snapshot_there_is_nothing_to_go_back_to():
    _, (fail,) = advance(Watch(), look(math.nan), SETTINGS)
    assert fail.story == (
        "the training loss in epoch 1 is not finite, and there is no earlier good point to go back to; "
        "lower optimizer.learning_rate"
    )


def test_switched_off_it_only_ends_a_job_whose_numbers_are_not_finite():
    off = msgspec.structs.replace(SETTINGS, enabled=False)
    losses = [1.0] * 9 + [1e9] * 9
    occurrences = [occurrence for loss in losses for occurrence in (look(loss), GateObserved(loss, 4))]
    watch, told = follow(trained(), occurrences, governor=off, chance_loss=CHANCE)
    assert told == [], "no snapshot is asked for either"
    assert "is not finite, and the governor is not enabled" in advance(watch, look(math.nan), off)[1][0].story


# --- as a machine ------------------------------------------------------------------------------------------------------------


class Governs(RuleBasedStateMachine):
    """Anything may be seen at any time. Beside it runs a second governor that is stored and read back before every event."""

    @initialize(
        action=st.sampled_from(["cull", "cut_rate"]),
        max_rollbacks=st.integers(0, 5),
        chance=st.none() | st.just(CHANCE),
        window=st.integers(4, 8),
    )
    def begins(self, action, max_rollbacks, chance, window):
        self.settings = Governor(steps=4, window=window, action=action, max_rollbacks=max_rollbacks)
        self.chance = chance
        self.watch = self.restored = Watch()
        self.epoch = 0
        self.point = None
        """Epoch and living seeds of the latest snapshot, and what was tried there, by the test's own account."""
        self.rollbacks = 0
        self.cuts = 0
        self.failed = False

    def see(self, occurrence, *, must_trip=False):
        before = self.watch
        self.watch, told = advance(before, occurrence, self.settings, chance_loss=self.chance)
        read_back = msgspec.msgpack.decode(msgspec.msgpack.encode(self.restored), type=Watch)
        self.restored, told_again = advance(read_back, occurrence, self.settings, chance_loss=self.chance)
        assert told_again == told, "a restored state behaves equally"
        assert len(told) <= 1
        if self.failed:
            assert told == [Fail(before.story)]
            assert self.watch == before
            return
        assert not must_trip or isinstance(told[0], Rollback | Fail)
        for instruction in told:
            self.check(instruction, occurrence)

    def check(self, instruction, occurrence):
        match instruction:
            case TakeSnapshot():
                assert isinstance(occurrence, GateObserved)
                assert math.isfinite(occurrence.loss)
            case Rollback():
                assert self.point is not None, "never without a snapshot"
                epoch, live, tried = self.point
                self.rollbacks += 1
                assert self.rollbacks <= self.settings.max_rollbacks
                expected = "cull" if not tried and live and self.settings.action == "cull" else "cut_rate"
                assert expected not in tried
                tried.append(expected)
                self.cuts += expected == "cut_rate"
                assert instruction.action == expected
                assert instruction.culls == ("cull" in tried)
                assert (instruction.to_epoch, instruction.trip) == (epoch, self.rollbacks)
                assert instruction.rate_scale == self.watch.rate_scale == self.settings.rate_cut**self.cuts
                self.epoch = epoch
            case Fail():
                self.failed = True
                exhausted = self.point is not None and "cut_rate" in self.point[2]
                assert self.point is None or exhausted or self.rollbacks >= self.settings.max_rollbacks
                assert instruction.story.count("; then ") == self.rollbacks

    @rule(loss=st.sampled_from([1.0, 1.1, 0.9, 1.3]) | finite, steps=st.integers(1, 6))
    def steps_pass(self, loss, steps):
        self.see(look(loss, steps))

    @rule(loss=st.sampled_from([1.0, 1.1, 0.9, 1.3]))
    def epoch_passes(self, loss):
        for _ in range(4):
            self.see(look(loss))
        self.epoch += 1
        self.see(GateObserved(loss, self.epoch))

    @rule(loss=finite)
    def gate_is_passed(self, loss):
        self.epoch += 1
        self.see(GateObserved(loss, self.epoch))

    @rule(loss=st.sampled_from(NOT_FINITE), steps=st.integers(1, 6))
    def steps_are_not_finite(self, loss, steps):
        self.see(look(loss, steps), must_trip=True)

    @rule(loss=st.sampled_from(NOT_FINITE))
    def gate_is_not_finite(self, loss):
        self.see(GateObserved(loss, self.epoch + 1), must_trip=True)

    @precondition(lambda self: not self.failed)
    @rule(live_seeds=st.integers(0, 2))
    def snapshot_is_taken(self, live_seeds):
        self.see(SnapshotTaken(self.epoch, live_seeds))
        self.point = (self.epoch, live_seeds, [])

    @precondition(lambda self: not self.failed)
    @rule(live_seeds=st.integers(0, 2))
    def process_is_resumed(self, live_seeds):
        self.see(Resumed(self.epoch, live_seeds))
        self.point = (self.epoch, live_seeds, self.point[2] if self.point else [])

    @invariant()
    def what_is_remembered_stays_bounded(self):
        if not hasattr(self, "watch"):
            return
        assert self.restored == self.watch
        for series in (self.watch.train, self.watch.gate):
            assert len(series.history) <= self.settings.window
            assert all(map(math.isfinite, series.history))
            assert series.anomalies < IN_A_ROW or self.failed
        assert len(self.watch.trips) == self.rollbacks


TestGoverns = Governs.TestCase
TestGoverns.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
