"""A job's default settings: candidates for how long a seed stays and when it may be germinated, on RNG seeds of their own; the
gate split alone is read.

Protocol: ``bench/PROTOCOL.md``. A host is grown on a budget by each candidate, and trained alone for the same FLOPs; it has been
trained before (``trained``) or not (``fresh``).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import growth_plan
import harness
import improving
import incubation
import lab
import torch
from torch import nn

from esperd.messages.jobs import Growth
from esperd.messages.policy import PolicySettings

FIRST_RNG_SEED = 100
"""Which none of the ten of ``bench/growth.py`` is."""
SCENARIOS = {"trained": (40, 36), "fresh": (0, 76)}
"""Epochs of the host before, and of the budget."""
TEXT_SCENARIOS = {"trained": (18, 24), "fresh": (0, 42)}
"""The same on text."""
SHORT = {"growth": improving.STAYS, "policy": {"patience": 2}}
CANDIDATES: dict[str, dict[str, dict[str, Any]]] = {
    "before": {},
    "early": {"policy": {"latest_germination": 0.4}},
    "short": SHORT,
    "short_early": {**SHORT, "policy": {"patience": 2, "latest_germination": 0.4}},
    "short_early_two": {**SHORT, "policy": {"patience": 2, "latest_germination": 0.4, "max_fossilized": 2}},
    "at_once": {**SHORT, "policy": {"patience": 2, "latest_germination": 0.4, "max_fossilized": 2, "warmup_epochs": 0}},
    "short_stop": {**SHORT, "policy": {"patience": 2, "stop_rule": True}},
    "short_stop_2": {**SHORT, "policy": {"patience": 2, "stop_rule": True}},
    "short_per_parameter": {**SHORT, "policy": {"patience": 2, "strategy": "merit_per_parameter"}},
}
"""What differs from a job's defaults as they were when this was registered. ``at_once``: ``grown`` of ``bench/growth.py``.
``short_stop``, ``short_per_parameter``, ``short_stop_2`` (the same once the rule asks of every arm what it asked of the one that
promises most): registered when the others were known, and ``short`` had become the default.
"""
ALONE = "alone"
PLAN = {"batch_size": 128, "rate": 0.1, "pretrain_rate": 0.1}
DIGITS = {"batch_size": 64, "rate": 0.05, "pretrain_rate": 0.1}
TEXT = {"batch_size": 32, "rate": 0.01, "pretrain_rate": 0.01}
"""As in ``bench/growth.py``."""


def setting_of(data: lab.Data) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Rates and batches, and scenarios, for a data set."""
    if data.vocabulary:
        return TEXT, TEXT_SCENARIOS
    return (DIGITS if data.name == "digits" else PLAN), SCENARIOS


def settings_of(candidate: str) -> tuple[PolicySettings, Growth]:
    """What a job would be run with."""
    changed = CANDIDATES[candidate]
    return (
        PolicySettings(**{**growth_plan.POLICY_BEFORE, **changed.get("policy", {})}),
        Growth(**{**growth_plan.GROWTH_BEFORE, **changed.get("growth", {})}),
    )


def run(data: lab.Data, scenario: str, candidate: str, rng_seed: int, plan: dict[str, Any], host: nn.Module) -> dict[str, object]:
    """One host, grown or trained alone; of its end what the gate split says."""
    _, budget = setting_of(data)[1][scenario]
    plan = {**plan, "extra_host_epochs": budget}
    if candidate == ALONE:
        line = improving.train_alone(data, host, rng_seed, plan, host_epochs=budget, rate=plan["rate"])
    else:
        line = improving.grow(data, host, rng_seed, plan, *settings_of(candidate))
    return {name: value for name, value in line.items() if not name.startswith("audit")}


def host_of(data: lab.Data, scenario: str, rng_seed: int, plan: dict[str, Any]) -> nn.Module:
    """The host that a scenario starts from."""
    before, _ = setting_of(data)[1][scenario]
    return incubation.host_of(data, rng_seed, {**plan, "host_epochs": before}) if before else lab.fresh_host(data, rng_seed)


def parser() -> argparse.ArgumentParser:
    """Which of it."""
    made = harness.parser(__doc__.partition("\n\n")[0].replace("\n", " "), repeats=4, quick_repeats=1)
    made.add_argument("--scenario", choices=SCENARIOS, action="append", help="run only this one; may be repeated")
    made.add_argument("--candidate", choices=(*CANDIDATES, ALONE), action="append", help="run only this one; may be repeated")
    made.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many seconds")
    return made


def main() -> None:
    """Run what is missing, print."""
    torch.set_num_threads(1)
    chosen = harness.parsed(parser())
    until = time.time() + chosen.seconds
    data = lab.load(chosen.data)
    plan, offered = setting_of(data)
    protocol = {"bench": "defaults", "data": data.name, "plan": plan, "scenarios": offered, "version": 1}
    kept = Path(harness.REPOSITORY / "bench" / "results" / "defaults.jsonl")
    lines = lab.Lines(kept, protocol, keep=not chosen.quick)
    scenarios = chosen.scenario or list(offered)
    candidates = chosen.candidate or [*CANDIDATES, ALONE]
    for rng_seed in range(FIRST_RNG_SEED, FIRST_RNG_SEED + chosen.repeats):
        for scenario in scenarios:
            missing = [name for name in candidates if not lines.has(scenario=scenario, candidate=name, rng_seed=rng_seed)]
            host = host_of(data, scenario, rng_seed, plan) if missing and time.time() < until else None
            for name in missing:
                if host is not None and time.time() < until:
                    found = run(data, scenario, name, rng_seed, plan, host)
                    lines.add({"scenario": scenario, "candidate": name, "rng_seed": rng_seed, **found})
    print(table(lines))


def table(lines: lab.Lines) -> str:
    """Gate accuracy of every candidate over the host trained alone, in points, mean over the RNG seeds that both have."""
    told = []
    for scenario in SCENARIOS:
        alone = {line["rng_seed"]: line["gate_accuracy"] for line in lines.of(scenario=scenario, candidate=ALONE)}
        for name in CANDIDATES:
            found = [line for line in lines.of(scenario=scenario, candidate=name) if line["rng_seed"] in alone]
            gains = [100 * (line["gate_accuracy"] - alone[line["rng_seed"]]) for line in found]
            if gains:
                seeds = [len(line["kept"]) for line in found]
                told.append(
                    f"{scenario:8} {name:16} {sum(gains) / len(gains):+.2f} points, "
                    f"from {min(gains):+.2f} to {max(gains):+.2f}; seeds kept: {seeds}"
                )
    return "\n".join(told)


if __name__ == "__main__":
    main()
