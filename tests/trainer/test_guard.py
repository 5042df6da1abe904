"""The guard: what the governor orders is done to the network, told, and handed to whoever trains."""

from __future__ import annotations

import math

import pytest
from small_growth import epoch, germinate, grower, same, tensors_of, until

from esperd.errors import TrainingDiverged
from esperd.growth.governor import Watch
from esperd.growth.grower import Grower
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Governor
from esperd.messages.policy import Decision
from esperd.messages.reports import RollbackRecord
from esperd.messages.telemetry import RolledBack, StageChanged
from esperd.trainer.guard import Guard, WentBack, rollbacks


def guard_of(grown: Grower, events: list | None = None, *, watch: Watch | None = None, **settings) -> Guard[str]:
    """A guard that looks at every step."""
    emit = (events if events is not None else []).append
    return Guard(Governor(**{"steps": 1, **settings}), None, grown, emit, watch or Watch())


def growing(events: list | None = None) -> Grower:
    """A seed that incubates, one that is on probation, and one that is kept."""
    grown = grower(events, probation_epochs=9, settings=Gates(min_contribution=-100.0, max_loss_drift=10.0, max_loss_spike=10.0))
    grown.apply(germinate("norm", "first"))
    until(grown, "first#0", Stage.PROBATIONARY)
    epoch(grown)
    assert grown.apply(Decision(action="fossilize", seed="first#0", reason="it pays")) is None
    grown.apply(germinate("norm", "second"))
    until(grown, "second#1", Stage.PROBATIONARY)
    assert grown.apply(germinate("squeeze_excite", "first")) is None
    return grown


def broken(guard: Guard[str]) -> str:
    """One step whose loss is no number; returns the cursor that the run goes on from."""
    with pytest.raises(WentBack) as went:
        guard.steps(math.nan, 1)
    return went.value.cursor


def stages(grown: Grower) -> dict[str, Stage]:
    return {seed.name: seed.stage for seed in grown.network.seeds()}


def test_after_a_catastrophe_every_living_seed_is_culled_and_the_kept_ones_stay():
    events: list = []
    grown = growing(events)
    guard = guard_of(grown, events)
    guard.stand("here")
    stood = grown.epoch
    epoch(grown)
    broken(guard)
    assert grown.epoch == stood
    assert stages(grown) == {"first#0": Stage.FOSSILIZED}
    assert sorted(grown.resting) == ["first", "second"]
    reason = f"governor: {guard.watch.trips[0].reason}"
    ended = {outcome.seed: (outcome.stage, outcome.reason) for outcome in grown.outcomes}
    assert ended["first#2"] == ended["second#1"] == (Stage.CULLED, reason)
    assert {event.seed for event in events if isinstance(event, StageChanged) and event.reason == reason} == {
        "first#2",
        "second#1",
    }


def test_a_governor_that_cuts_the_rate_spares_the_seeds():
    grown = growing()
    guard = guard_of(grown, action="cut_rate", rate_cut=0.25)
    guard.stand("here")
    stood = stages(grown)
    broken(guard)
    assert stages(grown) == stood
    assert guard.watch.rate_scale == 0.25


def test_seeds_that_a_second_return_brings_back_are_culled_again_and_the_rate_is_cut():
    grown = growing()
    guard = guard_of(grown)
    guard.stand("here")
    broken(guard)
    assert guard.watch.rate_scale == 1.0
    broken(guard)
    assert stages(grown) == {"first#0": Stage.FOSSILIZED}
    assert guard.watch.rate_scale == 0.5
    assert [trip.remedy for trip in guard.watch.trips] == ["cull", "cut_rate"]


def test_whoever_trains_gets_the_cursor_and_the_network_of_the_latest_point():
    grown = grower()
    guard = guard_of(grown)
    guard.stand("the beginning")
    epoch(grown)
    guard.stand("after an epoch")
    kept = tensors_of(grown)
    epoch(grown)
    assert broken(guard) == "after an epoch"
    assert same(tensors_of(grown), kept)


