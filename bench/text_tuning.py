"""The rate of the text bench: its host trained at each rate of a grid, on RNG seeds of its own; the gate split alone is read."""

from __future__ import annotations

import harness
import improving
import lab
import torch

from esperd.growth import measure

RATES = (0.003, 0.01, 0.03)
RNG_SEEDS = (100, 101)
PLAN = {"host_epochs": 18, "batch_size": 32}


def run(data: lab.Data, rng_seed: int, rate: float) -> dict[str, object]:
    """The host trained at one rate."""
    host = lab.fresh_host(data, rng_seed)
    grower = lab.grower_of(data, host, rng_seed=rng_seed, batch_size=PLAN["batch_size"], learning_rate=rate, patterns=data.slots)
    began = lab.clock()
    flops = PLAN["host_epochs"] * improving.host_epoch_flops(data)
    lab.train(grower, data, flops=flops, phase=lab.Phase(rate, PLAN["batch_size"]), rng_seed=rng_seed)
    seconds = round(lab.clock() - began, 2)
    gate, train = (measure(grower.network, lab.in_order(split), lab.loss, lab.accuracy) for split in (data.gate, data.train))
    return {"gate_loss": gate.mean_loss, "gate_accuracy": gate.mean_metric, "train_loss": train.mean_loss, "seconds": seconds}


def main() -> None:
    """Run what is missing, print."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=len(RNG_SEEDS), quick_repeats=1)
    data = lab.load(chosen.data)
    protocol = {"bench": "text_tuning", "data": data.name, "plan": PLAN, "version": 2}
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "text_tuning.jsonl", protocol, keep=not chosen.quick)
    for rng_seed in RNG_SEEDS[: chosen.repeats]:
        for rate in RATES:
            if not lines.has(rng_seed=rng_seed, rate=rate):
                lines.add({"rng_seed": rng_seed, "rate": rate, **run(data, rng_seed, rate)})
    for rate in RATES:
        found = [line["gate_loss"] for line in lines.of(rate=rate)]
        print(f"rate {rate:g}: gate loss {sum(found) / len(found):.4f}, mean of {len(found)}")


if __name__ == "__main__":
    main()
