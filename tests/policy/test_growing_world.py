"""What the stop rule is worth, in simulated worlds where growing and training on compete for the same FLOPs: it saves what seeds
that bring little would take, and costs next to nothing where seeds bring much.
"""

from __future__ import annotations

from functools import cache
from statistics import fmean

import msgspec
import pytest
from growing_world import SETTINGS, World, final_loss

RNG_SEEDS = range(8)
UNFINISHED = World(rate=0.02, worth=0.0)
POOR = World(rate=0.05, worth=0.01, overstated=4.0)
RICH = World(rate=0.1, worth=0.05)


@cache
def ended(world, **policy):
    """Mean final loss and mean number of germinations, over the fixed RNG seeds."""
    settings = msgspec.structs.replace(SETTINGS, **policy)
    runs = [final_loss(world, rng_seed=rng_seed, policy=settings) for rng_seed in RNG_SEEDS]
    return fmean(loss for loss, _, _ in runs), fmean(germinated for _, germinated, _ in runs)


@pytest.mark.parametrize("world", [UNFINISHED, POOR], ids=["worthless seeds", "seeds that show four times their worth"])
def test_the_stop_rule_saves_what_seeds_of_little_worth_would_take(world):
    (loss, germinated), (stopped, fewer) = ended(world), ended(world, stop_rule=True)
    assert stopped < loss - 0.02
    assert fewer < 0.6 * germinated
    assert ended(world, trigger="never")[0] < stopped, "what it took to find out is lost"


def test_it_costs_next_to_nothing_where_growing_is_what_lowers_the_loss():
    loss, stopped, never = (ended(RICH, **policy)[0] for policy in ({}, {"stop_rule": True}, {"trigger": "never"}))
    assert max(loss, stopped) < never - 0.03
    assert stopped < loss + 0.02


def test_a_trigger_that_waits_for_a_plateau_grows_the_less_the_longer_the_loss_still_falls():
    assert ended(UNFINISHED, trigger="plateau")[1] == 0.0
    assert 0.0 < ended(RICH, trigger="plateau")[1] < ended(RICH)[1]
