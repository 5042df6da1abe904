"""Did growing pay? A trained host grown by the policy ``ucb`` against the same host continued, for the same FLOPs, over RNG
seeds.

Protocol: ``bench/PROTOCOL.md``. What is grown, where and when is the strategy's to decide, on the gate split, with the default
gates; everything it tries is charged. One JSON line an arm is appended to ``bench/results/grown.jsonl``; an interrupted bench
goes on where it stopped.
"""

from __future__ import annotations

import copy

import harness
import incubation
import lab
import torch
from deciding import Deciding
from torch import nn

from esperd.messages.growth import Stage
from esperd.messages.jobs import Gates, Growth
from esperd.messages.policy import PolicySettings

FULL = {"host_epochs": 40, "extra_host_epochs": 44, "batch_size": 128, "pretrain_rate": 0.1, "rate": 0.1}
QUICK = {"host_epochs": 4, "extra_host_epochs": 10, "batch_size": 64, "pretrain_rate": 0.1, "rate": 0.05}
STAYS = {"incubation_epochs": 1, "blending_epochs": 1, "shadowing_epochs": 1, "probation_epochs": 3, "embargo_epochs": 1}
POLICY = PolicySettings(
    strategy="ucb", stop_rule=False, warmup_epochs=0, latest_germination=0.4, max_live_seeds=2, max_fossilized=2, patience=2
)


REGISTERED = (
    "strategy",
    "exploration",
    "rent_parameters",
    "rent_flops",
    "warmup_epochs",
    "latest_germination",
    "max_live_seeds",
    "max_fossilized",
    "nursery",
    "patience",
)
"""Keys of the policy when the protocol was registered."""


def run_arm(data: lab.Data, host: nn.Module, arm: str, rng_seed: int, plan: dict) -> dict[str, object]:
    """The host, grown or continued."""
    grower = lab.grower_of(
        data,
        copy.deepcopy(host),
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=Growth(**STAYS),
        settings=Gates(),
        patterns=("features.stage?",),
        learning_rate=plan["rate"],
    )
    first = grower.measure(lab.in_order(data.gate))
    host_epoch = 3 * grower.ledger.cost("gate", "host") * len(data.train[0])
    flops = plan["extra_host_epochs"] * host_epoch
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    grower.sample = next(iter(lab.batches(data.train, plan["batch_size"], 77)))
    policy = Deciding(POLICY, rng_seed, flops, len(data.train[0]))
    began = lab.clock()
    grower.network.train()
    if arm == "grown":
        policy(grower, first)
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    decide = policy if arm == "grown" else lab.nothing
    lab.train(grower, data, flops=flops, phase=phase, rng_seed=rng_seed, decide=decide)
    grower.close()
    kept = [f"{seed.blueprint} at {seed.record.slot}" for seed in grower.network.seeds() if seed.stage is Stage.FOSSILIZED]
    return {**lab.result(grower, data, lab.clock() - began), "kept": kept, "decisions": policy.said}


def main() -> None:
    """Run what is missing, print, write."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=2)
    data = lab.load(chosen.data)
    plan = QUICK if chosen.quick or data.name == "digits" else FULL
    protocol = {
        "bench": "grown",
        "data": data.name,
        "plan": plan,
        "stays": STAYS,
        "incubation": Growth().incubation,
        "policy": {name: getattr(POLICY, name) for name in REGISTERED},
        "version": 1,
    }
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "grown.jsonl", protocol, keep=not chosen.quick)
    for rng_seed in range(chosen.repeats):
        missing = [arm for arm in ("continued", "grown") if not lines.has(arm=arm, rng_seed=rng_seed)]
        if missing:
            host = incubation.host_of(data, rng_seed, plan)
            for arm in missing:
                lines.add({"arm": arm, "rng_seed": rng_seed, **run_arm(data, host, arm, rng_seed, plan)})
    figures = [
        harness.median_figure(
            f"grown/{figure}",
            [line[figure] for line in lines.of(arm="grown")],
            unit=unit,
            better=better,
            against="continued",
            baseline=[line[figure] for line in lines.of(arm="continued")],
        )
        for figure, unit, better in (("audit_accuracy", "share", "higher"), ("audit_loss", "nats", "lower"))
    ]
    settings = {
        "data": data.name,
        "rng_seeds": chosen.repeats,
        "protocol": lines.digest,
        "incubation": Growth().incubation,
        **plan,
    }
    found = harness.results("grown", figures, quick=chosen.quick, settings=settings)
    print(harness.table(found))
    mean, lower, upper, count = incubation.paired(lines, "grown", "continued", "audit_accuracy")
    kept = [len(line["kept"]) for line in lines.of(arm="grown")]
    print(
        f"\ngrown minus continued at equal FLOPs: {mean:+.2f} points of audit accuracy [{lower:+.2f}, {upper:+.2f}], n={count}; "
        f"seeds kept: {kept}"
    )
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
