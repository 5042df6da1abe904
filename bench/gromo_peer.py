"""esperd against gromo 0.1.0, the one growing library that pip installs: the same start, data, FLOPs and most parameters.

Protocol: ``bench/PROTOCOL.md``. Each run is a process of its own (``bench/gromo_run.py``), one JSON line a run is appended to
``bench/results/gromo.jsonl``; an interrupted bench goes on where it stopped. gromo is installed by ``make bench-deps``.

    python bench/gromo_peer.py --data ../shared/data/cifar10_16x16.npz     # digits and CIFAR; without a file digits alone
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import growth_plan
import harness
import lab
import torch
from gromo_growth import METHODS

from esperd.growth.interval import mean_interval

RUN = Path(__file__).with_name("gromo_run.py")
TUNING_SEEDS = (100, 101)
RATES = (0.05, 0.1, 0.2)
OURS = ("esperd", growth_plan.DEFAULTS)
"""``esperd`` as registered, with stays and limits by hand and the strategy ``ucb``; and, registered when that was known, as a job
grows that sets nothing.
"""
CONTROLS = ("host", "final")
"""``host``: the start, not grown; ``final``: gromo's final architecture from scratch."""
DENSE = {
    "host": "dense",
    "slots": ("1", "2"),
    "batch_size": 64,
    "statistics_samples": 1077,
    "first_epochs": 10,
    "between_epochs": 10,
    "last_epochs": 50,
    "stays": {"incubation_epochs": 2, "blending_epochs": 2, "shadowing_epochs": 1, "probation_epochs": 3, "embargo_epochs": 1},
    "policy": {"warmup_epochs": 0, "latest_germination": 0.5, "max_live_seeds": 2, "max_fossilized": 8, "patience": 2},
}
TASKS: dict[str, dict] = {
    "digits": {
        **DENSE,
        "hidden": 8,
        "final_hidden": 16,
        "grow": ((0, 4), (1, 4), (0, 4), (1, 4)),
        "rates": (0.02, *RATES),
        "methods": METHODS,
        "controls": CONTROLS,
    },
    "digits_narrow": {
        **DENSE,
        "hidden": 4,
        "final_hidden": 12,
        "grow": ((0, 4), (1, 4), (0, 4), (1, 4)),
        "rates": (0.02, *RATES),
        "methods": ("tiny",),
        "controls": (),
    },
    "cifar": {
        "host": "residual",
        "planes": 8,
        "hidden": (2, 4, 8),
        "final_hidden": (8, 16, 32),
        "slots": ("1.?",),
        "train_samples": 10_000,
        "batch_size": 128,
        "statistics_samples": 2048,
        "first_epochs": 1,
        "between_epochs": 1,
        "last_epochs": 4,
        "grow": ((0, 6), (1, 12), (2, 24)),
        "stays": {
            "incubation_epochs": 1,
            "blending_epochs": 1,
            "shadowing_epochs": 1,
            "probation_epochs": 2,
            "embargo_epochs": 1,
        },
        "policy": {"warmup_epochs": 0, "latest_germination": 0.5, "max_live_seeds": 3, "max_fossilized": 6, "patience": 2},
        "rates": RATES,
        "methods": ("tiny",),
        "controls": (),
    },
}
QUICK = {
    **TASKS["digits"],
    "first_epochs": 2,
    "between_epochs": 1,
    "last_epochs": 4,
    "rates": (0.1,),
    "methods": ("tiny",),
    "controls": (),
}
FIGURES = (
    ("accuracy", "audit_accuracy", "share", "higher"),
    ("seconds", "seconds", "s", "lower"),
    ("memory", "added_mib", "MiB", "lower"),
    ("parameters", "parameters", "", "lower"),
    ("flops", "flops", "FLOP", "lower"),
)


