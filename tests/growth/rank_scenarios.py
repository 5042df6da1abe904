"""What one of two processes does in the tests of several: run as ``python rank_scenarios.py SCENARIOS RANK SIZE DIRECTORY``.

Each scenario gets the ranks (or the null object, for the process that does it all alone) and returns what it saw. Results are
written as JSON, an error as its type and text with the time that it took to come.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import msgspec
import safetensors.torch
import torch
import torch.distributed as dist
from small_growth import BATCH, CLASSES, GATE, TRAIN, Kernels, batches, germinate, grower, same, tensors_of
from torch import nn

from esperd.errors import EsperError
from esperd.execution.oplist import load_kernel
from esperd.growth.checksum import checksums
from esperd.growth.contribution import measure
from esperd.growth.distributed import Distributed
from esperd.growth.grower import Grower
from esperd.growth.network import GrowingNetwork
from esperd.growth.optimizer import build_optimizer
from esperd.growth.ranks import Joined, Ranks
from esperd.growth.runner import Plain
from esperd.growth.slots import find_slots
from esperd.growth.snapshot import restore, take
from esperd.messages.jobs import Gates, Optimizer
from esperd.messages.policy import Decision

SURE = Gates(min_contribution=-1e3, max_loss_drift=10.0, max_loss_spike=10.0)
"""Thresholds that every seed passes: these tests are about what ranks do with a verdict."""


class Smooth(nn.Module):
    """A host without statistics and chance: two half batches give what one whole gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def among(ranks: Ranks, grown: Grower, host: nn.Module | None = None) -> Grower:
    """The same grower as one among ranks, with another host if one is given. Each rank probes with samples of its own."""
    network, optimizer = grown.network, grown.optimizer
    if host is not None:
        network = GrowingNetwork(host, find_slots(host, TRAIN[0][:4], patterns=("first", "second")))
        settings = Optimizer(name="sgd", learning_rate=0.05, weight_decay=0.0)
        optimizer = build_optimizer(settings, host.parameters())
    runner = Plain() if ranks.size == 1 else Distributed(ranks)
    grown = dataclasses.replace(grown, network=network, optimizer=optimizer, ranks=ranks, runner=runner)
    grown.sample = part(ranks, *TRAIN)
    return grown


def smooth(ranks: Ranks, events: list | None = None, **options) -> Grower:
    torch.manual_seed(3)
    host = Smooth()
    return among(ranks, grower(events, source=options.pop("source", Kernels(portable=False)), settings=SURE, **options), host)


