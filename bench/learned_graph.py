"""A host and an arm on it as a graph of modules, and a small network that scores the arm from it; see ``bench/learned.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import choosing
import growth_figures
import growth_plan
import lab
import torch
from deciding import options
from torch import nn
from torch.nn import functional

from esperd.growth.flops import count_flops

WIDTH = 24
ROUNDS = 2
STEPS = 300
NETWORKS = 5
RATE = 0.01
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Graphs:
    """Arms of RNG seeds as graphs of N nodes: the input, the host's stages, its head, and the seed.

    Args:
        nodes: (S, A, N, F) features, by RNG seed and arm.
        into: (A, N, N) messages from the nodes before one, averaged.
        back: (A, N, N) from those behind it.
        gains: (S, A) gate loss of the host continued minus the arm's.
    """

    nodes: torch.Tensor
    into: torch.Tensor
    back: torch.Tensor
    gains: torch.Tensor


@dataclass(frozen=True)
class Record:
    """What was recorded of an RNG seed: its lines by arm, and the figures of the arms in one order."""

    of: dict[str, dict]
    losses: list[float]
    audits: list[float]


def records(lines: lab.Lines) -> dict[int, Record]:
    """Read the lines of H2 of the RNG seeds that are complete."""
    found = {}
    for seed, of in growth_figures.chosen_lines(lines).items():
        told = [of[f"arm:{arm}"] for arm in lines.protocol["plan"]["arms"]]
        found[seed] = Record(of, [line["gate_loss"] for line in told], [line["audit_accuracy"] for line in told])
    return found


def graphs(data: lab.Data, arms: list[str], known: list[Record]) -> Graphs:
    """Build the host's graph with each arm on it; sizes and FLOPs are measured on the real modules."""
    host = lab.fresh_host(data, 0)
    sizes = _sizes(data, host)  # of stages, then of the head
    grower = choosing.grower_of(data, host, 0, growth_plan.FULL)
    slots = [slot.slot for slot in grower.network.slots]
    shapes = [slot.shape for slot in grower.network.slots]
    prices = {choosing.name_of(option.arm): option for option in options(grower, choosing.BLUEPRINTS)}
    head, seed = len(slots) + 1, len(slots) + 2  # node 0 is the input
    whole = torch.tensor(sizes).sum(0)
    ahead = torch.zeros(len(arms), seed + 1, seed + 1)
    fixed = torch.zeros(len(arms), seed + 1, 3 + 4 + len(choosing.BLUEPRINTS))
    for index, arm in enumerate(arms):
        option = prices[arm]
        at = slots.index(option.arm.slot) + 1
        for before, behind in [*((node, node + 1) for node in range(head)), (at, seed), (seed, at + 1)]:
            ahead[index, before, behind] = 1.0
        for node in range(seed + 1):
            place = at if node == seed else node
            shape = data.train[0].shape[1:] if place == 0 else shapes[min(place, len(slots)) - 1]
            size = (0.0, 0.0) if place == 0 else sizes[place - 1]
            if node == seed:
                size = (option.parameters, option.flops_per_sample)
            kind = [float(0 < node < head), float(node == seed), float(node == head)]
            shares = (1 + 10 * torch.tensor(size) / whole).log().tolist()
            measures = [place / head, math.log2(shape[0]) / 4, *shares]
            fixed[index, node, :7] = torch.tensor([*kind, *measures])
        fixed[index, seed, 7 + choosing.BLUEPRINTS.index(option.arm.blueprint)] = 1.0
    found = []
    for record in known:
        merit = torch.tensor([record.of["scores"]["scores"]["merit"][arm] or 0.0 for arm in arms])
        told = torch.zeros(*fixed.shape[:2], 3)
        told[:, seed, 0] = merit / merit.max()
        told[:, seed, 1] = merit.argsort().argsort() / (len(merit) - 1)
        told[:, :, 2] = 10 * record.of["host"]["gate_accuracy"] - 5
        found.append(torch.cat([fixed, told], dim=2))
    gains = [[record.of["continued"]["gate_loss"] - loss for loss in record.losses] for record in known]
    return Graphs(torch.stack(found), _averaged(ahead.transpose(1, 2)), _averaged(ahead), torch.tensor(gains))


def _averaged(links: torch.Tensor) -> torch.Tensor:
    return links / links.sum(2, keepdim=True).clamp(min=1.0)


def _sizes(data: lab.Data, host: nn.Module) -> list[tuple[float, float]]:
    """Parameters and FLOPs a sample of each stage and of the head, in order."""
    found = []

    def measure(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        forward = type(module).forward  # without hooks: they would come back here
        flops = count_flops(lambda: forward(module, inputs[0]))[1]
        found.append((float(sum(weight.numel() for weight in module.parameters())), flops / len(inputs[0])))

    whole = [module for name, module in host.named_modules() if name == "head" or name.rpartition(".")[2].startswith("stage")]
    handles = [module.register_forward_pre_hook(measure) for module in whole]
    with torch.no_grad():
        host.eval()(data.train[0][:4])
    for handle in handles:
        handle.remove()
    return found


class GraphNetwork(nn.Module):
    """Messages along the edges, both ways; one score at the seed.

    Args:
        features: F of a node.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, WIDTH)
        self.rounds = nn.ModuleList(nn.Linear(3 * WIDTH, WIDTH) for _ in range(ROUNDS))
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, nodes: torch.Tensor, into: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """(S, A, N, F), (A, N, N), (A, N, N) → (S, A) scores."""
        x = functional.relu(self.first(nodes))
        for layer in self.rounds:
            x = x + functional.relu(layer(torch.cat([x, into @ x, back @ x], dim=-1)))
        result: torch.Tensor = self.score(x[:, :, -1]).squeeze(-1)
        return result


def learn(known: Graphs, seeds: list[int], arms: list[int]) -> Callable[[int], torch.Tensor]:
    """Train on some RNG seeds and arms.

    Returns:
        From an RNG seed's place to the scores of all its arms, (A,), the mean over networks.
    """
    nodes, into, back = known.nodes[seeds][:, arms], known.into[arms], known.back[arms]
    gains = known.gains[seeds][:, arms]
    wanted = gains - gains.mean(1, keepdim=True)
    wanted = wanted / wanted.std()
    trained = []
    for number in range(NETWORKS):
        torch.manual_seed(number)
        network = GraphNetwork(nodes.shape[-1])
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(STEPS):
            scores = network(nodes, into, back)
            optimizer.zero_grad()
            functional.mse_loss(scores - scores.mean(1, keepdim=True), wanted).backward()
            optimizer.step()
        trained.append(network)

    def scores_of(seed: int) -> torch.Tensor:
        with torch.no_grad():
            told = [network(known.nodes[seed : seed + 1], known.into, known.back)[0] for network in trained]
        return torch.stack(told).mean(0)

    return scores_of