class Comparison:
    """One task: what is tuned, what is run, what came out.

    Args:
        task: its name.
        plan: see :data:`TASKS`.
        data: an ``.npz`` file; None: digits.
        lines: what is known.
    """

    def __init__(self, task: str, plan: dict, data: Path | None, lines: lab.Lines) -> None:
        self.task, self.plan, self._data, self.lines = task, plan, data, lines
        self.rates: dict[str, float] = {}
        self.method = plan["methods"][0]

    def run(self, repeats: int) -> None:
        """Tune, then run what is missing: first what is compared, then the rest."""
        for arm in (*self.plan["methods"], *OURS):
            for rate in self.plan["rates"] if len(self.plan["rates"]) > 1 else ():
                for rng_seed in TUNING_SEEDS:
                    self._line(arm, rng_seed, rate, tuning=True)
            self.choose()
        for arms in ((self.method, *OURS), (*self.plan["methods"], *self.plan["controls"])):
            for rng_seed in range(repeats):
                for arm in arms:
                    self._line(arm, rng_seed, self.rates[arm], tuning=False)

    def choose(self) -> None:
        """Rates and gromo's variant with the best mean gate accuracy over the tuning seeds, as far as they are known."""
        for arm in (*self.plan["methods"], *OURS):
            self.rates[arm] = max(self.plan["rates"], key=lambda rate: self._tuned(arm, rate))
        self.method = max(self.plan["methods"], key=lambda method: self._tuned(method, self.rates[method]))
        self.rates |= dict.fromkeys(self.plan["controls"], self.rates["esperd"])

    def _tuned(self, arm: str, rate: float) -> float:
        known = self.lines.of(task=self.task, arm=arm, rate=rate, tuning=True)
        return statistics.mean(line["gate_accuracy"] for line in known) if known else 0.0

    def _line(self, arm: str, rng_seed: int, rate: float, *, tuning: bool) -> None:
        key = {"task": self.task, "arm": arm, "rng_seed": rng_seed, "rate": rate, "tuning": tuning}
        if self.lines.has(**key):
            return
        spec = {
            "arm": arm,
            "rng_seed": rng_seed,
            "audit": not tuning,
            "data": str(self._data) if self._data else None,
            "plan": {**self.plan, "rate": rate},
            "flops": None,
            "most_parameters": None,
        }
        if arm not in METHODS:
            given = {"task": self.task, "arm": self.method, "rng_seed": rng_seed, "rate": self.rates[self.method]}
            peer = self.lines.of(**given)[-1]
            spec |= {"flops": sum(peer["flops"].values()), "most_parameters": peer["parameters"]}
        done = subprocess.run([sys.executable, str(RUN), json.dumps(spec)], stdout=subprocess.PIPE, text=True, check=True)
        self.lines.add({**key, **json.loads(done.stdout.splitlines()[-1])})

    def runs(self, arm: str) -> dict[int, dict]:
        """An arm's lines, by RNG seed."""
        found = self.lines.of(task=self.task, arm=arm, rate=self.rates[arm], tuning=False)
        return {line["rng_seed"]: line for line in sorted(found, key=lambda line: line["rng_seed"])}

    def paired(self, arm: str, other: str, figure: str) -> tuple[list[float], list[float]]:
        """A figure of two arms on the RNG seeds that both have run."""
        ours, theirs = self.runs(arm), self.runs(other)
        seeds = [rng_seed for rng_seed in ours if rng_seed in theirs]
        return [value_of(ours[seed], figure) for seed in seeds], [value_of(theirs[seed], figure) for seed in seeds]

    def figures(self) -> list[harness.Figure]:
        """esperd's means against gromo's."""
        return [
            mean_figure(f"gromo_{self.task}/{prefix}{name}", *self.paired(arm, self.method, key), unit, better)
            for arm, prefix in zip(OURS, ("", "defaults_"), strict=True)
            if self.runs(arm)
            for name, key, unit, better in FIGURES
        ]

    def report(self) -> str:
        """A table of all arms, and paired differences."""
        arms = [arm for arm in (*self.plan["methods"], *OURS, *self.plan["controls"]) if self.runs(arm)]
        rows = [
            f"\n{self.task}: means over RNG seeds; esperd is compared with {self.method}",
            f"  {'arm':14} {'rate':>5} {'n':>3} {'audit %':>8} {'loss':>7} {'size':>7} {'GFLOP':>8} {'s':>6} {'MiB':>5}  peak",
        ]
        for arm in arms:
            lines = self.runs(arm).values()
            mean = {key: statistics.mean(value_of(line, key) for line in lines) for key in MEASURED}
            rows.append(
                f"  {arm:14} {self.rates[arm]:>5} {len(lines):>3} {100 * mean['audit_accuracy']:8.2f} {mean['audit_loss']:7.4f} "
                f"{mean['parameters']:7.0f} {mean['flops'] / 1e9:8.3f} {mean['seconds']:6.1f} "
                f"{mean['added_mib']:5.0f} {mean['peak_mib']:5.0f}"
            )
        rows.append("  points of audit accuracy, paired, [95 % BCa]:")
        pairs = [(arm, method) for arm in OURS for method in self.plan["methods"]]
        pairs += [(arm, control) for control in self.plan["controls"] for arm in ("esperd", self.method)]
        for arm, other in pairs:
            ours, theirs = self.paired(arm, other, "audit_accuracy")
            if ours:
                rows.append(f"    {arm} minus {other}: {told(difference(ours, theirs))}, n={len(ours)}")
        return "\n".join(rows)


