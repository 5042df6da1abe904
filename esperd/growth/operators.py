"""Operators: how what a seed computes enters the tensor that flows through its slot.

Each is exact at alpha 0, where the host's tensor passes to the bit, and none hides a seed's gradient at birth: a seed that starts
as the identity still learns from its first step. An operator stands between host and seed and belongs to the seed: what it has
to learn (only :class:`Gate` does) is trained, counted, checkpointed and exported with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from esperd.declarations import TOPOLOGY_SHAPES
from esperd.errors import InvalidSlot, UnknownName
from esperd.messages.growth import SlotRecord

Alpha = float | Tensor
"""A number, a tensor () or one alpha per sample (B, 1, ...)."""

GATE_REDUCTION = 4
"""Features per hidden unit of a gate, as in squeeze-and-excite with a smaller reduction; chosen, not measured."""

GATE_NARROWEST = 8
"""Hidden units of a gate at least; chosen, not measured."""


class Add(nn.Module):
    """``lerp(h, s(h), alpha)``: the convex blend, ``h`` to the bit at 0 and ``s(h)`` to the bit at 1."""

    def forward(self, host: Tensor, seed: Tensor, alpha: Alpha) -> Tensor:
        """(B, ...), (B, ...) → (B, ...)."""
        return torch.lerp(host, seed, alpha)


class Multiply(nn.Module):
    """``h · (1 + alpha · tanh(s(h) - h))``: the seed scales what flows by, by a factor between 1 - alpha and 1 + alpha.

    A feature that is 0 stays 0: the seed can weigh what the host found, and find nothing of its own.
    """

    def forward(self, host: Tensor, seed: Tensor, alpha: Alpha) -> Tensor:
        """(B, ...), (B, ...) → (B, ...)."""
        return host * (1.0 + alpha * torch.tanh(seed - host))


class Gate(nn.Module):
    """``lerp(h, s(h), alpha · g(h))``: a small learned network says how much of the seed each sample gets.

    ``g`` is two linear layers, C → max(8, C // 4) → 1, and a sigmoid. It looks at the mean over all positions of a map (C, H, W),
    and at each position of a sequence (T, D) by itself: a mean over positions would show a causal model its future.

    Args:
        record: the slot.
    """

    def __init__(self, record: SlotRecord) -> None:
        super().__init__()
        features = _features(record)
        self.pooled = record.topology == "cnn"
        self.look = nn.Linear(features, _hidden(features))
        self.open = nn.Linear(_hidden(features), 1)

    def forward(self, host: Tensor, seed: Tensor, alpha: Alpha) -> Tensor:
        """(B, ...), (B, ...) → (B, ...)."""
        seen = host.mean(dim=(2, 3)) if self.pooled else host  # (B, C), (B, F) or (B, T, D)
        share = torch.sigmoid(self.open(torch.relu(self.look(seen))))  # (B, 1) or (B, T, 1)
        if self.pooled:
            share = share.unsqueeze(-1).unsqueeze(-1)
        return torch.lerp(host, seed, alpha * share)


OPERATORS: Mapping[str, Callable[[SlotRecord], nn.Module]] = MappingProxyType(
    {"add": lambda _: Add(), "multiply": lambda _: Multiply(), "gate": Gate}
)
"""Every operator by name."""


def operator(name: str, record: SlotRecord) -> nn.Module:
    """A fresh operator for a slot.

    Raises:
        UnknownName: no operator has this name.
    """
    if name not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise UnknownName(f"no operator is called {name!r}; there are: {known}", kind="operators", name=name)
    return OPERATORS[name](record)


def operator_parameters(name: str, record: SlotRecord) -> int:
    """Parameters the operator adds to its seed's."""
    if name != "gate":
        return 0
    features = _features(record)
    return (features + 1) * _hidden(features) + _hidden(features) + 1


def operator_flops(name: str, record: SlotRecord) -> float:
    """Forward FLOPs of one sample that the operator adds to its seed's; a multiply-add counts as two."""
    if name != "gate":
        return 0.0
    features = _features(record)
    positions = record.shape[0] if record.topology == "transformer" else 1
    return 2.0 * positions * (features * _hidden(features) + _hidden(features))


def _features(record: SlotRecord) -> int:
    """Width of the axis that carries features: C of (C, H, W), F of (F,), D of (T, D)."""
    if record.topology not in TOPOLOGY_SHAPES or not math.prod(record.shape):
        raise InvalidSlot(f"slot {record.slot!r} of topology {record.topology!r} and shape {record.shape} has no features")
    return record.shape[-1] if record.topology == "transformer" else record.shape[0]


def _hidden(features: int) -> int:
    return max(GATE_NARROWEST, features // GATE_REDUCTION)
