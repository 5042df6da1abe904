"""The arms of H2 on a small budget: every score speaks of every arm, and what is picked and trained is charged."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

import choosing  # noqa: E402 - found where the line above says
import defaults  # noqa: E402
import growth_plan  # noqa: E402
import improving  # noqa: E402
import incubation  # noqa: E402
import lab  # noqa: E402
from deciding import Deciding, standing  # noqa: E402

from esperd.messages.jobs import Growth  # noqa: E402
from esperd.messages.policy import Decided, Observation, PolicySettings  # noqa: E402
from esperd.policy.stop_rule import epoch_flops  # noqa: E402

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
    assert (
        set(told["scores"])
        == set(told["costs"])
        == {"merit", "contest 0.5 flops", "contest 0.5 steps", "prospect", "incubation loss"}
    )
    assert all(set(score) == arms for score in told["scores"].values())
    assert all(value is not None and value > 0 for value in told["scores"]["merit"].values())
    assert all(loss < 0 for loss in told["scores"]["incubation loss"].values()), "a loss, its sign turned"
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


@pytest.mark.parametrize("trigger", ["generalisation_gap", "gradient_bottleneck"])
def test_a_trigger_is_shown_what_it_reads(tiny, trigger, monkeypatch):
    data, host = tiny
    grower = improving.grower_of(data, copy.deepcopy(host), 0, PLAN, growth_plan.growth())
    measured, host_epoch = standing(data, grower, PLAN["batch_size"])
    settings = PolicySettings(trigger=trigger, warmup_epochs=0, max_live_seeds=1)
    deciding = Deciding(settings, 0, 4 * host_epoch, data.epoch_samples)
    said: list[Decided] = []
    ask = deciding.ask
    monkeypatch.setattr(deciding, "ask", lambda *of: said.append(ask(*of)) or said[-1])
    deciding(grower, measured)
    phase = lab.Phase(PLAN["rate"], PLAN["batch_size"])
    budget = 2.5 * host_epoch
    lab.train(grower, data, flops=budget, phase=phase, rng_seed=0, decide=deciding, losses=deciding.train_losses)
    first, later = said[0].decisions[0].reason, said[1].decisions[0].reason
    assert any(word in first for word in ("no epoch after the warm-up has a train loss", "measured at 0 slots"))
    assert "no epoch" not in later
    assert "measured at 0" not in later
    assert len(deciding.train_losses) == len(deciding.gate_losses) - 1 >= 2


def test_a_stop_rule_is_shown_what_training_took_and_what_measuring_arms_took(tiny, monkeypatch):
    data, host = tiny
    grower = improving.grower_of(data, copy.deepcopy(host), 0, PLAN, growth_plan.growth())
    measured, host_epoch = standing(data, grower, PLAN["batch_size"])
    settings = PolicySettings(stop_rule=True, warmup_epochs=0, max_live_seeds=1)
    deciding = Deciding(settings, 0, 6 * host_epoch, data.epoch_samples)
    seen: list[Observation] = []
    show = deciding._observe
    monkeypatch.setattr(deciding, "_observe", lambda *of: seen.append(show(*of)) or seen[-1])
    deciding(grower, measured)
    lab.train(grower, data, flops=2.5 * host_epoch, phase=lab.Phase(0.05, 64), rng_seed=0, decide=deciding)
    last = seen[-1]
    assert len(last.gate_flops) == len(last.trial_flops) == len(last.gate_losses)
    assert last.gate_flops[0] == 0.0 < last.trial_flops[-1], "merits were measured after the first point"
    assert epoch_flops(last) == pytest.approx(host_epoch, rel=0.6), "an epoch, its seed and its passes, without the merits"


def test_a_candidate_for_the_defaults_differs_from_those_before_and_the_last_is_what_growing_was_measured_with():
    settings = {name: defaults.settings_of(name) for name in defaults.CANDIDATES}
    assert settings.pop("short_stop") == settings["short_stop_2"], "the rule changed, not the settings"
    assert len(set(map(repr, settings.values()))) == len(settings)
    assert settings["at_once"] == (growth_plan.policy(), growth_plan.growth())
    assert settings["before"] == growth_plan.STRATEGIES["job_defaults_2"]


def test_defaults_are_compared_with_the_host_trained_alone(tmp_path):
    lines = lab.Lines(tmp_path / "lines.jsonl", {"bench": "defaults"}, keep=False)
    for rng_seed, alone, grown in ((100, 0.5, 0.52), (101, 0.6, 0.61)):
        lines.add({"scenario": "fresh", "candidate": defaults.ALONE, "rng_seed": rng_seed, "gate_accuracy": alone})
        lines.add({"scenario": "fresh", "candidate": "early", "rng_seed": rng_seed, "gate_accuracy": grown, "kept": [["a", "b"]]})
    lines.add({"scenario": "fresh", "candidate": "early", "rng_seed": 102, "gate_accuracy": 0.9, "kept": []})
    assert defaults.table(lines) == "fresh    early            +1.50 points, from +1.00 to +2.00; seeds kept: [1, 1]"


def test_a_job_that_sets_nothing_is_what_the_last_bench_of_defaults_ran():
    assert {growth_plan.DEFAULTS: (PolicySettings(), Growth())} == growth_plan.NOW, "another default is another arm"


def test_seeds_born_as_zero_and_at_random_are_blended_in_alike_and_end_apart(tiny):
    data, host = tiny
    zero, random = (choosing.train_born(data, host, birth, 0, {**PLAN, "arm_epochs": 24}) for birth in growth_plan.BIRTHS)
    assert zero["alphas"] == random["alphas"] == [1.0, 1.0]
    assert zero["gate_loss"] != random["gate_loss"]
