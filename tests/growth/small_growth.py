"""A small network that grows: what several test files here share. Everything is drawn from fixed seeds, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from esperd.compiler.compile import compile_kernel
from esperd.declarations import Blueprint, resolve
from esperd.execution.oplist import load_kernel
from esperd.growth.alpha import Ramp, cosine
from esperd.growth.grower import Grower
from esperd.growth.ledger import Ledger
from esperd.growth.lifecycle import Life
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.operators import operator as build_operator
from esperd.growth.optimizer import build_optimizer
from esperd.growth.precision import Precision
from esperd.growth.slots import find_slots
from esperd.growth.source import GrownModule
from esperd.messages.growth import SlotRecord, Stage
from esperd.messages.jobs import Gates, Growth, Optimizer
from esperd.messages.kernels import KernelCompiled, KernelKey
from esperd.messages.policy import Arm, Decision
from esperd.plugins import load_plugins

PLUGINS = load_plugins()
GATES = {name: resolve(gate.check) for name, gate in PLUGINS.gates.items()}
OPERATIONS = {name: resolve(operation.apply) for name, operation in PLUGINS.surgery_operations.items()}
CLASSES = 3
BATCH = 16
SAMPLES = 64
"""Train and gate split each: 4 batches an epoch."""

_kernels: dict[KernelKey, KernelCompiled] = {}


def loss(output, target):
    return functional.cross_entropy(output, target, reduction="none")


def accuracy(output, target):
    return (output.argmax(1) == target).float()


class Host(nn.Module):
    """Two convolutional stages with BatchNorm and dropout: everything a second pass could disturb."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.second(self.dropout(self.first(x))).mean((2, 3)))


