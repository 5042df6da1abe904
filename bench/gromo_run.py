"""One run of the comparison with gromo, in a process of its own, so that its memory is its own: a JSON spec in, a JSON line out.

python bench/gromo_run.py '{"task": "digits", "arm": "tiny", "rng_seed": 0, "audit": true, ...}'
"""

from __future__ import annotations

import importlib
import json
import math
import resource
import sys
from dataclasses import replace
from pathlib import Path

import gromo_growth
import gromo_hosts
import growth_plan
import lab
import torch
from deciding import Deciding
from torch import nn

from esperd.errors import TrainingDiverged
from esperd.growth import Grower
from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Growth
from esperd.messages.policy import PolicySettings


def start(plan: dict, data: lab.Data, rng_seed: int) -> nn.Module:
    """The network that all arms of an RNG seed start from, its weights drawn from the seed."""
    torch.manual_seed(rng_seed)
    if plan["host"] == "dense":
        return gromo_hosts.dense(data.train[0][0].numel(), plan["hidden"])
    return gromo_hosts.residual(plan["planes"], tuple(plan["hidden"])).to(memory_format=torch.channels_last)


def final(plan: dict, data: lab.Data, rng_seed: int) -> nn.Module:
    """gromo's final architecture, from scratch."""
    torch.manual_seed(rng_seed)
    if plan["host"] == "dense":
        return gromo_hosts.dense(data.train[0][0].numel(), plan["final_hidden"])
    return gromo_hosts.residual(plan["planes"], tuple(plan["final_hidden"])).to(memory_format=torch.channels_last)


def run_gromo(plan: dict, data: lab.Data, method: str, rng_seed: int) -> tuple[nn.Module, dict[str, object]]:
    """gromo's side."""
    plain = start(plan, data, rng_seed)
    if plan["host"] == "dense":
        model = gromo_hosts.gromo_dense(data.train[0][0].numel(), plan["hidden"])
    else:
        model = gromo_hosts.gromo_residual(plan["planes"], tuple(plan["hidden"])).to(memory_format=torch.channels_last)
    gromo_hosts.copy_weights(plain, model, data.train[0][:8])
    done = gromo_growth.run(model, data, plan, method, rng_seed)
    return model, {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": {purpose: spent for purpose, spent in done.ledger.spent.items() if spent},
        "epochs": done.epoch,
        "decisions": done.told,
    }


def run_esperd(plan: dict, data: lab.Data, spec: dict) -> tuple[nn.Module, dict[str, object]]:
    """esperd's side, and the two controls, which train and do not grow."""
    arm, rng_seed = spec["arm"], spec["rng_seed"]
    host = final(plan, data, rng_seed) if arm == "final" else start(plan, data, rng_seed)
    by_hand = PolicySettings(**{"strategy": "ucb", "stop_rule": False, **plan["policy"]}), Growth(**plan["stays"])
    settings, growth = growth_plan.NOW.get(arm, by_hand)
    grower = lab.grower_of(
        data,
        host,
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=growth,
        settings=Gates(),
        patterns=tuple(plan["slots"]),
        learning_rate=plan["rate"],
    )
    first = grower.measure(lab.in_order(data.gate))
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    grower.sample = next(iter(lab.batches(data.train, plan["batch_size"], 77)))
    policy = Deciding(settings, rng_seed, spec["flops"], len(data.train[0]), most_parameters=spec["most_parameters"])
    grower.network.train()
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    grows = arm in ("esperd", growth_plan.DEFAULTS)
    try:
        if grows:
            policy(grower, first)
        lab.train(grower, data, flops=spec["flops"], phase=phase, rng_seed=rng_seed, decide=policy if grows else lab.nothing)
    except TrainingDiverged as error:
        policy.said.append(f"diverged: {error}")  # what is left is measured as it is, and the run counts
    grower.close()
    return grower.network, told_of(grower, policy.said)


def told_of(grower: Grower, said: list[str]) -> dict[str, object]:
    """What growing came to."""
    return {
        "parameters": grower.network.effective_parameters,
        "flops": {purpose: spent for purpose, spent in grower.ledger.spent.items() if spent},
        "epochs": grower.epoch,
        "kept": [f"{seed.blueprint} at {seed.record.slot}" for seed in grower.network.seeds() if seed.stage is Stage.FOSSILIZED],
        "decisions": said,
    }


def peak_mib() -> float:
    """The most memory this process ever held. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(spec: dict) -> dict[str, object]:
    """Run one arm of one RNG seed; the audit split is read here, once, and only where the spec asks for it."""
    torch.set_num_threads(1)
    plan = spec["plan"]
    data = lab.load(Path(spec["data"]) if spec["data"] else None)
    data = replace(data, train=tuple(part[: plan.get("train_samples")] for part in data.train))
    is_gromo = spec["arm"] in gromo_growth.METHODS
    if is_gromo:
        importlib.import_module("gromo.containers.growing_mlp")  # before memory is read: esperd is imported, too
        importlib.import_module("gromo.containers.resnet")
    before, began = peak_mib(), lab.clock()
    if is_gromo:
        network, told = run_gromo(plan, data, spec["arm"], spec["rng_seed"])
    else:
        network, told = run_esperd(plan, data, spec)
    seconds, peak = lab.clock() - began, peak_mib()
    line: dict[str, object] = {}
    for split in ("gate", "audit") if spec["audit"] else ("gate",):
        accuracy, loss = gromo_growth.measured(network, getattr(data, split))
        line |= {f"{split}_accuracy": accuracy, f"{split}_loss": loss if math.isfinite(loss) else None}
    return {**line, **told, "seconds": round(seconds, 2), "peak_mib": round(peak, 1), "added_mib": round(peak - before, 1)}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
