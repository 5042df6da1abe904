"""The arms of H2 on a small budget: every score speaks of every arm, and what is picked and trained is charged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import choosing  # noqa: E402 - found where the line above says
import growth_plan  # noqa: E402
import incubation  # noqa: E402
import lab  # noqa: E402

PLAN = {**growth_plan.QUICK, "host_epochs": 1, "arm_epochs": 20, "rate": 0.005}

BUDGET = 10.0
"""Host-epochs."""


@pytest.fixture(scope="module")
def tiny():
    """Digits, and a host that was trained for an epoch."""
    torch.set_num_threads(1)
    data = lab.load(None)
    return data, incubation.host_of(data, 0, PLAN)


def test_a_cheap_score_speaks_of_every_arm_and_tells_what_it_cost(tiny, monkeypatch):
    monkeypatch.setattr(choosing, "LENGTHS", (0.5,))
    monkeypatch.setattr(choosing, "BLUEPRINTS", ("conv_light", "squeeze_excite"))
    data, host = tiny
    arms = {choosing.name_of(arm) for arm in choosing.arms_of(choosing.grower_of(data, host, 0, PLAN))}
    told = choosing.score_arms(data, host, 0, PLAN)
    assert set(told["scores"]) == set(told["costs"]) == {"merit", "contest 0.5 flops", "contest 0.5 steps", "prospect"}
    assert all(set(score) == arms for score in told["scores"].values())
    assert all(value is not None and value > 0 for value in told["scores"]["merit"].values())
    assert all(cost > 0 for cost in told["costs"].values())


def test_a_strategy_picks_an_arm_that_is_then_trained_on_the_budget(tiny):
    data, host = tiny
    picked = choosing.pick(data, host, growth_plan.PICKING["gradient_merit"], 0, PLAN)
    assert picked["picked"] in {choosing.name_of(arm) for arm in choosing.arms_of(choosing.grower_of(data, host, 0, PLAN))}
    assert picked["cost"] > 0
    trained = choosing.train_arm(data, host, picked["picked"], 0, PLAN, host_epochs=BUDGET)
    alone = choosing.train_arm(data, host, "continued", 0, PLAN, host_epochs=BUDGET)
    assert trained["parameters"] > alone["parameters"]
    assert (trained["contribution"] is None, alone["contribution"]) == (False, None)
    for line in (trained, alone):
        spent, _ = line["curve"][-1]
        assert BUDGET / 2 < spent < 1.5 * BUDGET, "whole epochs of a network that costs more than the host"