def digits(seed: int, samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs whose place gives the class: learnable, tiny. (N, 1, 6, 6) and (N,)."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (samples,), generator=generator)
    inputs = 0.7 * torch.randn(samples, 1, 6, 6, generator=generator)
    for index, target in enumerate(targets.tolist()):
        inputs[index, 0, 2 * target : 2 * target + 2, 1:4] += 1.0
    return inputs, targets


TRAIN, GATE = digits(1), digits(2)


def host(seed: int = 0, dropout: float = 0.2) -> Host:
    torch.manual_seed(seed)
    return Host(dropout)


def network(seed: int = 0, dropout: float = 0.2) -> GrowingNetwork:
    built = host(seed, dropout)
    return GrowingNetwork(built, find_slots(built, TRAIN[0][:4], patterns=("first", "second")))


def kernel(blueprint: str, shape: tuple[int, ...]) -> KernelCompiled:
    """Compiled once for all tests; the clock stands still, nobody looks at the profile."""
    key = KernelKey(blueprint=blueprint, source="built in", shape=tuple(shape))
    if key not in _kernels:
        with torch.enable_grad():
            _kernels[key] = compile_kernel(key, PLUGINS.blueprints[blueprint])
    return _kernels[key]


class Kernels:
    """A source that grows seeds on portable kernels, as the trainer's does, without a daemon."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module, *, portable: bool = True):
        self.wrap = wrap
        self.portable = portable

    def unfit(self, blueprint: str, slot: SlotRecord) -> str:
        if blueprint not in PLUGINS.blueprints:
            return f"there is no blueprint {blueprint!r}"
        topology = PLUGINS.blueprints[blueprint].topology
        return "" if topology == slot.topology else f"{blueprint} is for {topology} slots, {slot.slot} is {slot.topology}"

    def min_gradient_ratio(self, blueprint: str) -> float | None:
        return PLUGINS.blueprints[blueprint].min_gradient_ratio

    def sketch(self, blueprint: str, slot: SlotRecord, seed: str, operator: str) -> GrownModule:
        eager, known = self._drawn(blueprint, slot, seed, operator)
        return GrownModule(module=eager, **known)

    def _drawn(self, blueprint: str, slot: SlotRecord, seed: str, operator: str):
        declaration: Blueprint = PLUGINS.blueprints[blueprint]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, seed)))
            eager = resolve(declaration.factory)(slot.shape)
            entering = build_operator(operator, slot)
        known = {
            "operator": entering,
            "parameters": declaration.parameters(slot.shape),
            "flops_per_sample": declaration.flops(slot.shape),
        }
        return eager, known

    def grow(self, blueprint: str, slot: SlotRecord, seed: str, operator: str, epoch: int) -> GrownModule:
        eager, known = self._drawn(blueprint, slot, seed, operator)
        if not self.portable:
            return GrownModule(module=self.wrap(eager), **known)
        compiled = kernel(blueprint, slot.shape)
        module = load_kernel(compiled.graph, None)
        module.load_state_dict(eager.state_dict())
        identity = compiled.manifest.identity()
        return GrownModule(module=self.wrap(module), kernel=identity, graph=compiled.graph.decode(), **known)


def grower(events: list | None = None, *, optimizer: Optimizer | None = None, seed: int = 0, **options) -> Grower:
    """A grower at its very beginning. ``options``: source, settings, dropout, precision, criterion, or fields of Growth."""
    net = network(seed, options.pop("dropout", 0.2))
    source, settings = options.pop("source", None), options.pop("settings", Gates())
    precision, criterion = Precision(options.pop("precision", "float32")), options.pop("criterion", loss)
    optimizer = optimizer or Optimizer(learning_rate=2e-2)
    durations = {
        "incubation": "lookahead",
        "incubation_epochs": 1,
        "blending_epochs": 1,
        "shadowing_epochs": 1,
        "embargo_epochs": 1,
    }
    grown = Grower(
        network=net,
        optimizer=build_optimizer(optimizer, net.host.parameters()),
        loss=criterion,
        metric=accuracy,
        growth=Growth(**{**durations, **options}),
        settings=settings,
        gates=GATES,
        operations=OPERATIONS,
        curve=cosine,
        source=source or Kernels(),
        ledger=Ledger(),
        emit=(events if events is not None else []).append,
        precision=precision,
        max_gradient_norm=optimizer.max_gradient_norm,
    )
    grown.steps_per_epoch = SAMPLES // BATCH
    grown.sample = (TRAIN[0][:BATCH], TRAIN[1][:BATCH])
    return grown


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
    return [(TRAIN[0][part], TRAIN[1][part]) for part in torch.split(order, BATCH)]


def steps(grown: Grower, chosen: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    grown.network.train()
    return [float(grown.train_step(inputs, targets)) for inputs, targets in chosen]


def end(grown: Grower) -> None:
    """What happens between two epochs."""
    grown.epoch += 1
    grown.measure([GATE])
    grown.end_epoch()


def epoch(grown: Grower) -> None:
    steps(grown, batches(grown.epoch))
    end(grown)


def germinate(blueprint: str, slot: str) -> Decision:
    return Decision(action="germinate", arm=Arm(slot=slot, blueprint=blueprint), reason="a test wants it")


def until(grown: Grower, name: str, stage: Stage, longest: int = 20) -> Seed:
    """Train until a seed reaches a stage."""
    for _ in range(longest):
        for seed in [*grown.network.seeds(), *grown.resting.values()]:
            if seed.name == name and seed.stage is stage:
                return seed
        epoch(grown)
    raise AssertionError(f"{name} never became {stage}: {grown.records()}, {grown.outcomes}")


def seed_of(module: nn.Module, record: SlotRecord, number: int = 0, *, alpha: float = 1.0, graph: str | None = None) -> Seed:
    """A seed that stands in the network for good, made by hand."""
    seed = Seed(
        name=f"{record.slot}#{number}",
        blueprint="by_hand",
        module=module,
        record=record,
        parameters_added=sum(parameter.numel() for parameter in module.parameters()),
        flops_per_sample=0.0,
        epoch=0,
        graph=graph,
    )
    seed.life, seed.alpha, seed.ramp = Life(stage=Stage.FOSSILIZED), alpha, Ramp(target=alpha)
    return seed


def tensors_of(grown: Grower) -> dict[str, torch.Tensor]:
    """Copies of every weight, buffer and optimiser tensor."""
    copies = {name: tensor.clone() for name, tensor in grown.network.state_dict().items()}
    for group in grown.optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            for key, value in grown.optimizer.state.get(parameter, {}).items():
                copies[f"{group['name']}.{index}.{key}"] = torch.as_tensor(value).clone()
    return copies


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
