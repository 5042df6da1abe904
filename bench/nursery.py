"""What it costs to screen K candidates at once, and whether the screening chooses better than chance.

``k8/wall``: seconds of a training step with eight candidates learning behind a ResNet-18, over a step with one; aim at most
3.0. The candidates stand at the three block ends in the last third of the network. After 20 steps each candidate's weights are
compared with those it has when it is incubated alone: the largest difference stands beside the figure, and the bench fails
above 1e-4.

``--device cuda`` measures the steps alone, on a GPU: what is chosen does not depend on where it is computed.

``choice``: protocol in ``bench/PROTOCOL.md``; six arms screened, the winner goes on, against one arm drawn by lot, for the
same FLOPs. One JSON line a run in ``bench/results/nursery.jsonl``; an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time

import harness
import incubation
import lab
import torch
from torch import nn

from esperd.builtins.blueprints import BLUEPRINTS
from esperd.growth import BlueprintSource, Grower, GrowingNetwork, assemble, find_slots
from esperd.growth.contribution import Measured
from esperd.messages.growth import Stage
from esperd.messages.jobs import Growth, Optimizer
from esperd.messages.policy import Arm, Decision

SLOTS = ("layer3.1", "layer4.0", "layer4.1")
CANDIDATES = (
    ("layer3.1", "bottleneck"),
    ("layer4.0", "bottleneck"),
    ("layer4.1", "bottleneck"),
    ("layer3.1", "depthwise"),
    ("layer4.0", "depthwise"),
    ("layer4.1", "depthwise"),
    ("layer3.1", "squeeze_excite"),
    ("layer4.0", "squeeze_excite"),
)
COUNTS = (1, 2, 4, 8)
SAME_WEIGHTS = 1e-4
COMPARED_STEPS = 20
ARMS = tuple((f"features.stage{stage}", blueprint) for stage in (1, 2, 3) for blueprint in ("conv_light", "depthwise"))
STAYS = {"screening_epochs": 1, "incubation_epochs": 1, "blending_epochs": 1, "shadowing_epochs": 1, "probation_epochs": 4}


class Block(nn.Module):
    """The basic block of He et al. 2015, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """ResNet-18 with the 3×3 stem that small images get; 11.2 million parameters."""

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        for number in range(1, 5):
            inputs, outputs = width * 2 ** max(number - 2, 0), width * 2 ** (number - 1)
            blocks = nn.Sequential(Block(inputs, outputs, 1 if number == 1 else 2), Block(outputs, outputs, 1))
            self.add_module(f"layer{number}", blocks)
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x):
        """(B, C, H, W) → (B, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet_grower(data: lab.Data, width: int) -> Grower:
    """A grower over a fresh ResNet-18, the same one each time."""
    torch.manual_seed(0)
    host = ResNet18(data.train[0].shape[1], width)
    sample = data.train[0][:4]
    host.to(sample.device)
    network = GrowingNetwork(host, find_slots(host, sample, patterns=SLOTS))
    return assemble(
        network,
        BlueprintSource(BLUEPRINTS, device=sample.device),
        loss=lab.loss,
        steps_per_epoch=100,
        optimizer=Optimizer(name="sgd", learning_rate=0.05),
        growth=Growth(screening_epochs=100),
        settings=lab.OPEN_GATES,
    )


def germinate(grower: Grower, slot: str, blueprint: str, number: int, screening: str = "bench") -> None:
    """Plant a candidate under a name that does not depend on the others."""
    grower.network.germinated = number
    decision = Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), screening=screening, reason="bench")
    refusal = grower.apply(decision)
    if refusal:
        raise RuntimeError(refusal)


def with_candidates(data: lab.Data, width: int, chosen: list[int], batch: lab.Batch) -> Grower:
    """A grower with some of the candidates."""
    grower = resnet_grower(data, width)
    grower.sample = batch
    grower.network.train()
    for number in chosen:
        germinate(grower, *CANDIDATES[number], number)
    return grower


def largest_difference(data: lab.Data, width: int, size: int) -> float:
    """Candidates incubated together against each of them alone: largest absolute difference of weights after some steps."""
    fed = lab.batches(data.train, size, 1)[:COMPARED_STEPS]
    together = with_candidates(data, width, list(range(len(CANDIDATES))), fed[0])
    torch.manual_seed(1)
    for inputs, targets in fed:
        together.train_step(inputs, targets)
    worst = 0.0
    for number, (slot, _) in enumerate(CANDIDATES):
        alone = with_candidates(data, width, [number], fed[0])
        torch.manual_seed(1)
        for inputs, targets in fed:
            alone.train_step(inputs, targets)
        name = f"{slot}#{number}"
        mine, theirs = together.network.seed(name).state_dict(), alone.network.seed(name).state_dict()
        worst = max(worst, *(float((mine[key] - theirs[key]).abs().max()) for key in theirs))
    return worst


def step_seconds(data: lab.Data, width: int, size: int, repeats: int) -> dict[int, list[float]]:
    """Seconds of a step for each K, in turns, after the first steps have found out how passes may be shared."""
    fed = lab.batches(data.train, size, 2)
    growers = {count: with_candidates(data, width, list(range(count)), fed[0]) for count in COUNTS}
    for grower in growers.values():
        for inputs, targets in fed[:2]:
            grower.train_step(inputs, targets)
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    wait = torch.cuda.synchronize if data.train[0].is_cuda else (lambda: None)
    for repeat in range(repeats):
        inputs, targets = fed[2 + repeat % (len(fed) - 3)]
        for count in random.Random(repeat).sample(COUNTS, len(COUNTS)):
            wait()
            began = time.perf_counter()
            growers[count].train_step(inputs, targets)
            wait()
            seconds[count].append(time.perf_counter() - began)
    print(f"how second passes run, by slot: {growers[8].incubator.sharing}")
    return seconds


# --- does the screening choose better than chance? ---------------------------------------------------------------------------


def run_choice(data: lab.Data, host: nn.Module, arm: str, rng_seed: int, plan: dict) -> dict[str, object]:
    """Grow one seed: the screening's, or one drawn by lot; the same FLOPs in all."""
    grower = lab.grower_of(
        data,
        copy.deepcopy(host),
        rng_seed=rng_seed,
        batch_size=plan["batch_size"],
        growth=Growth(incubation="joint", **STAYS),
        patterns=("features.stage?",),
        learning_rate=plan["rate"],
    )
    grower.sample = next(iter(lab.batches(data.train, plan["batch_size"], 77)))
    grower.measure(lab.in_order(data.gate))
    grower.ledger.spent = dict.fromkeys(grower.ledger.spent, 0.0)
    host_epoch = 3 * grower.ledger.cost("gate", "host") * len(data.train[0])
    slots = {record.slot for record in grower.network.slots}
    arms = [candidate for candidate in ARMS if candidate[0] in slots]
    grower.network.train()
    began = lab.clock()
    drawn = random.Random(rng_seed).choice(arms)
    for number, (slot, blueprint) in enumerate(arms if arm == "screened" else [drawn]):
        germinate(grower, slot, blueprint, number, "bench" if arm == "screened" else "")
    chosen: list[str] = []

    def decide(standing: Grower, _measured: Measured) -> None:
        incubation.fossilize_all(standing)
        live = [seed for seed in standing.network.seeds() if not seed.screening]
        if live and not chosen:
            chosen.append(f"{live[0].blueprint} at {live[0].record.slot}")

    lab.train(
        grower,
        data,
        flops=plan["extra_host_epochs"] * host_epoch,
        phase=lab.Phase(plan["rate"], plan["batch_size"]),
        rng_seed=rng_seed,
        decide=decide,
    )
    kept = [f"{seed.blueprint} at {seed.record.slot}" for seed in grower.network.seeds() if seed.stage is Stage.FOSSILIZED]
    return {**lab.result(grower, data, lab.clock() - began), "chosen": chosen, "kept": kept}


