"""What a budget allows, how much of it is gone, and the learning rate that follows from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.errors import ImportFailed, InvalidJob
from esperd.messages.jobs import Budget, Scheduler
from esperd.trainer.budget import Spent, epochs_left, epochs_left_by_cost, progress, resolve_schedule


def spent(**fields):
    return Spent(**{"steps": 30, "steps_per_epoch": 10, "flops": 600.0, "seconds": 6.0, **fields})


@pytest.mark.parametrize(
    ("budget", "share"),
    [
        (Budget(epochs=12), 0.25),
        (Budget(flops=1200.0), 0.5),
        (Budget(seconds=8.0), 0.75),
        (Budget(epochs=12, flops=1200.0, seconds=8.0), 0.75),
        (Budget(epochs=3), 1.0),
        (Budget(flops=300.0), 2.0),
        (Budget(flops=0.0), 1.0),
    ],
)
def test_the_limit_that_is_nearest_says_how_much_is_gone(budget, share):
    assert progress(budget, spent()) == share


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (Budget(epochs=12), 9.0),
        (Budget(flops=1200.0), 3.0),
        (Budget(seconds=8.0), 1.0),
        (Budget(epochs=12, flops=1200.0, seconds=8.0), 1.0),
        (Budget(epochs=2), 0.0),
    ],
)
def test_the_limit_that_is_nearest_says_how_many_epochs_are_left(budget, left):
    assert epochs_left(budget, spent(), epoch_flops=200.0, epoch_seconds=2.0) == left


@pytest.mark.parametrize(
    ("budget", "left"),
    [(Budget(epochs=2), None), (Budget(epochs=2, flops=1200.0), 3.0), (Budget(flops=1200.0, seconds=8.0), 1.0)],
)
def test_what_limits_on_cost_allow_does_not_go_by_a_number_of_epochs(budget, left):
    assert epochs_left_by_cost(budget, spent(), epoch_flops=200.0, epoch_seconds=2.0) == left


def test_epochs_left_are_unknown_while_no_epoch_was_measured():
    assert epochs_left(Budget(flops=1200.0, seconds=8.0), spent(), epoch_flops=None, epoch_seconds=None) is None


def test_a_constant_learning_rate_stays():
    assert resolve_schedule(Scheduler(name="constant"))(0.7) == 1.0


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0), (1.5, 0.0)])
def test_cosine_follows_half_a_cosine_and_stays_down(share, factor):
    assert resolve_schedule(Scheduler())(share) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (0.5, 0.6), (1.0, 0.2), (1.5, 0.2)])
def test_linear_falls_evenly_to_its_final_share(share, factor):
    assert resolve_schedule(Scheduler(name="linear", final_share=0.2))(share) == pytest.approx(factor)


@given(share=st.floats(0.0, 2.0), final=st.floats(0.0, 1.0), name=st.sampled_from(["cosine", "linear"]))
def test_no_shape_leaves_the_range_between_its_ends(share, final, name):
    rate = resolve_schedule(Scheduler(name=name, final_share=final))(share)
    assert final - 1e-12 <= rate <= 1.0 + 1e-12
    assert math.isfinite(rate)


def test_a_warm_up_rises_to_the_top_and_the_shape_follows_over_what_is_left():
    schedule = resolve_schedule(Scheduler(warmup_share=0.2))
    shape = resolve_schedule(Scheduler())
    assert [schedule(share) for share in (0.0, 0.05, 0.1, 0.2)] == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert schedule(0.6) == pytest.approx(shape(0.5))
    assert schedule(1.0) == pytest.approx(0.0)


def halving(share):
    return 0.5**share


def negative(share):
    return -share


def failing(share):
    raise ArithmeticError("no rate")


def test_a_schedule_may_be_the_users_own():
    assert resolve_schedule(Scheduler(name=f"{__name__}:halving"))(1.0) == 0.5


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (f"{__name__}:negative", InvalidJob, "returned -0.5 for 0.5; it must return the learning rate as a share"),
        (f"{__name__}:failing", InvalidJob, "raised ArithmeticError for 0.0: no rate"),
        (f"{__name__}:absent", ImportFailed, "has no 'absent'"),
    ],
)
def test_a_schedule_that_gives_no_rate_is_refused_before_anything_is_trained(name, error, message):
    with pytest.raises(error, match=message):
        resolve_schedule(Scheduler(name=name))
