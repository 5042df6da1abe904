"""How gromo grows a network: the loop of its own tutorial, with every pass charged by the ledger that esperd is charged by.

Train some epochs, collect statistics, solve for new neurons, search for their scale, apply, make a new optimiser; again for the
next layer. From gromo's ``examples/plot_growing_container_tutorial.py``: 0.1.0 has no scheduler, the loop is the user's to write.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lab
import torch
from torch import nn
from torch.nn import functional

from esperd.growth.flops import count_flops
from esperd.growth.ledger import Ledger

METHODS = ("tiny", "gradmax")
PURPOSES = ("train", "statistics", "solve", "line_search")
SCALES = (0.0, 0.1, 0.5, 1.0)
"""Of the line search, as in the tutorial."""
TINY = {"compute_delta": True, "use_projection": True}
"""The defaults of ``compute_optimal_updates``, as in the tutorial: TINY's new neurons, and the best change of the old weights."""
GRADMAX = {
    "compute_delta": False,
    "use_covariance": False,
    "alpha_zero": True,
    "use_projection": False,
    "ignore_singular_values": True,
}
"""GradMax as its docstring says."""


class Gromo:
    """A network of gromo's while it trains and grows.

    Args:
        model: gromo's ``SequentialGrowingModel``.
        data: its train split is read.
        plan: ``batch_size``, ``rate``, ``statistics_samples``.
        rng_seed: of the order of samples.
    """

    def __init__(self, model: Any, data: lab.Data, plan: dict, rng_seed: int) -> None:
        self.model, self._data, self._plan, self._rng_seed = model, data, plan, rng_seed
        self.ledger = Ledger()
        self.ledger.spent = dict.fromkeys(PURPOSES, 0.0)
        self.epoch = 0
        self.told: list[str] = []

    def structure(self) -> str:
        """Shapes of all weights: what work on the network costs depends on them."""
        return " ".join("x".join(map(str, parameter.shape)) for parameter in self.model.parameters() if parameter.dim() > 1)

    def train(self, epochs: int, rate: Callable[[float], float]) -> None:
        """Train with an optimiser of its own: gromo replaces the tensors of the layers that it grows.

        Args:
            epochs: how many.
            rate: learning rate after a number of epochs, of all phases, a fraction for steps within one.
        """
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self._plan["rate"], momentum=0.9, weight_decay=5e-4)
        structure = self.structure()
        for _ in range(epochs):
            self.model.train()
            batches = lab.batches(self._data.train, self._plan["batch_size"], 1_000 * self._rng_seed + self.epoch)
            for number, (inputs, targets) in enumerate(batches):
                optimizer.param_groups[0]["lr"] = rate(self.epoch + number / len(batches))

                def step(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
                    optimizer.zero_grad()
                    functional.cross_entropy(self.model(inputs), targets).backward()

                self.ledger.charge("train", structure, len(inputs), step)
                optimizer.step()
            self.epoch += 1

    def grow(self, layer: int, neurons: int, method: str) -> None:
        """Widen one layer by at most so many neurons.

        Args:
            layer: number among those that can grow.
            neurons: gromo adds fewer where the others would not lower the loss.
            method: ``tiny`` or ``gradmax``.
        """
        model = self.model
        model.set_growing_layers(index=layer)
        self._collect_statistics()
        settings = TINY if method == "tiny" else GRADMAX
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and gromo's own, about the method they solve with
            _, flops = count_flops(lambda: model.compute_optimal_updates(maximum_added_neurons=neurons, **settings))
            self.ledger.add("solve", flops)
            model.reset_computation()
            model.dummy_select_update()
            scale, losses = 1.0, []
            if method == "tiny":
                losses = [self._extended_loss(value) for value in SCALES]
                scale = SCALES[losses.index(min(losses))]
            else:
                model.currently_updated_layer.normalize_optimal_updates(normalization_type="gradmax_normalization")
            model.set_scaling_factor(scale)
            model.apply_change()
        model.zero_grad(set_to_none=True)
        self.told.append(
            f"epoch {self.epoch}: layer {layer} by at most {neurons}, scale {scale}, losses {[round(loss, 4) for loss in losses]}"
        )

    def _sample(self) -> list[lab.Batch]:
        """Training samples for statistics and line search."""
        batches = lab.batches(self._data.train, self._plan["batch_size"], 500_000 + 1_000 * self._rng_seed + self.epoch)
        return batches[: max(1, self._plan["statistics_samples"] // self._plan["batch_size"])]

    def _collect_statistics(self) -> None:
        """As gromo's ``compute_statistics``, with the FLOPs of the first batch counted: a sum-reduced loss, evaluation mode."""
        model, structure = self.model, f"{self.structure()} layer {self.model.layer_to_grow_index}"
        model.init_computation()
        model.eval()
        for inputs, targets in self._sample():

            def collect(inputs: torch.Tensor = inputs, targets: torch.Tensor = targets) -> None:
                model.zero_grad()
                functional.cross_entropy(model(inputs), targets, reduction="sum").backward()
                model.update_computation()

            self.ledger.charge("statistics", structure, len(inputs), collect)

    @torch.no_grad()
    def _extended_loss(self, scale: float) -> float:
        """Mean loss with the proposed neurons at a scale, as gromo's ``evaluate_model``."""
        model, structure = self.model, f"{self.structure()} layer {self.model.layer_to_grow_index}"
        model.set_scaling_factor(scale)
        model.eval()
        total, count = 0.0, 0
        for inputs, targets in self._sample():
            output = self.ledger.charge(
                "line_search", structure, len(inputs), lambda inputs=inputs: model.extended_forward(inputs)
            )
            total += float(functional.cross_entropy(output, targets, reduction="sum"))
            count += len(inputs)
        return total / count


def run(model: Any, data: lab.Data, plan: dict, method: str, rng_seed: int) -> Gromo:
    """Train and grow as the plan says.

    Args:
        model: gromo's, at its start.
        data: only the train split is read.
        plan: ``first_epochs``, ``between_epochs`` and ``last_epochs``; ``grow``: (layer, neurons) in turn; and what
            :class:`Gromo` takes.
        method: ``tiny`` or ``gradmax``.
        rng_seed: of the order of samples.

    Returns:
        The grown network and what it cost.
    """
    gromo = Gromo(model, data, plan, rng_seed)
    epochs = plan["first_epochs"] + plan["between_epochs"] * (len(plan["grow"]) - 1) + plan["last_epochs"]
    phase = lab.Phase(plan["rate"], plan["batch_size"])
    torch.manual_seed(rng_seed)

    def rate(epoch: float) -> float:
        return phase.rate(epoch / epochs)

    gromo.train(plan["first_epochs"], rate)
    for number, (layer, neurons) in enumerate(plan["grow"], start=1):
        gromo.grow(layer, neurons, method)
        gromo.train(plan["last_epochs"] if number == len(plan["grow"]) else plan["between_epochs"], rate)
    return gromo


def measured(model: nn.Module, split: lab.Batch) -> tuple[float, float]:
    """Accuracy and loss over a split, charged to nobody."""
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(inputs) for inputs, _ in lab.in_order(split)])
    return float(lab.accuracy(outputs, split[1]).mean()), float(lab.loss(outputs, split[1]).mean())
