"""What is measured at the slots while a network trains: the gradient there, what flows by, and how long the host takes to it.

Measured on the host's own passes, as they are, at every :data:`~esperd.growth.gradients.STRIDE`-th step. Sums stay on the device
until a decision point reads them, and training stays as it is, to the bit: a hook looks at a gradient, and touches nothing.

Not measured: passes whose FLOPs are being counted, which take longer than others; passes through a compiled program, which has
no place to look into (under :class:`~esperd.growth.compiled.Compiled` nothing is known of any slot); passes behind the host. Of
several ranks each measures its own samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esperd.growth.gradients import STRIDE
from esperd.growth.network import GrowingNetwork
from esperd.growth.precision import Precision
from esperd.growth.streams import device_of
from esperd.messages.policy import SlotStatistics

TIMED = 32
"""Steps between two decision points whose forward seconds are taken: a mean of more says nothing new. Chosen, not measured."""

Span = tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]
"""Beginning and end, as seconds or as events on the device's stream."""


@dataclass
class _Place:
    """One slot in the passes since the last decision point."""

    slot: str
    module: nn.Module
    spans: list[Span] = field(default_factory=list)
    bytes_per_sample: int | None = None
    norm: torch.Tensor | None = None
    """() of the gradient in the step that runs, on the device; of several calls of the module, their root of squares."""


class SlotWatch:
    """Measures at every slot of a network.

    Args:
        network: whose slots.
    """

    def __init__(self, network: GrowingNetwork) -> None:
        self._places = [_Place(record.slot, network.host.get_submodule(record.slot)) for record in network.slots]
        self._device = device_of(network)
        self._nothing = torch.full((), math.nan, device=self._device)
        self._one = torch.ones((), device=self._device)
        self.sums: torch.Tensor | None = None
        """(2, slots) float32, on the device: sums of the norms, and how many; None before the first sampled step."""

    def due(self, step: int) -> bool:
        """Whether this step is sampled.

        Args:
            step: optimiser steps taken before it.
        """
        return bool(self._places) and step % STRIDE == STRIDE - 1

    @contextmanager
    def watching(self, precision: Precision) -> Iterator[None]:
        """The host's own forward and backward pass runs inside.

        Args:
            precision: knows by how much the loss is scaled.
        """
        timed = len(self._places[0].spans) < TIMED
        for place in self._places:
            place.norm = None
        handles = [handle for place in self._places for handle in self._hooks(place, timed=timed)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._take_in(precision)

    def read(self) -> tuple[SlotStatistics, ...]:
        """What was measured since this was last called, by slot in order of execution; empty when no step was sampled. Waits for
        the device.
        """
        sums, counts = (None, None) if self.sums is None else self.sums.tolist()
        told = []
        for index, place in enumerate(self._places):
            samples = 0 if counts is None else int(counts[index])
            if not samples and place.bytes_per_sample is None:
                continue
            told.append(
                SlotStatistics(
                    slot=place.slot,
                    gradient=sums[index] / samples if sums is not None and samples else None,
                    steps=samples,
                    activation_bytes=place.bytes_per_sample,
                    seconds=_mean_seconds(place.spans),
                )
            )
            place.spans, place.bytes_per_sample = [], None
        self.sums = None
        return tuple(told)

    def forget(self) -> None:
        """The network goes back to an earlier point: what was measured since belongs to no decision."""
        self.sums = None
        for place in self._places:
            place.spans, place.bytes_per_sample = [], None

    def _hooks(self, place: _Place, *, timed: bool) -> list[RemovableHandle]:
        """Placed around the slot's own hook, which lets its seeds enter: the clock stops before it, and the tensor is looked at
        behind it.
        """
        begun: list[float | torch.cuda.Event] = []

        def begin(_module: nn.Module, _inputs: object) -> None:
            begun.append(self._now())

        def end(_module: nn.Module, _inputs: object, _output: object) -> None:
            place.spans.append((begun.pop(), self._now()))  # type: ignore[arg-type]  # both of one kind

        def left(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            place.bytes_per_sample = output.element_size() * output[0].numel()
            if output.requires_grad:
                output.register_hook(_norm_into(place))  # type: ignore[no-untyped-call]  # torch does not annotate it

        looking = place.module.register_forward_hook(left)
        if not timed:
            return [looking]
        clocks = [
            place.module.register_forward_pre_hook(begin, prepend=True),
            place.module.register_forward_hook(end, prepend=True),
        ]
        return [looking, *clocks]

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch does not annotate it
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _take_in(self, precision: Precision) -> None:
        """Add this step's norms to the sums; one that is missing or no finite number is left out."""
        norms = torch.stack([self._nothing if place.norm is None else place.norm for place in self._places])
        if precision.scaler is not None:
            norms = norms / precision.scaled(self._one)
        known = torch.isfinite(norms)
        taken = torch.stack([torch.where(known, norms, 0.0), known.float()])
        self.sums = taken if self.sums is None else self.sums + taken


def _norm_into(place: _Place) -> Callable[[torch.Tensor], None]:
    """A hook on a tensor (B, ...) that keeps the norm of its gradient: the mean loss's, times √B, so that it is the root of the
    mean square over samples of each sample's own.
    """

    def look(gradient: torch.Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32) * len(gradient) ** 0.5
        place.norm = norm if place.norm is None else torch.hypot(place.norm, norm)

    return look


def _mean_seconds(spans: list[Span]) -> float | None:
    if not spans:
        return None
    return sum(_seconds(begin, end) for begin, end in spans) / len(spans)


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        return end - begin  # type: ignore[operator]  # both of one kind
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000.0
