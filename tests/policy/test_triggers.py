"""When to grow: each trigger fires where it says, by the request alone, and says why in numbers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_requests import observation, observations, policies, request

from esperd.builtins.strategies import STRATEGIES
from esperd.builtins.triggers import TRIGGERS
from esperd.declarations import resolve
from esperd.errors import HandlerFailed
from esperd.messages.policy import Decide, PolicySettings, Signal, SlotStatistics
from esperd.policy.trigger import with_signal
from esperd.policy.triggers.generalisation_gap import interval_of
from esperd.policy.triggers.plateau import Plateau, improvement, replayed

FIRES = {trigger.name: trigger.fires for trigger in TRIGGERS}
DECIDE = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}
GROWING = [name for name in DECIDE if name != "never"]

every = pytest.mark.parametrize("name", FIRES)
some = settings(max_examples=40, deadline=None)
losses = st.lists(st.floats(-2.0, 4.0), max_size=20).map(tuple)


def asked(name, policy=None, **seen):
    return with_signal(request(observation(**seen), policy=PolicySettings(trigger=name, **(policy or {}))), FIRES[name]).signal


def fired(name, policy=None, *, losses=(), train=(), epochs=None):
    """Epochs at which it fires, over a history that grows epoch by epoch."""
    count = len(losses) if epochs is None else epochs
    return [
        epoch
        for epoch in range(1, count + 1)
        if asked(name, policy, epoch=epoch, gate_losses=tuple(losses[:epoch]), train_losses=tuple(train[:epoch])).fires
    ]


# --- whatever is asked ---------------------------------------------------------------------------------------------------


@every
@some
@given(observations, losses, losses, policies)
def test_a_trigger_answers_by_the_request_alone_and_says_why(name, seen, train, gate, policy):
    told = msgspec.structs.replace(seen, train_losses=train, gate_losses=gate)
    wanted = request(told, policy=policy)
    first = resolve(FIRES[name])(wanted)
    again = resolve(FIRES[name])(msgspec.msgpack.decode(msgspec.msgpack.encode(wanted), type=Decide))
    assert first == again
    assert first.reason


@pytest.mark.parametrize("strategy", GROWING)
def test_when_the_trigger_does_not_fire_the_decision_is_to_wait_and_says_so(strategy):
    wanted = with_signal(request(observation(), policy=PolicySettings(trigger="never")), FIRES["never"])
    (decision,) = DECIDE[strategy](wanted).decisions
    assert (decision.action, decision.arm) == ("wait", None)
    assert decision.reason == "not now (never): the trigger never fires"


@pytest.mark.parametrize("strategy", GROWING)
@some
@given(observations, policies)
def test_the_trigger_always_changes_no_answer(strategy, seen, policy):
    plain = request(seen, policy=policy)
    assert DECIDE[strategy](with_signal(plain, FIRES["always"])) == DECIDE[strategy](plain)


def test_an_obstacle_is_told_before_the_trigger():
    wanted = with_signal(request(observation(epoch=0), policy=PolicySettings(trigger="never")), FIRES["never"])
    (decision,) = DECIDE["ucb"](wanted).decisions
    assert "warming up" in decision.reason


def test_a_strategy_does_not_take_a_trigger_that_was_not_asked_for_one_that_fires():
    with pytest.raises(HandlerFailed, match="'plateau' was not asked"):
        DECIDE["ucb"](request(observation(), policy=PolicySettings(trigger="plateau")))


def wordless(_request):
    return True


def test_what_is_no_signal_is_refused():
    with pytest.raises(HandlerFailed, match="must answer with Signal, not bool"):
        with_signal(request(observation(), policy=PolicySettings(trigger="mine")), f"{__name__}:wordless")


# --- plateau -------------------------------------------------------------------------------------------------------------


FALLING = (1.0, 0.9, 0.8, 0.7, 0.6)
PLATEAU = {"plateau_window": 2, "plateau_looks": 2, "plateau_improvement": 0.01, "plateau_release": 0.05}


def test_a_loss_that_falls_is_no_plateau_and_one_that_stands_is():
    assert fired("plateau", PLATEAU, losses=FALLING) == []
    assert fired("plateau", PLATEAU, losses=FALLING + (0.6,) * 5) == [8, 9, 10], "once two looks in a row saw no improvement"


def test_a_plateau_lasts_until_the_loss_clearly_improves_again():
    slowly = (0.585, 0.575, 0.565)  # by more than 1 %, by less than 5 %
    clearly = (0.5, 0.45)
    assert fired("plateau", PLATEAU, losses=FALLING + (0.6,) * 4 + slowly + clearly) == [8, 9, 10, 11, 12]
    assert fired("plateau", PLATEAU, losses=FALLING + slowly) == [], "such an improvement does not begin one"


def test_one_look_is_not_enough_and_one_bad_epoch_is_no_plateau():
    assert fired("plateau", {**PLATEAU, "plateau_looks": 1}, losses=(*FALLING, 0.6, 0.6)) == [7]
    assert fired("plateau", PLATEAU, losses=(*FALLING, 0.9, 0.5, 0.4)) == []


def test_a_plateau_is_told_in_numbers():
    assert (
        asked("plateau", gate_losses=(1.0, 0.9)).reason == "2 gate losses are too few to tell a plateau over 3 (plateau_window)"
    )
    standing = asked("plateau", PLATEAU, gate_losses=FALLING + (0.6,) * 4)
    assert standing.reason == (
        "on a plateau: the gate loss improved by 0.00% over the last 2 epochs, and not yet by more than 5.00% (plateau_release)"
    )
    assert "1 of 2 looks" in asked("plateau", PLATEAU, gate_losses=FALLING + (0.6,) * 2).reason


@pytest.mark.parametrize(
    ("losses", "found"),
    [((1.0, 0.5), 0.5), ((0.5, 1.0), -1.0), ((-1.0, -1.5), 0.5), ((0.0, 0.0), 0.0), ((0.0, -1.0), float("inf"))],
)
def test_improvement_is_a_share_of_the_loss_whatever_its_sign(losses, found):
    assert improvement(*losses) == found


@some
@given(st.lists(st.floats(0.1, 2.0), max_size=30), st.integers(1, 5))
def test_a_plateau_is_found_where_every_look_is_taken_at_the_whole_history(losses, window):
    policy = PolicySettings(plateau_window=window, plateau_looks=2)
    stands = Plateau()
    for looked in range(window + 1, len(losses) + 1):
        found = improvement(min(losses[: looked - window]), min(losses[looked - window : looked]))
        looks = stands.looks + 1 if found < policy.plateau_improvement else 0
        on = found <= policy.plateau_release if stands.on else looks >= policy.plateau_looks
        stands = Plateau(on=on, looks=looks, improvement=found)
    assert replayed(losses, policy) == stands


# --- periodic ------------------------------------------------------------------------------------------------------------


def test_periodic_fires_at_the_end_of_the_warm_up_and_every_so_many_epochs():
    assert fired("periodic", {"period": 3, "warmup_epochs": 2}, epochs=11) == [2, 5, 8, 11]
    assert asked("periodic", {"period": 3, "warmup_epochs": 2}, epoch=6).reason == (
        "epoch 6: the next time is epoch 8, every 3 (period)"
    )


# --- generalisation gap --------------------------------------------------------------------------------------------------


def test_a_network_that_underfits_is_grown_often_and_one_that_overfits_seldom():
    policy, flat = {"warmup_epochs": 1}, (1.0,) * 24
    often = fired("generalisation_gap", policy, train=flat, losses=(1.0,) * 24)
    seldom = fired("generalisation_gap", policy, train=flat, losses=(2.0,) * 24)
    assert often == list(range(1, 25))
    assert seldom == [1, 9, 17], "every 8 epochs (gap_longest), from the end of the warm-up"


def test_the_interval_is_half_the_longest_where_the_gap_is_at_its_centre():
    assert interval_of(0.2, PolicySettings()) == 4.0
    assert interval_of(-1e9, PolicySettings()) == 1.0
    assert interval_of(1e9, PolicySettings()) == 8.0


def test_without_a_train_loss_there_is_no_gap_to_go_by():
    said = asked("generalisation_gap", gate_losses=(1.0, 0.5), train_losses=())
    assert not said.fires
    assert "no gap to go by" in said.reason
    assert "+0.0%" in asked("generalisation_gap", gate_losses=(1.0, 1.0), train_losses=(1.0, 1.0)).reason


# --- gradient bottleneck -------------------------------------------------------------------------------------------------


def bottleneck(*gradients, ratio=2.0):
    told = tuple(SlotStatistics(slot=f"s{n}", gradient=gradient) for n, gradient in enumerate(gradients, start=1))
    return asked("gradient_bottleneck", {"bottleneck_ratio": ratio}, slot_statistics=told)


def test_a_bottleneck_is_a_slot_whose_gradient_stands_out():
    assert bottleneck(1.0, 4.0, 1.5).fires
    assert not bottleneck(1.0, 2.0, 1.5).fires
    assert bottleneck(1.0, 4.0).fires, "also where there are two slots"
    assert bottleneck(1.0, 4.0, 1.5).reason == (
        "the gradient at slot 's2' is 3.20 times the median of the other 2, 2 or more (bottleneck_ratio)"
    )


def test_what_was_not_measured_is_no_bottleneck():
    for said in (bottleneck(), bottleneck(4.0), bottleneck(4.0, None), bottleneck(None, None)):
        assert not said.fires
        assert "2 are needed" in said.reason
    assert not bottleneck(1.0, 0.0, 0.0).fires


def test_a_signal_is_plain_data():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(bottleneck()), type=Signal) == bottleneck()
