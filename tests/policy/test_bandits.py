"""What learning is worth: over the same worlds and the same luck, those that learn regret less than those that do not."""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest
from bandit_world import run

LEARNING = ("ucb", "discounted_ucb", "thompson", "epsilon_greedy", "softmax", "contextual")
RNG_SEEDS = range(12)


@cache
def regret(name, **world):
    """Mean over the fixed RNG seeds."""
    return fmean(run(name, rng_seed=rng_seed, **world).regret for rng_seed in RNG_SEEDS)


@pytest.mark.parametrize("alike", [True, False], ids=["arms alike", "arms apart"])
@pytest.mark.parametrize("name", LEARNING)
def test_a_learning_strategy_regrets_less_than_the_baselines(name, alike):
    baselines = {baseline: regret(baseline, alike=alike) for baseline in ("first_arm", "uniform", "round_robin")}
    assert regret(name, alike=alike) < 0.8 * min(baselines.values()), baselines


def test_where_worth_drifts_evidence_that_fades_is_worth_more():
    assert regret("discounted_ucb", turn=60) < 0.9 * regret("ucb", turn=60)
    assert regret("discounted_ucb") > regret("ucb"), "where nothing drifts, forgetting costs"


def test_with_few_tries_what_arms_share_is_worth_most():
    few = {name: regret(name, points=20) for name in LEARNING}
    assert min(few, key=few.get) == "contextual", few


def test_the_first_arm_is_another_in_every_world():
    firsts = {
        max(run("first_arm", rng_seed=rng_seed, points=3).pulls.items(), key=lambda item: item[1])[0] for rng_seed in RNG_SEEDS
    }
    assert len(firsts) > 5
