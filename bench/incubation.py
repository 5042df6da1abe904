"""How a seed should learn before the network hears it: four modes of incubation, and the host continued, for the same FLOPs.

Protocol: ``bench/PROTOCOL.md``. Each RNG seed trains a host, then every arm goes on from that very host with the same budget.
    One JSON
line an arm is appended to ``bench/results/incubation.jsonl``; an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import copy
import statistics

import harness
import lab
import torch

from esperd.growth import Grower
from esperd.growth.contribution import Measured
from esperd.growth.interval import mean_interval
from esperd.messages.growth import Stage
from esperd.messages.jobs import CoAdaptation, Growth
from esperd.messages.policy import Arm, Decision

MODES = ("lookahead", "straight_through", "frozen_input", "joint")
ARMS = ("continued", *MODES, "joint_isolated")
"""``joint_isolated``: joint, but the host's gradient does not pass through the seeds."""
FULL = {"host_epochs": 12, "extra_host_epochs": 24, "batch_size": 128, "pretrain_rate": 0.1, "rate": 0.05}
QUICK = {"host_epochs": 3, "extra_host_epochs": 8, "batch_size": 64, "pretrain_rate": 0.1, "rate": 0.05}
STAYS = {"incubation_epochs": 2, "blending_epochs": 2, "shadowing_epochs": 1, "probation_epochs": 4}
SEEDS = (("depthwise", 0), ("conv_light", 1))
"""Blueprint and slot, by its number in order of execution."""


def growth_of(arm: str) -> Growth:
    """Settings of an arm."""
    if arm == "joint_isolated":
        return Growth(incubation="joint", co_adaptation=CoAdaptation(cnn=False), **STAYS)
    return Growth(incubation="joint" if arm == "continued" else arm, **STAYS)


def fossilize_all(grower: Grower) -> None:
    """Every seed on probation is kept: the arms differ in how seeds learn, not in which stay."""
    for seed in list(grower.network.seeds()):
        if seed.stage is Stage.PROBATIONARY and seed.contribution is not None:
            grower.apply(Decision(action="fossilize", seed=seed.name, reason="the bench keeps every seed"))


def run_arm(data: lab.Data, host: torch.nn.Module, arm: str, rng_seed: int, plan: dict) -> dict[str, object]:
    """One arm from a trained host."""
    grower = lab.grower_of(
        data,
        copy.deepcopy(host),
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=growth_of(arm),
        patterns=("features.stage?",),
        learning_rate=plan["rate"],
    )
    grower.sample = next(iter(lab.batches(data.train, plan["batch_size"], 77)))
    grower.measure(lab.in_order(data.gate))
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    began = lab.clock()
    if arm != "continued":
        grower.network.train()
        for blueprint, number in SEEDS:
            slot = grower.network.slots[number].slot
            refusal = grower.apply(
                Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), reason="as the protocol says")
            )
            if refusal:
                raise RuntimeError(f"{arm}: {refusal}")
    host_epoch = 3 * grower.ledger.cost("gate", "host") * len(data.train[0])
    switched: dict[str, float] = {}

    def decide(standing: Grower, _measured: Measured) -> None:
        fossilize_all(standing)
        for seed in standing.network.seeds():
            if seed.prospect is not None and seed.name not in switched:
                switched[seed.name] = -seed.prospect.loss / standing.gate_loss

    lab.train(
        grower,
        data,
        flops=plan["extra_host_epochs"] * host_epoch,
        phase=lab.Phase(plan["rate"], plan["batch_size"]),
        rng_seed=rng_seed,
        decide=decide,
    )
    return {
        **lab.result(grower, data, lab.clock() - began),
        "stages": [str(seed.stage) for seed in grower.network.seeds()],
        "switched_on_rise": switched,
    }


def host_of(data: lab.Data, rng_seed: int, plan: dict) -> torch.nn.Module:
    """A trained host."""
    host = lab.fresh_host(data, rng_seed)
    grower = lab.grower_of(data, host, rng_seed=rng_seed, batch_size=plan["batch_size"], learning_rate=plan["pretrain_rate"])
    grower.measure(lab.in_order(data.gate))
    host_epoch = 3 * grower.ledger.cost("gate", "host") * data.epoch_samples
    phase = lab.Phase(plan["pretrain_rate"], plan["batch_size"])
    lab.train(grower, data, flops=plan["host_epochs"] * host_epoch, phase=phase, rng_seed=rng_seed)
    for handle in list(host.modules()):
        handle._forward_hooks.clear()  # the slots of the grower that trained it
    return host


def paired(lines: lab.Lines, arm: str, other: str, figure: str) -> tuple[float, float, float, int]:
    """Mean over RNG seeds of arm minus other, with its 95 % t interval, in points."""
    by_seed = {(line["arm"], line["rng_seed"]): line for line in lines.lines}
    seeds = sorted({seed for _, seed in by_seed} & {seed for name, seed in by_seed if name == arm and (other, seed) in by_seed})
    values = torch.tensor([100 * (by_seed[arm, seed][figure] - by_seed[other, seed][figure]) for seed in seeds])
    return *mean_interval(values, 0.95), len(seeds)


def main() -> None:
    """Run what is missing, print, write."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=2)
    data = lab.load(chosen.data)
    plan = QUICK if chosen.quick or data.name == "digits" else FULL
    protocol = {
        "bench": "incubation",
        "data": data.name,
        "plan": plan,
        "stays": STAYS,
        "seeds": SEEDS,
        "arms": ARMS,
        "version": 1,
    }
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "incubation.jsonl", protocol, keep=not chosen.quick)
    for rng_seed in range(chosen.repeats):
        missing = [arm for arm in ARMS if not lines.has(arm=arm, rng_seed=rng_seed)]
        if not missing:
            continue
        host = host_of(data, rng_seed, plan)
        for arm in missing:
            lines.add({"arm": arm, "rng_seed": rng_seed, **run_arm(data, host, arm, rng_seed, plan)})
    figures = [
        harness.median_figure(
            f"{arm}/audit_accuracy",
            [line["audit_accuracy"] for line in lines.of(arm=arm)],
            unit="share",
            better="higher",
            against="continued",
            baseline=[line["audit_accuracy"] for line in lines.of(arm="continued")],
        )
        for arm in ARMS[1:]
    ]
    settings = {"data": data.name, "rng_seeds": chosen.repeats, "protocol": lines.digest, **plan}
    found = harness.results("incubation", figures, quick=chosen.quick, settings=settings)
    print(harness.table(found))
    for figure in ("gate_accuracy", "audit_accuracy"):
        print(f"\n{figure}, points over the host continued for the same FLOPs, mean over RNG seeds [95 %]")
        for arm in ARMS[1:]:
            mean, lower, upper, count = paired(lines, arm, "continued", figure)
            seconds = statistics.median(line["seconds"] for line in lines.of(arm=arm))
            print(f"  {arm:17} {mean:+.2f} [{lower:+.2f}, {upper:+.2f}]  n={count}  {seconds:.0f} s of processor time")
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
