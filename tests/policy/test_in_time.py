"""A seed gets as far as a verdict: it makes epochs dearer, and where cost bounds the job that takes some of them away."""

from __future__ import annotations

import pytest
from bandit_world import DECIDE
from policy_requests import observation, option, request, scouted, seed

from esperd.messages.growth import Stage
from esperd.messages.policy import PolicySettings

SMALL, LARGE = option("s1", "small", flops=100.0), option("s2", "large", flops=10_000.0)


def decided(name="ucb", **fields):
    seen = observation(**{"options": (SMALL, LARGE), "epochs_left": 12.0, "shortest_life_epochs": 9, **fields})
    return scouted(DECIDE[name], request(seen, policy=PolicySettings(strategy=name, max_fossilized=30))).decisions[-1]


@pytest.mark.parametrize("name", ["ucb", "first_arm", "gradient_merit", "contextual"])
def test_an_arm_that_leaves_no_time_for_its_own_verdict_is_not_grown(name):
    """The host costs 10,000: with the large arm 12 epochs become 6, with the small one 11.9."""
    for alone in ((LARGE,), (SMALL, LARGE)):
        wanted = decided(name, options=alone, epochs_left_by_cost=12.0)
        assert wanted.action == ("wait" if alone == (LARGE,) else "germinate"), wanted.reason
        if wanted.arm is not None:
            assert wanted.arm == SMALL.arm
    assert decided(name, options=(LARGE,), epochs_left_by_cost=18.0).action == "germinate"


def test_it_says_how_many_epochs_would_be_left():
    assert decided(options=(LARGE,), epochs_left_by_cost=12.0).reason == (
        "too late: with the cheapest of 1 arms in the network the budget allows 6.0 more epochs and a seed needs 9 to show what "
        "it brings"
    )


def test_seeds_that_stand_in_the_network_already_count_as_part_of_it():
    kept = tuple(seed(f"s3#{number}", stage=Stage.FOSSILIZED) for number in range(20))  # 20,000 in all
    assert decided(options=(LARGE,), epochs_left_by_cost=12.0, seeds=kept).action == "germinate"  # 12 become 9


def test_a_number_of_epochs_is_not_made_smaller_by_what_is_grown():
    assert decided(options=(LARGE,)).action == "germinate"