MEASURED = ("audit_accuracy", "audit_loss", "parameters", "flops", "seconds", "added_mib", "peak_mib")


def value_of(line: dict, figure: str) -> float:
    """A figure of a run; FLOPs of all purposes. Not a number where it is unknown, as the loss of a run that diverged."""
    if figure == "flops":
        return float(sum(line["flops"].values()))
    return float("nan") if line[figure] is None else float(line[figure])


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences in points, with its 95 % BCa interval."""
    pairs = zip(values, others, strict=True)
    return mean_interval(torch.tensor([100 * (value - other) for value, other in pairs]), 0.95, "bootstrap")


def told(interval: tuple[float, float, float]) -> str:
    """A difference in words."""
    mean, lower, upper = interval
    return f"{mean:+.2f} [{lower:+.2f}, {upper:+.2f}]"


def mean_figure(
    name: str, values: Sequence[float], peers: Sequence[float], unit: str, better: Literal["lower", "higher"]
) -> harness.Figure:
    """Means over RNG seeds, all of them kept."""
    value, peer = statistics.mean(values), statistics.mean(peers)
    baseline = harness.Baseline(name="gromo", value=peer, repeats=tuple(peers))
    return harness.Figure(
        name=name, value=value, unit=unit, better=better, repeats=tuple(values), baseline=baseline, ratio=value / peer
    )


def main() -> None:
    """Run what is missing, print, write."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=1, known=True)
    tasks = {"digits": QUICK} if chosen.quick else {name: plan for name, plan in TASKS.items() if name != "cifar" or chosen.data}
    figures: list[harness.Figure] = []
    settings: dict[str, str | int | float | bool] = {"tasks": " ".join(tasks)}
    if importlib.util.find_spec("gromo") is None and not chosen.known:
        print("gromo is absent: nothing is compared. `make bench-deps` installs it.")
        if not chosen.quick:
            sys.exit(1)
        settings["gromo"] = "absent"
    else:
        for name, plan in tasks.items():
            protocol = {"bench": "gromo", "task": name, "plan": plan, "tuning_seeds": TUNING_SEEDS, "version": 1}
            lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "gromo.jsonl", protocol, keep=not chosen.quick)
            comparison = Comparison(name, plan, chosen.data if name == "cifar" else None, lines)
            if chosen.known:
                comparison.choose()
            else:
                comparison.run(chosen.repeats)
            count = len(comparison.paired("esperd", comparison.method, "audit_accuracy")[0])
            settings |= {f"{name}_protocol": lines.digest, f"{name}_rng_seeds": count, f"{name}_gromo": comparison.method}
            if count:
                print(comparison.report())
                figures += comparison.figures()
    found = harness.results("gromo", figures, quick=chosen.quick, settings=settings)
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
