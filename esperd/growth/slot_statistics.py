"""What is measured at the slots while a network trains: the gradient there, what flows by, and how long the host takes to it.

Measured on the host's own passes, as they are, at the second step after a decision point and every :data:`STRIDE`-th from there.
Norms stay on the device until a decision point reads them, and training stays as it is, to the bit: a hook looks at a gradient,
and touches nothing.

Not measured: passes whose FLOPs are being counted, which take longer than others; passes through a compiled program, which has
no place to look into (under :class:`~esperd.growth.compiled.Compiled` nothing is known of any slot); passes behind the host. Of
several ranks each measures its own samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esperd.growth.network import GrowingNetwork
from esperd.growth.precision import Precision
from esperd.growth.streams import device_of
from esperd.messages.policy import SlotStatistics

STRIDE = 32
"""Every so many steps are sampled. Measured on a CPU, a sampled step takes a twentieth longer than others (a CNN of four slots)
to a sixth (an MLP of two), so that all of them together take 0.15 to 0.5 % longer."""

MOST = 64
"""Steps sampled between two decision points, at most: a mean of more says nothing new. Chosen, not measured."""

TIMED = 8
"""Of these, so many take forward seconds as well. Chosen, not measured."""

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
    samples: int = 0
    """In the batch of that step."""


class SlotWatch:
    """Measures at every slot of a network.

    Args:
        network: whose slots.
    """

    def __init__(self, network: GrowingNetwork) -> None:
        self._places = [_Place(record.slot, network.host.get_submodule(record.slot)) for record in network.slots]
        device = device_of(network)
        self._device = device
        self._nothing = torch.full((), math.nan, device=device)
        self._one = torch.ones((), device=device)
        self._begun = 0
        """Steps taken at the last decision point."""
        self._fresh: list[tuple[torch.Tensor, list[float]]] = []
        """By sampled step: (slots + 1,) norms and by how much the loss was scaled, on the device; and √B by slot."""
        self._norms: list[list[float]] = []
        """By sampled step and slot, as read from the device; NaN where there was none."""

    def due(self, step: int) -> bool:
        """Whether this step is sampled.

        Args:
            step: optimiser steps taken before it.
        """
        sampled = len(self._fresh) + len(self._norms)
        return bool(self._places) and sampled < MOST and (step - self._begun) % STRIDE == 1

    @contextmanager
    def watching(self, precision: Precision) -> Iterator[None]:
        """The host's own forward and backward pass runs inside.

        Args:
            precision: knows by how much the loss is scaled.
        """
        timed = len(self._places[0].spans) < TIMED
        handles = []
        for place in self._places:
            place.norm = None
            handles += self._hooks(place, timed=timed)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        scale = self._one if precision.scaler is None else precision.scaled(self._one)
        norms = torch.stack([*(self._nothing if place.norm is None else place.norm for place in self._places), scale])
        self._fresh.append((norms, [place.samples**0.5 for place in self._places]))

    def read(self, step: int) -> tuple[SlotStatistics, ...]:
        """What was measured since the last decision point, by slot in order of execution; empty when no step was sampled. Waits
        for the device.

        Args:
            step: optimiser steps taken.
        """
        told = []
        for place, norms in zip(self._places, zip(*self.norms(), strict=True), strict=False):
            known = [norm for norm in norms if math.isfinite(norm)]
            told.append(
                SlotStatistics(
                    slot=place.slot,
                    gradient=sum(known) / len(known) if known else None,
                    steps=len(known),
                    activation_bytes=place.bytes_per_sample,
                    seconds=_mean_seconds(place.spans),
                )
            )
        self.begin(step)
        return tuple(told)

    def norms(self) -> list[list[float]]:
        """Norms of the sampled steps, by step and slot; NaN for none. With :meth:`sample_bytes` enough to go on from, but for
        seconds. Waits for the device.
        """
        if self._fresh:
            read = torch.stack([norms for norms, _ in self._fresh]).tolist()
            for (*norms, scale), (_, roots) in zip(read, self._fresh, strict=True):
                self._norms.append([norm * root / scale for norm, root in zip(norms, roots, strict=True)])
            self._fresh = []
        return self._norms

    def sample_bytes(self) -> tuple[int | None, ...]:
        """Bytes of a sample's tensor by slot, in order of execution; None where no sampled step was taken yet."""
        return tuple(place.bytes_per_sample for place in self._places)

    def begin(self, step: int, norms: list[list[float]] | None = None, sample_bytes: Sequence[int | None] | None = None) -> None:
        """Measure from a decision point on.

        Args:
            step: optimiser steps taken until then.
            norms: what :meth:`norms` gave when training was stopped since; None: nothing is known yet.
            sample_bytes: what :meth:`sample_bytes` gave then.
        """
        self._begun, self._norms, self._fresh = step, list(norms or ()), []
        for index, place in enumerate(self._places):
            place.spans, place.bytes_per_sample = [], sample_bytes[index] if sample_bytes else None

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
            place.samples = len(output)
            place.bytes_per_sample = output.element_size() * output.numel() // max(place.samples, 1)
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


def _norm_into(place: _Place) -> Callable[[torch.Tensor], None]:
    """A hook on a tensor (B, ...) that keeps the norm of its gradient. That is of the mean loss: times √B it is the root of the
    mean square over samples of each sample's own.
    """

    def look(gradient: torch.Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
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
