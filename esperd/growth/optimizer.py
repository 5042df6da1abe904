"""The optimiser through surgery: groups come and go, and the state of every parameter that stays is left alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from esperd.errors import InvalidModel
from esperd.messages.jobs import Optimizer

HOST_GROUP = "host"


def build_optimizer(settings: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a job over the host's parameters, as one group named ``host``.

    Raises:
        InvalidModel: when no parameter requires a gradient.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise InvalidModel("the host has no parameters that require a gradient: there is nothing to train")
    groups = [{"params": trainable, "name": HOST_GROUP, "scale": 1.0}]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def add_group(optimizer: torch.optim.Optimizer, name: str, parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Add a seed's parameters as a group of its own; ``scale`` multiplies the host's learning rate, from the first step on."""
    host = next(group for group in optimizer.param_groups if group["name"] == HOST_GROUP)
    group: dict[str, Any] = {"params": list(parameters), "name": name, "scale": scale, "lr": host["lr"] * scale}
    optimizer.add_param_group(group)


def remove_group(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Remove a seed's group and everything the optimiser remembered about its parameters."""
    for group in [group for group in optimizer.param_groups if group["name"] == name]:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["name"] != name]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the host's learning rate; each group gets it times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
