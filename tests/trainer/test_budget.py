"""What a budget allows, how much of it is gone, and the learning rate that follows from it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esperd.messages.jobs import Budget, Optimizer, Scheduler
from esperd.trainer.budget import Spent, epochs_left, learning_rate, progress


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


def test_epochs_left_are_unknown_while_no_epoch_was_measured():
    assert epochs_left(Budget(flops=1200.0, seconds=8.0), spent(), epoch_flops=None, epoch_seconds=None) is None


def test_a_constant_learning_rate_stays():
    assert learning_rate(Optimizer(learning_rate=0.1), Scheduler(name="constant"), 0.7) == 0.1


@pytest.mark.parametrize(("share", "factor"), [(0.0, 1.0), (1 / 3, 0.75), (0.5, 0.5), (2 / 3, 0.25), (1.0, 0.0), (1.5, 0.0)])
def test_cosine_follows_half_a_cosine_and_stays_down(share, factor):
    assert learning_rate(Optimizer(learning_rate=0.1), Scheduler(), share) == pytest.approx(0.1 * factor, abs=1e-12)


@given(share=st.floats(0.0, 2.0), final=st.floats(0.0, 1.0))
def test_cosine_never_leaves_the_range_between_its_ends(share, final):
    rate = learning_rate(Optimizer(learning_rate=0.1), Scheduler(final_share=final), share)
    assert 0.1 * final - 1e-12 <= rate <= 0.1 + 1e-12
    assert math.isfinite(rate)
