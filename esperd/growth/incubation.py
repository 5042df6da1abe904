"""Incubation: how a seed learns before the network listens to it.

``lookahead``: besides the host's own step, a second pass with the seed at its target alpha; the gradient of that loss reaches the
seed only. The seed learns the size of its output as well as its direction, while the host's outputs, gradients, buffers and RNG
stream stay as they were, to the bit. The second pass shares what the host computed before the slot (:mod:`esperd.growth.replay`).

``straight_through``: no second pass; the seed receives the gradient of the host's own pass as if it had been heard
(:mod:`esperd.growth.straight_through`). The host stays to the bit; the seed learns a direction and no magnitude.

``frozen_input``: the host stands still while the seed learns on what the host makes of the samples, by passes with the seed at
its target alpha. Host weights, buffers and RNG stream stay to the bit because nothing else happens.

``joint``: the seed starts as the identity and trains with the host at its target alpha from the first step. Nothing is isolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import torch

from esperd.growth.contribution import PerSample, per_sample
from esperd.growth.gradients import GradientHealth, GradientRatio, gradient_norms
from esperd.growth.ledger import Ledger
from esperd.growth.network import GrowingNetwork, Seed
from esperd.growth.precision import Precision
from esperd.growth.ranks import Alone, Ranks
from esperd.growth.replay import Call, OrderChanged, Recording, calls_before
from esperd.growth.streams import Streams, device_of
from esperd.growth.untouched import Buffers, untouched

Sharing = Literal["shared", "copied", "whole"]
"""How second passes of a slot run: from what the host's pass computed, from copies of it, or from the beginning."""

CAREFUL: tuple[Sharing, ...] = ("shared", "copied", "whole")
"""The least careful first."""

SHARED_TOLERANCE = 1e-4
"""A pass that starts at the slot agrees with a whole one when loss and gradients differ by no more, relative to 1 + the loss,
and to the whole gradient's norm. On a CPU they are equal to the bit in every host tried; convolutions on other devices may
take another path."""


@dataclass(frozen=True)
class SecondPass:
    """What a pass behind the host gave: the mean loss (), detached, on the device, and the seed's gradients in order."""

    loss: torch.Tensor
    gradients: tuple[torch.Tensor | None, ...]


def lookahead_gradients(
    network: GrowingNetwork,
    seed: Seed,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    loss: PerSample,
    *,
    alpha: float,
    precision: Precision | None = None,
    streams: Streams | None = None,
    buffers: Buffers | None = None,
) -> SecondPass:
    """The gradients of the loss that the network would have with the seed at ``alpha``, for the seed alone.

    The pass is cut at the seed's input, so nothing flows back into the host before the slot, and the host's parameters
    receive no gradient at all. Only the seed's own buffers move.

    Args:
        network: in training mode.
        seed: in it.
        inputs: (B, ...).
        targets: (B, ...).
        loss: per-sample loss.
        alpha: at which the seed is heard.
        precision: of the pass; None: float32. Gradients are of the scaled loss where it has a scaler.
        streams: where dropout draws from; None: from a fork of where the streams stand.
        buffers: of the network without the seed, where they are known; None: they are kept for this pass.
    """
    precision = precision or Precision()
    alone = untouched(network, but=seed, streams=streams, buffers=buffers)
    with alone, network.alphas({seed.name: alpha}, detached=seed.name):
        with precision.autocast():
            value = per_sample(loss, network(inputs), targets, what="loss").mean()
        gradients = torch.autograd.grad(precision.scaled(value), list(seed.parameters()), allow_unused=True)
    return SecondPass(value.detach(), gradients)


@dataclass
class Incubation:
    """What was gathered about a seed since its epoch began."""

    ratio: GradientRatio
    loss_sum: torch.Tensor | None = None
    passes: int = 0