def test_a_point_is_kept_when_the_gate_loss_was_good_and_not_otherwise():
    grown, asked = grower(), []
    guard = guard_of(grown, window=4)

    def cursor() -> str:
        asked.append(grown.epoch)
        return f"epoch {grown.epoch}"

    guard.stand("the beginning")
    for gate_loss in (1.0, 1.0, 1.0, 1.0, 99.0):
        guard.steps(1.0, 1)
        grown.epoch += 1
        guard.gate(gate_loss)
        guard.decided(cursor)
    assert asked == [1, 2, 3, 4]
    with pytest.raises(WentBack) as went:
        guard.gate(99.0)
    assert went.value.cursor == "epoch 4"


def test_the_policy_is_told_every_return_in_words():
    guard = guard_of(grower())
    guard.stand("here")
    broken(guard)
    guard.told.clear()
    guard.stand("here, again")
    broken(guard)
    epoch(guard.grower)
    guard.stand("later")
    broken(guard)
    reasons = [trip.reason for trip in guard.watch.trips]
    assert guard.told == [f"{reasons[1]}; the network went back to epoch 0", f"{reasons[2]}; the network went back to epoch 1"]


def test_an_event_tells_what_happened_and_which_seeds_came_and_went():
    events: list = []
    grown = growing(events)
    guard = guard_of(grown, events)
    guard.stand("here")
    stood = grown.epoch
    grown.apply(Decision(action="cull", seed="second#1", reason="it does not pay"))
    until(grown, "first#2", Stage.PROBATIONARY)
    grown.apply(germinate("norm", "second"))
    guard.gate(1.0)
    broken(guard)
    (told,) = [event for event in events if isinstance(event, RolledBack)]
    (trip,) = guard.watch.trips
    assert told == RolledBack(
        epoch=trip.epoch,
        to_epoch=stood,
        reason=trip.reason,
        numbers=trip.numbers,
        action="cull",
        rate_scale=1.0,
        trip=1,
        gone=("second#3",),
        returned=("second#1",),
    )
    assert told.epoch > told.to_epoch
    assert events.index(told) == len(events) - 1, "the culls come before it"
    assert rollbacks("growth", guard.watch) == (
        RollbackRecord(
            phase="growth",
            trip=1,
            epoch=trip.epoch,
            to_epoch=stood,
            reason=trip.reason,
            action="cull",
            seeds_culled=2,
            rate_scale=1.0,
        ),
    )


def test_a_run_that_goes_on_from_a_checkpoint_remembers_what_was_tried_in_vain():
    grown = grower()
    grown.apply(germinate("norm", "first"))
    first = guard_of(grown)
    first.stand("here")
    broken(first)
    resumed = grower()
    resumed.apply(germinate("norm", "first"))
    second = guard_of(resumed, watch=first.watch)
    second.stand("here", resumed=True)
    broken(second)
    assert [trip.remedy for trip in second.watch.trips] == ["cull", "cut_rate"]
    assert stages(resumed) == {}


def test_when_nothing_is_left_to_try_the_story_is_told_and_the_network_is_left_alone():
    events: list = []
    grown = grower()
    guard = guard_of(grown, events, max_rollbacks=1)
    guard.stand("here")
    epoch(grown)
    guard.gate(1.0)
    broken(guard)
    epoch(grown)
    stood = tensors_of(grown)
    with pytest.raises(
        TrainingDiverged, match=r"went back to epoch 0 and cut the learning rate.*1 rollbacks are allowed"
    ) as failed:
        guard.gate(math.inf)
    assert failed.value.fields["epoch"] == grown.epoch
    assert same(tensors_of(grown), stood)
    assert len(events) == 1


def test_a_governor_that_is_not_enabled_keeps_nothing_and_takes_nothing_back():
    grown = growing()
    guard = guard_of(grown, enabled=False)
    guard.stand("here")
    assert guard.snapshot is None
    for _ in range(9):
        guard.gate(1.0)
        guard.steps(1.0, 1)
        guard.decided(lambda: pytest.fail("nothing is kept"))
    guard.gate(1e9)
    stood = stages(grown)
    with pytest.raises(TrainingDiverged, match="the governor is not enabled"):
        guard.steps(math.nan, 1)
    assert stages(grown) == stood
    assert (guard.watch.trips, guard.told) == ((), [])
