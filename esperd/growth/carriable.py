"""Whether an optimiser can be carried as esperd carries one: through growth, into a fork, into a checkpoint and out of it,
through a rollback. Found out by doing it with two small tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec
import torch
from torch import nn

from esperd.errors import InvalidOptimizer
from esperd.growth.optimizer_state import GroupState, Kept, describe, put
from esperd.growth.streams import Streams, forked

CarriedT = TypeVar("CarriedT")

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups → a fresh optimiser."""

HOST, SEED = "host", "seed"
BEFORE, AFTER = 2, 12
"""Steps of the host alone, with a seed that is culled, and with one that stays, before the optimiser is carried; and steps
compared afterwards, more than what counts to five or ten. Chosen, not measured."""

FORK, CHECKPOINT, ROLLBACK = "in a fork (a deep copy)", "when it is resumed from a checkpoint", "after a rollback"

Values = list[torch.Tensor]
"""Copies of the two tensors, the host's and the seed's."""


def require_carriable(optimizer: torch.optim.Optimizer, build: Build) -> None:
    """Refuse an optimiser that does not go on to the bit wherever esperd carries it: groups must come and go, a step must need no
    closure, and all that it remembers must stand in its groups or by parameter. Tried where its own parameters live; the random
    streams are left as they were.

    Args:
        optimizer: the one to be used.
        build: builds another one like it.

    Raises:
        InvalidOptimizer: says what it does that cannot be carried, and what to do.
    """
    kind = type(optimizer).__name__
    if not all(isinstance(group.get("name"), str) for group in optimizer.param_groups):
        raise InvalidOptimizer(f"{kind} does not keep the parameter groups it is given, with their names", optimizer=kind)
    like: torch.Tensor = optimizer.param_groups[0]["params"][0]
    with forked(like.device):
        tried = _grown(kind, build, like)
        fork = _carried(tried.optimizer, FORK, lambda: copy.deepcopy(tried))
        resumed = _carried(tried.optimizer, CHECKPOINT, lambda: tried.resumed(build))
        place = tried.keep()
        expected = tried.gone_on()
        _require_equal(tried, expected, FORK, fork)
        _require_equal(tried, expected, CHECKPOINT, resumed)
        _carried(tried.optimizer, ROLLBACK, lambda: tried.put_back(place))
        _require_equal(tried, expected, ROLLBACK, tried)


@dataclass
class _Tried:
    """A small network in an optimiser's hands: the host's tensor, and that of a seed which came later."""

    host: nn.Parameter
    seed: nn.Parameter
    optimizer: torch.optim.Optimizer
    streams: Streams
    """What an optimiser draws from that goes on, wherever it was carried."""

    @classmethod
    def fresh(cls, build: Build, like: torch.Tensor) -> Self:
        host, seed = (nn.Parameter(torch.ones(2, 2, dtype=like.dtype, device=like.device)) for _ in range(2))
        optimizer = build([{"params": [host], "name": HOST, "scale": 1.0, "born": 0, "warmup": 0}])
        return cls(host, seed, optimizer, Streams.take(like.device))

    def germinate(self, seed: nn.Parameter) -> None:
        self.optimizer.add_param_group({"params": [seed], "name": SEED, "scale": 1.0, "born": BEFORE, "warmup": 0})

    def cull(self, seed: nn.Parameter) -> None:
        self.optimizer.state.pop(seed, None)
        del self.optimizer.param_groups[-1]

    def steps(self, first: int, count: int) -> None:
        for number in range(first, first + count):
            generator = torch.Generator().manual_seed(number)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(2, 2, generator=generator).to(parameter)
            self.optimizer.step()

    def gone_on(self) -> Values:
        """Train on, and tell where that led."""
        self.streams.put()
        self.steps(3 * BEFORE, AFTER)
        return self.values()

    def values(self) -> Values:
        return [self.host.detach().clone(), self.seed.detach().clone()]

    def resumed(self, build: Build) -> Self:
        """As another process builds it anew from what was written to a file."""
        groups, tensors = describe(self.optimizer)
        read = msgspec.msgpack.decode(msgspec.msgpack.encode(groups), type=tuple[GroupState, ...])
        other = self.fresh(build, self.host)
        other.streams = self.streams
        other._set(self.values())
        other.germinate(other.seed)
        put(other.optimizer, read, {name: tensor.clone() for name, tensor in tensors.items()})
        return other

    def keep(self) -> tuple[Values, Kept]:
        return self.values(), Kept.of(self.optimizer, self._references())

    def put_back(self, place: tuple[Values, Kept]) -> None:
        values, kept = place
        self._set(values)
        kept.put_back(self.optimizer, self._references())

    def _set(self, values: Values) -> None:
        with torch.no_grad():
            self.host.copy_(values[0])
            self.seed.copy_(values[1])

    def _references(self) -> dict[int, Any]:
        return {id(parameter): parameter for parameter in (self.host, self.seed)}


def _grown(kind: str, build: Build, like: torch.Tensor) -> _Tried:
    """In mid-training: the host took some steps, another seed came and went, and this one has taken some."""
    try:
        tried = _Tried.fresh(build, like)
        tried.steps(0, BEFORE)
        passing = nn.Parameter(torch.ones_like(tried.seed))
        tried.germinate(passing)
        tried.steps(BEFORE, BEFORE)
        tried.cull(passing)
        tried.germinate(tried.seed)
        tried.steps(2 * BEFORE, BEFORE)
    except (Exception, SystemExit) as error:
        raise InvalidOptimizer(
            f"{kind} cannot take a seed's parameters in mid-training: {type(error).__name__}: {error}; use sgd, adam or "
            "adamw, or one that steps without a closure and takes new parameter groups",
            optimizer=kind,
        ) from error
    return tried


def _carried(optimizer: torch.optim.Optimizer, way: str, carry: Callable[[], CarriedT]) -> CarriedT:
    try:
        return carry()
    except InvalidOptimizer:
        raise
    except (Exception, SystemExit) as error:
        kind = type(optimizer).__name__
        raise InvalidOptimizer(
            f"{kind} cannot go on {way}: {type(error).__name__}: {error}; {_advice(optimizer)}", optimizer=kind
        ) from error


def _require_equal(tried: _Tried, expected: Values, way: str, carried: _Tried) -> None:
    values = _carried(tried.optimizer, way, carried.gone_on)
    if all(torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True) for one, other in zip(values, expected, strict=True)):
        return
    largest = max(float((one - other).abs().max()) for one, other in zip(values, expected, strict=True))
    kind = type(tried.optimizer).__name__
    raise InvalidOptimizer(
        f"{kind} trains on otherwise {way}: on two tensors, with the same gradients, its weights differ by up to {largest:.2g} "
        f"after {AFTER} steps; {_advice(tried.optimizer)}",
        optimizer=kind,
        largest_difference=largest,
    )


def _advice(optimizer: torch.optim.Optimizer) -> str:
    """What to do, and what the optimiser keeps where nobody looks for it."""
    plain = vars(torch.optim.SGD([nn.Parameter(torch.ones(1))]))
    own = [name for name in vars(optimizer) if name not in plain]
    held = f" (it keeps {', '.join(map(repr, own))} on itself)" if own else ""
    return f"what it remembers must stand in its parameter groups or in state[parameter], as tensors, numbers or texts{held}"
