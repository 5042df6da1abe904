"""The optimiser through surgery: groups come and go, and the state of every parameter that stays is left alone.

Each group carries what esperd knows about it beside what torch does: ``name``, ``scale`` (of the host's learning rate), ``born``
(optimiser steps taken when it came) and ``warmup`` (steps over which its rate rises from 0).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from esperd.declarations import resolve
from esperd.errors import EsperError, InvalidModel, InvalidOptimizer
from esperd.growth.carriable import require_carriable
from esperd.messages.jobs import Optimizer

HOST_GROUP = "host"


def build_optimizer(settings: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of a job over the host's parameters, as one group named ``host``.

    Raises:
        InvalidModel: when no parameter requires a gradient.
        InvalidOptimizer: when a ``module:function`` does not return an optimiser that esperd can carry through growth.
        ImportFailed: when it cannot be imported.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise InvalidModel("the host has no parameters that require a gradient: there is nothing to train")
    groups = [{"params": trainable, "name": HOST_GROUP, "scale": 1.0, "born": 0, "warmup": 0}]
    common = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay} | _implementation(settings)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)
    if settings.name == "adam":
        return torch.optim.Adam(groups, betas=settings.betas, **common)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, betas=settings.betas, **common)
    return _users_own(settings, groups)


def _implementation(settings: Optimizer) -> dict[str, Any]:
    """Torch's flags: None lets it choose by device."""
    chosen = settings.implementation
    if chosen == "auto":
        return {}
    return {"foreach": chosen == "foreach", "fused": chosen == "fused"}


def _users_own(settings: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    function = resolve(settings.name)
    try:
        optimizer = function(groups, lr=settings.learning_rate, **settings.options)
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        raise InvalidOptimizer(
            f"optimizer {settings.name!r} raised {type(error).__name__}: {error}; it is called with a list of parameter groups, "
            f"lr={settings.learning_rate} and optimizer.options",
            optimizer=settings.name,
            traceback=traceback.format_exc(),
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidOptimizer(
            f"optimizer {settings.name!r} returned {type(optimizer).__name__}, not a torch.optim.Optimizer",
            optimizer=settings.name,
        )
    require_carriable(optimizer, lambda tried: function(tried, lr=settings.learning_rate, **settings.options))
    return optimizer


def add_group(
    optimizer: torch.optim.Optimizer,
    name: str,
    parameters: Iterable[nn.Parameter],
    scale: float,
    *,
    born: int = 0,
    warmup: int = 0,
) -> None:
    """Add a seed's parameters as a group of its own.

    Args:
        optimizer: its first group is the host's.
        name: of the seed.
        parameters: of the seed.
        scale: multiplies the host's learning rate.
        born: optimiser steps taken so far.
        warmup: steps over which its learning rate rises.
    """
    host = host_group(optimizer)
    group: dict[str, Any] = {"params": list(parameters), "name": name, "scale": scale, "born": born, "warmup": warmup}
    optimizer.add_param_group(group | {"lr": host["lr"] * scale * warmth(group, born)})


def remove_group(optimizer: torch.optim.Optimizer, name: str) -> None:
    """Remove a seed's group and everything the optimiser remembered about its parameters."""
    for group in [group for group in optimizer.param_groups if group["name"] == name]:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["name"] != name]


def host_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The group of the host's parameters."""
    return next(group for group in optimizer.param_groups if group["name"] == HOST_GROUP)


def warmth(group: dict[str, Any], step: int) -> float:
    """Share of its learning rate that a group has at its next step: (n + 1) / (warmup + 1) for the n-th step after it came,
    then 1.
    """
    return float(min(1.0, (step - group["born"] + 1) / (group["warmup"] + 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, step: int) -> None:
    """Set the host's learning rate; each group gets it times its own scale and warm-up.

    Args:
        optimizer: of a grower.
        learning_rate: the host's.
        step: optimiser steps taken so far.
    """
    host_group(optimizer)["lr"] = learning_rate
    follow_host(optimizer, step)


def follow_host(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give each seed's group the host's learning rate times its own scale and warm-up. Every step of a grower begins with it.

    Args:
        optimizer: of a grower.
        step: optimiser steps taken so far.
    """
    learning_rate = host_group(optimizer)["lr"]
    for group in optimizer.param_groups:
        if group["name"] != HOST_GROUP:
            group["lr"] = learning_rate * group["scale"] * warmth(group, step)


def clip_gradients(optimizer: torch.optim.Optimizer, largest: float) -> None:
    """Scale each group's gradients down to a norm of at most ``largest``, group by group: a seed that learns behind the host
    must not change what the host's gradients are clipped by.
    """
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], largest)