class Gathered(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank knows about a seed at the end of an epoch; None for what was never measured."""

    loss: float | None
    ratio: float | None
    sharing: Sharing | None


@dataclass
class Incubator:
    """Teaches the seeds that learn behind the host.

    Args:
        network: host and seeds.
        loss: per-sample loss.
        ledger: is charged for every pass.
        precision: of the passes.
        host_parameters: parameters of the host that train.
        ranks: the processes.
    """

    network: GrowingNetwork
    loss: PerSample
    ledger: Ledger
    precision: Precision
    host_parameters: int
    ranks: Ranks = field(default_factory=Alone)
    gathered: dict[str, Incubation] = field(default_factory=dict)
    """By seed in TRAINING."""
    sharing: dict[str, Sharing] = field(default_factory=dict)
    """How the second passes of each slot run, once it was tried."""
    settled: set[str] = field(default_factory=set)
    """Slots for which the ranks have settled it."""
    _draws: bool = True
    """Whether the host draws from Python's or numpy's stream, as far as its trace showed."""
    _plans: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    _recording: Recording | None = None
    _start: Streams | None = None
    _behind: tuple[Seed, ...] = ()
    _buffers: Buffers | None = None

    # --- the host's pass -------------------------------------------------------------------------------------------------

    @contextmanager
    def beside(self, seeds: Sequence[Seed], inputs: torch.Tensor, *, record: bool = True) -> Iterator[None]:
        """The host's own pass runs inside; what it computes before the seeds' slots is kept for their second passes.

        Args:
            seeds: that will be taught.
            inputs: of the pass.
            record: False: the host's pass cannot be looked into, or there is none; second passes run from the beginning.
        """
        self._recording, self._buffers, self._behind = None, None, tuple(seeds)
        if not seeds:
            yield
            return
        slots = dict.fromkeys(seed.record.slot for seed in seeds)
        if not record:
            self.sharing.update(dict.fromkeys(slots, "whole"))
        for slot in slots:
            self._plan(slot, inputs)
        self._start = Streams.take(device_of(self.network), everybodys=self._draws)
        shared = [slot for slot in slots if self.sharing.get(slot) != "whole"]
        # copies are kept as long as it is not known whether they are needed
        copies = any(self.sharing.get(slot) != "shared" for slot in shared)
        recording = Recording(self.network, {slot: self._plans[slot] for slot in shared}, copies=copies, everybodys=self._draws)
        try:
            with recording.running():
                yield
        except OrderChanged:
            self.sharing.update(dict.fromkeys(shared, "whole"))
            return
        self._recording = recording

    def _plan(self, slot: str, inputs: torch.Tensor) -> None:
        """Trace the host once for each slot. A resumed run traces again what it had traced: that is no work of the job's."""
        if self.sharing.get(slot) == "whole" or (slot in self.sharing and slot in self._plans):
            return

        def trace() -> dict[str, tuple[Call, ...]]:
            found, self._draws = calls_before(self.network, inputs, [slot])
            return found

        shape = tuple(inputs.shape[1:])
        found = trace() if slot in self.sharing else self.ledger.charge("incubation", "trace", len(inputs), trace, shape=shape)
        if slot in found:
            self._plans[slot] = found[slot]
        else:
            self.sharing[slot] = "whole"

    # --- second passes ---------------------------------------------------------------------------------------------------

    def teach(self, seed: Seed, structure: str, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One second pass for a seed in TRAINING: its gradients are set.

        Args:
            seed: learns behind the host.
            structure: which seeds are heard, for the ledger.
            inputs: the batch that the host's pass saw, (B, ...).
            targets: (B, ...).

        Returns:
            () the mean loss of that pass, detached, still on the device.
        """
        slot = seed.record.slot
        if slot not in self.sharing:
            second = self._first_time(seed, structure, inputs, targets)
        else:
            second = self._charged(seed, structure, inputs, targets, self.sharing[slot])
        if slot not in self.settled:
            self._settle(slot, self.ranks.gather(f"how second passes of {slot} run", self.sharing[slot]))
        for parameter, gradient in zip(seed.parameters(), second.gradients, strict=True):
            parameter.grad = gradient
        gathered = self.incubation(seed)
        gathered.loss_sum = second.loss if gathered.loss_sum is None else gathered.loss_sum + second.loss
        gathered.passes += 1
        return second.loss

    def _first_time(self, seed: Seed, structure: str, inputs: torch.Tensor, targets: torch.Tensor) -> SecondPass:
        """Find out how this slot's passes may run: a whole pass is held against passes from the slot.

        Twice from the slot: a host that writes into a kept tensor in place spoils the second. The seed's own buffers see the
        passes that it took to find out as one.
        """
        buffers = {name: buffer.clone() for name, buffer in seed.named_buffers()}

        def again(way: Sharing) -> SecondPass:
            with torch.no_grad():
                for name, buffer in seed.named_buffers():
                    buffer.copy_(buffers[name])
            return self._charged(seed, structure, inputs, targets, way)

        wanted = again("whole")
        ways: tuple[Sharing, ...] = () if self._recording is None else ("shared", "copied")
        for way in ways:
            try:
                passes = [again(way) for _ in range(2)]
            except Exception:  # noqa: BLE001, S112 - however a host fails that cannot be entered at a slot, whole passes serve it
                continue
            if all(_agree(second, wanted) for second in passes):
                self.sharing[seed.record.slot] = way
                return passes[-1]
        self.sharing[seed.record.slot] = "whole"
        return again("whole")

    def _settle(self, slot: str, told: Sequence[Sharing | None]) -> None:
        """The most careful rank decides: second passes cost the same on all of them."""
        self.sharing[slot] = max((way for way in told if way is not None), key=CAREFUL.index)
        self.settled.add(slot)

    def _charged(self, seed: Seed, structure: str, inputs: torch.Tensor, targets: torch.Tensor, way: Sharing) -> SecondPass:
        name = f"{structure}+{seed.name}" + (" whole" if way == "whole" else "")
        shape = tuple(inputs.shape[1:])
        return self.ledger.charge("incubation", name, len(inputs), lambda: self._pass(seed, inputs, targets, way), shape=shape)

    def _pass(self, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor, way: Sharing) -> SecondPass:
        slot = seed.record.slot
        if way == "whole" or self._recording is None:
            return self._gradients(seed, inputs, targets, self._start)
        with self._recording.from_slot(slot, copied=way == "copied"):
            return self._gradients(seed, inputs, targets, self._recording.streams(slot))

    def _gradients(self, seed: Seed, inputs: torch.Tensor, targets: torch.Tensor, streams: Streams | None) -> SecondPass:
        if self._buffers is None:  # a seed behind the host is in no pass but its own, so its buffers are nobody else's matter
            self._buffers = Buffers(self.network, but=self._behind)
        return lookahead_gradients(
            self.network,
            seed,
            inputs,
            targets,
            self.loss,
            alpha=seed.alpha_target,
            precision=self.precision,
            streams=streams,
            buffers=self._buffers,
        )

    # --- what is known ---------------------------------------------------------------------------------------------------

    def incubation(self, seed: Seed) -> Incubation:
        """What was gathered about a seed in TRAINING; begins with nothing."""
        if seed.name not in self.gathered:
            sizes = [parameter.numel() for parameter in seed.parameters()]
            self.gathered[seed.name] = Incubation(ratio=GradientRatio(self.host_parameters, sizes))
        return self.gathered[seed.name]

    def sample_gradients(
        self, seeds: Sequence[Seed], host: torch.Tensor | None, overflowed: Mapping[torch.nn.Parameter, torch.Tensor]
    ) -> None:
        """Take in the gradients of seeds in TRAINING against the host's norms.

        Args:
            seeds: due.
            host: norms, as from :func:`~esperd.growth.gradients.gradient_norms`.
            overflowed: by parameter, whether its gradient was not finite before the scaler's sake made it so.
        """
        for seed in seeds:
            norms = gradient_norms(seed.parameters())
            flags = [overflowed.get(parameter) for parameter in seed.parameters()]
            if norms is not None and any(flag is not None for flag in flags):
                finite = torch.zeros((), dtype=torch.bool, device=norms.device)
                norms = torch.where(torch.stack([finite if flag is None else flag for flag in flags]), torch.inf, norms)
            self.incubation(seed).ratio.observe(host, norms)

    def health(self, seed: Seed) -> GradientHealth:
        """Gradient statistics so far; waits for the device."""
        gathered = self.gathered.get(seed.name)
        return GradientHealth() if gathered is None else gathered.ratio.read()

    def end_epoch(self, seed: Seed) -> None:
        """Read what a seed's second passes lost on average in this epoch, over all ranks; the next one's mean starts anew."""
        gathered, slot = self.incubation(seed), seed.record.slot
        known = Gathered(
            loss=None if gathered.loss_sum is None else float(gathered.loss_sum) / gathered.passes,
            ratio=gathered.ratio.read().ratio,
            sharing=self.sharing.get(slot),
        )
        told = self.ranks.gather(f"the incubation of {seed.name}", known)
        seed.incubation_loss = _mean([rank.loss for rank in told])
        seed.gradient_ratio = told[0].ratio  # of averaged gradients: the others' differs by rounding at most
        if known.sharing is not None:
            self._settle(slot, [rank.sharing for rank in told])
        gathered.loss_sum, gathered.passes = None, 0


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _agree(one: SecondPass, other: SecondPass) -> bool:
    """Whether two passes gave the same loss and gradients, within :data:`SHARED_TOLERANCE`."""
    if not bool((one.loss - other.loss).abs() <= SHARED_TOLERANCE * (1 + other.loss.abs())):
        return False
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        if (mine is None) != (theirs is None):
            return False
        if mine is not None and theirs is not None and not bool((mine - theirs).norm() <= SHARED_TOLERANCE * theirs.norm()):
            return False
    return True