def part(ranks: Ranks, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's half of a batch."""
    size = len(inputs[:BATCH]) // ranks.size
    own = slice(ranks.rank * size, (ranks.rank + 1) * size)
    return inputs[:BATCH][own], targets[:BATCH][own]


def train(ranks: Ranks, grown: Grower) -> None:
    grown.network.train()
    for inputs, targets in batches(grown.epoch):
        grown.train_step(*part(ranks, inputs, targets))
    grown.epoch += 1


def epoch(ranks: Ranks, grown: Grower) -> None:
    train(ranks, grown)
    grown.measure([GATE])
    grown.end_epoch()


def state_of(grown: Grower) -> dict:
    """What must not differ between ranks: everything that is decided, and every bit of what is trained."""
    return {
        "records": msgspec.to_builtins(grown.records()),
        "outcomes": msgspec.to_builtins(grown.outcomes),
        "groups": [(group["name"], float(group["lr"])) for group in grown.optimizer.param_groups],
        "checksums": checksums(grown.network),
        "optimizer": {name: tensor.double().sum().item() for name, tensor in tensors_of(grown).items()},
        "gate_loss": grown.gate_loss,
        "spent": grown.ledger.spent,
        "costs": grown.ledger.costs,
    }


# --- what goes well ----------------------------------------------------------------------------------------------------------


def a_whole_life(ranks: Ranks, directory: Path) -> dict:
    """From germination to fossilized, another one culled on the way."""
    events: list = []
    grown = smooth(ranks, events)
    epoch(ranks, grown)
    grown.apply(germinate("conv_light", "first"))
    grown.apply(germinate("norm", "second"))
    epoch(ranks, grown)
    grown.apply(Decision(action="cull", seed="second#1", reason="a test wants it"))
    for _ in range(3):
        epoch(ranks, grown)
    grown.apply(Decision(action="fossilize", seed="first#0", reason="proven"))
    epoch(ranks, grown)
    grown.close()
    tensors = {name: tensor.contiguous() for name, tensor in grown.network.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / f"life.{ranks.size}.{ranks.rank}.safetensors")
    measured = grown.measure([GATE[:2]])
    return {
        "state": state_of(grown),
        "stages": [str(event.after) for event in events if type(event).__name__ == "StageChanged"],
        "losses": measured.loss.tolist(),
    }


def every_mode(ranks: Ranks, directory: Path) -> dict:
    """Each way to incubate, until the seed is blended in."""
    seen = {}
    for mode in ("lookahead", "straight_through", "frozen_input", "joint"):
        grown = smooth(ranks, incubation=mode)
        epoch(ranks, grown)
        refused = grown.apply(germinate("conv_light", "first"))
        for _ in range(3):
            epoch(ranks, grown)
        tensors = {name: tensor.contiguous() for name, tensor in grown.network.state_dict().items()}
        safetensors.torch.save_file(tensors, directory / f"{mode}.{ranks.size}.{ranks.rank}.safetensors")
        seen[mode] = {"state": state_of(grown), "refused": refused}
    return seen


def a_screening(ranks: Ranks, directory: Path) -> dict:
    """Two candidates behind the host; one goes on."""
    grown = smooth(ranks, screening_epochs=1)
    epoch(ranks, grown)
    for blueprint in ("norm", "conv_light"):
        grown.apply(msgspec.structs.replace(germinate(blueprint, "first"), screening="spring"))
    candidates = len(list(grown.network.seeds()))
    epoch(ranks, grown)
    epoch(ranks, grown)
    return {"state": state_of(grown), "candidates": candidates}


def isolation(ranks: Ranks, directory: Path) -> dict:
    """The host of small_growth, with BatchNorm, and dropout from a stream of each rank's own; with a seed and without one."""
    seen = {}
    for mode in ("lookahead", "straight_through"):
        states = []
        for wanted in (False, True):
            grown = among(ranks, grower(source=Kernels(portable=False), incubation=mode, incubation_epochs=3))
            torch.manual_seed(100 + ranks.rank)
            epoch(ranks, grown)
            if wanted:
                grown.apply(germinate("conv_light", "first"))
            for _ in range(2):
                epoch(ranks, grown)
            host = {name: tensor.clone() for name, tensor in grown.network.host.state_dict().items()}
            states.append({**host, "stream": torch.get_rng_state()})
        seed = grown.network.seed("first#0")
        seen[mode] = {
            "same": same(*states),
            "sharing": grown.incubator.sharing,
            "stage": str(seed.stage),
            "learned": any(bool((parameter.grad != 0).any()) for parameter in seed.parameters()),
        }
    return seen


def statistics(ranks: Ranks, directory: Path) -> dict:
    """BatchNorm's running statistics, before and after a decision point, of the host and of a seed behind it."""

    def batch_norm(module: nn.Module) -> nn.Module:
        return nn.Sequential(module, nn.BatchNorm2d(4))

    grown = among(ranks, grower(source=Kernels(batch_norm, portable=False), incubation_epochs=2))
    epoch(ranks, grown)
    grown.apply(germinate("conv_light", "first"))
    train(ranks, grown)
    before = checksums(grown.network)
    grown.measure([GATE])
    return {"before": before, "after": checksums(grown.network)}


def what_is_averaged(ranks: Ranks, directory: Path) -> dict:
    """Parameters that DistributedDataParallel sees, by what seeds do."""
    seen = {}
    for mode in ("lookahead", "straight_through", "joint"):
        grown = smooth(ranks, incubation=mode, incubation_epochs=2)
        epoch(ranks, grown)
        grown.apply(germinate("conv_light", "first"))
        wrapped = grown.runner.forward(grown.network, grown.structure(), counted=False)
        own = {id(parameter) for parameter in grown.network.seed("first#0").parameters()}
        seen[mode] = sum(id(parameter) in own for parameter in wrapped.parameters())
    return seen


def shards(ranks: Ranks, directory: Path) -> dict:
    """A split whose size no number of ranks divides, in batches of several sizes; as ranks measure it and as one does."""
    grown = smooth(ranks)
    epoch(ranks, grown)
    split = [(GATE[0][:7], GATE[1][:7]), (GATE[0][7:8], GATE[1][7:8]), (GATE[0][8:33], GATE[1][8:33])]
    before = grown.ledger.spent["gate"]
    measured = grown.measure(split)
    alone = measure(grown.network, split, grown.loss, grown.metric)
    return {
        "equal": torch.allclose(measured.loss, alone.loss, atol=1e-6) and torch.equal(measured.metric, alone.metric),
        "losses": measured.loss.tolist(),
        "charged": grown.ledger.spent["gate"] - before,
        "cost": grown.ledger.cost("gate", "host"),
    }


def first_rank_decides(ranks: Ranks, directory: Path) -> dict:
    """A policy that only rank 0 asks."""
    grown = smooth(ranks)
    epoch(ranks, grown)
    asked = (germinate("norm", "second"),) if ranks.rank == 0 else None
    for decision in ranks.first("decisions", asked, tuple[Decision, ...]):
        grown.apply(decision)
    return {"state": state_of(grown)}


class Trials:
    """Batches for controlled trials: each rank its own for training, all of the gate split for measuring."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def train(self, epoch):
        while True:
            for inputs, targets in batches(1000 + epoch):
                yield part(self.ranks, inputs, targets)

    def gate(self):
        return [GATE]


def a_trial(ranks: Ranks, directory: Path) -> dict:
    grown = smooth(ranks)
    grown.batches = Trials(ranks)
    epoch(ranks, grown)
    grown.apply(germinate("conv_light", "first"))
    for _ in range(3):
        epoch(ranks, grown)
    grown.apply(Decision(action="trial", seed="first#0", reason="a test wants it"))
    epoch(ranks, grown)
    return {"state": state_of(grown)}


def a_checkpoint(ranks: Ranks, directory: Path) -> dict:
    """Rank 0 writes at a decision point, every rank reads; against the same run undisturbed."""

    def beginning() -> Grower:
        return smooth(ranks, source=Kernels(), incubation_epochs=2)

    grown = beginning()
    epoch(ranks, grown)
    grown.apply(germinate("norm", "first"))
    epoch(ranks, grown)
    file = directory / f"checkpoint.{ranks.size}"
    if ranks.rank == 0:
        state, tensors = take(grown)
        clones = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        file.with_suffix(".safetensors").write_bytes(safetensors.torch.save(clones))
        file.with_suffix(".msgpack").write_bytes(msgspec.msgpack.encode(state))
    with ranks.together("writing the checkpoint"):
        pass
    resumed = beginning()
    kind = type(take(grown)[0])
    state = msgspec.msgpack.decode(file.with_suffix(".msgpack").read_bytes(), type=kind)
    tensors = safetensors.torch.load(file.with_suffix(".safetensors").read_bytes())
    restore(resumed, state, tensors, lambda graph: load_kernel(graph.encode(), None))
    for going in (grown, resumed):
        for _ in range(2):
            epoch(ranks, going)
    seen = {"undisturbed": state_of(grown), "resumed": state_of(resumed)}
    for state in seen.values():
        (record,) = state["records"]
        del record["kernel"]  # each rank compiled its own here, whose manifest holds its times; rank 0's was written
    return seen


# --- what goes wrong ---------------------------------------------------------------------------------------------------------


def a_gate_disagrees(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks)
    readiness = grown.gates["G2"]

    def by_rank(evidence, settings):
        verdict = readiness(evidence, settings)
        return verdict if ranks.rank == 0 else msgspec.structs.replace(verdict, passed=False, reason="rank 1 is against it")

    grown = dataclasses.replace(grown, gates={**grown.gates, "G2": by_rank})
    grown.sample = part(ranks, *TRAIN)
    epoch(ranks, grown)
    grown.apply(germinate("norm", "first"))
    epoch(ranks, grown)


class Broken(Kernels):
    """Has nothing to grow on rank 1."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(portable=False)
        self.ranks = ranks

    def grow(self, blueprint, slot, seed, operator, epoch):
        if self.ranks.rank == 1:
            raise OSError("the kernel store of rank 1 is full")
        return super().grow(blueprint, slot, seed, operator, epoch)


def a_source_fails(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks, source=Broken(ranks))
    epoch(ranks, grown)
    grown.apply(germinate("norm", "first"))


class Drawn(Kernels):
    """Draws weights from the process's own stream."""

    def grow(self, blueprint, slot, seed, operator, epoch):
        grown = super().grow(blueprint, slot, seed, operator, epoch)
        with torch.no_grad():
            next(grown.module.parameters()).add_(0.01 * torch.randn(()))
        return grown


def seeds_are_born_different(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks, source=Drawn(portable=False))
    torch.manual_seed(ranks.rank)
    epoch(ranks, grown)
    grown.apply(germinate("conv_light", "first"))


def decisions_differ(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks)
    epoch(ranks, grown)
    grown.apply(germinate("norm" if ranks.rank == 0 else "conv_light", "first"))


def the_loss_fails_at_the_gate(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks)
    train(ranks, grown)

    def loss(output, target):
        if ranks.rank == 1:
            raise ZeroDivisionError("no label is like this one")
        return torch.ones(len(output))

    grown.gate_pass.loss = loss
    grown.measure([GATE])


def a_rank_fails_when_the_other_is_done(ranks: Ranks, directory: Path) -> None:
    with ranks.together("writing the report"):
        if ranks.rank == 1:
            raise OSError("the disk of rank 1 is full")


def a_rank_takes_another_turn(ranks: Ranks, directory: Path) -> None:
    grown = smooth(ranks)
    train(ranks, grown)
    if ranks.rank == 0:
        grown.measure([GATE])
    else:
        grown.end_epoch()


def gradients_are_not_averaged(ranks: Ranks, directory: Path) -> None:
    grown = dataclasses.replace(smooth(ranks), runner=Plain())
    epoch(ranks, grown)


def parted_ranks_go_on(ranks: Ranks, directory: Path) -> None:
    try:
        ranks.agree("the weather", "sunny" if ranks.rank == 0 else "rainy")
    except EsperError:
        ranks.agree("another thing", "the same")


def a_rank_is_silent(ranks: Ranks, directory: Path) -> None:
    """Rank 1 comes to no meeting, and lives until rank 0 has noticed."""
    ranks = Joined(timeout_s=1.0)
    if ranks.rank == 1:
        dist.broadcast(torch.zeros(1), src=0)
        return
    try:
        ranks.agree("anything", 1)
    finally:
        dist.broadcast(torch.zeros(1), src=0)


def a_rank_dies(ranks: Ranks, directory: Path) -> None:
    """The last one: rank 1 leaves in a training step, and is gone."""
    grown = smooth(ranks)
    train(ranks, grown)
    if ranks.rank == 1:
        raise SystemExit(0)
    try:
        train(ranks, grown)
    except RuntimeError as error:
        ranks.agree(f"what torch says: {type(error).__name__}", 1)


def all_fail_alike(ranks: Ranks, directory: Path) -> dict:
    """Unknown names are no parting: every rank hears the same, and goes on."""
    grown = smooth(ranks)
    epoch(ranks, grown)
    try:
        grown.apply(Decision(action="sing", reason="a test wants it"))
    except EsperError as error:
        refused = error.code
    epoch(ranks, grown)
    return {"refused": refused, "state": state_of(grown)}


# --- the process -------------------------------------------------------------------------------------------------------------


def told(scenario: str, ranks: Ranks, directory: Path) -> dict:
    """What a scenario gave, or the error in which it ended."""
    began = time.monotonic()
    try:
        return {"result": globals()[scenario](ranks, directory), "seconds": time.monotonic() - began}
    except Exception as error:  # noqa: BLE001 - whatever comes is told
        fields = error.fields if isinstance(error, EsperError) else {}
        seconds = time.monotonic() - began
        return {"error": type(error).__name__, "message": str(error), "fields": fields, "seconds": seconds}


def main(scenarios: str, rank: str, size: str, directory: str) -> None:
    torch.set_num_threads(1)
    folder = Path(directory)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting_place", rank=int(rank), world_size=int(size))
    results: dict[str, dict] = {}
    for scenario in scenarios.split(","):
        results[scenario] = told(scenario, Joined(timeout_s=60.0), folder)
        (folder / f"results.{rank}.json").write_bytes(msgspec.json.encode(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