def measure_steps(chosen: argparse.Namespace, data: lab.Data) -> tuple[list[harness.Figure], dict[str, str | int | float | bool]]:
    """Seconds of a step for each K, and how far candidates are from what they are alone."""
    small = chosen.quick or data.name == "digits"
    width, size = (8, 8) if small else (64, 64)
    placed = lab.on(data, chosen.device)
    difference = largest_difference(placed, width, size)
    if difference > SAME_WEIGHTS:
        raise SystemExit(f"candidates incubated together differ by {difference:.2g} from those incubated alone")
    seconds = step_seconds(placed, width, size, 5 * chosen.repeats)
    figures = [
        harness.median_figure(
            f"k{count}/wall", seconds[count], unit="s a step", better="lower", against="k1", baseline=seconds[1]
        )
        for count in COUNTS[1:]
    ]
    print(f"largest difference of weights after {COMPARED_STEPS} steps, together against alone: {difference:.2g}")
    print(f"k8/wall {statistics.median(seconds[8]) / statistics.median(seconds[1]):.2f}, aim 3.0")
    where = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    return figures, {"device": where, "width": width, "batch": size, "largest_weight_difference": difference}


def run_choices(chosen: argparse.Namespace, data: lab.Data) -> tuple[harness.Figure, str]:
    """Run what is missing of the choice; its figure and the digest of its protocol."""
    plan = incubation.QUICK if chosen.quick or data.name == "digits" else incubation.FULL
    protocol = {"bench": "nursery", "data": data.name, "plan": plan, "stays": STAYS, "arms": ARMS, "version": 1}
    lines = lab.Lines(harness.REPOSITORY / "bench" / "results" / "nursery.jsonl", protocol, keep=not chosen.quick)
    for rng_seed in range(chosen.repeats):
        missing = [arm for arm in ("screened", "drawn") if not lines.has(arm=arm, rng_seed=rng_seed)]
        if missing:
            host = incubation.host_of(data, rng_seed, plan)
            for arm in missing:
                lines.add({"arm": arm, "rng_seed": rng_seed, **run_choice(data, host, arm, rng_seed, plan)})
    for figure in ("gate_accuracy", "audit_accuracy"):
        mean, lower, upper, count = incubation.paired(lines, "screened", "drawn", figure)
        print(f"{figure}: screened minus drawn by lot {mean:+.2f} points [{lower:+.2f}, {upper:+.2f}], n={count}")
    accuracy = {arm: [line["audit_accuracy"] for line in lines.of(arm=arm)] for arm in ("screened", "drawn")}
    figure = harness.median_figure(
        "choice/audit_accuracy",
        accuracy["screened"],
        unit="share",
        better="higher",
        against="drawn by lot",
        baseline=accuracy["drawn"],
    )
    return figure, lines.digest


def main() -> None:
    """Measure, run what is missing, print, write."""
    torch.set_num_threads(1)
    chosen = harness.arguments(__doc__.partition("\n")[0], repeats=10, quick_repeats=2, devices=("cpu", "cuda"))
    data = lab.load(chosen.data)
    figures, settings = measure_steps(chosen, data)
    settings["data"] = data.name
    if chosen.device == "cpu":
        figure, settings["protocol"] = run_choices(chosen, data)
        figures.append(figure)
    found = harness.results("nursery", figures, quick=chosen.quick, settings=settings)
    print(harness.table(found))
    if chosen.json is not None:
        harness.write(found, chosen.json)


if __name__ == "__main__":
    main()
