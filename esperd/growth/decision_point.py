"""A decision point of several processes: all come to it from one standing, and leave it with one.

What they decide there is decided once, because it follows from what all of them hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from esperd.growth.alpha import Ramp
from esperd.growth.checksum import checksums
from esperd.growth.network import Presence, Seed
from esperd.growth.records import record_of
from esperd.messages.base import Value
from esperd.messages.growth import SeedRecord

if TYPE_CHECKING:
    from esperd.growth.grower import Grower


class SeedStanding(Value, frozen=True, kw_only=True):
    """One seed, without its tensors."""

    record: SeedRecord
    """Without its kernel: where every rank compiles its own, manifests differ by the times that were measured."""
    graph: str | None
    """Digest of what its kernel computes; None for a plain module."""
    presence: Presence
    isolated: bool
    leaving: bool
    ramp: Ramp


class GroupStanding(Value, frozen=True, kw_only=True):
    """One group of the optimiser, without its state."""

    learning_rate: float
    scale: float
    born: int
    warmup: int
    parameters: int


class Standing(Value, frozen=True, kw_only=True):
    """A network in growth."""

    epoch: int
    step: int
    germinated: int
    seeds: dict[str, SeedStanding]
    """Those in the network, and those whose slot still cools down."""
    groups: dict[str, GroupStanding]
    tensors: dict[str, str]
    """Checksums of weights and buffers; empty where they were not asked for."""


@contextmanager
def decision_point(grower: Grower, what: str) -> Iterator[None]:
    """What happens inside happens on all ranks, from one standing to one: structure, stages, weights and buffers.

    Buffers are first brought to those of rank 0: what BatchNorm counts differs, because the samples do. At the end the ledger is
    settled.

    Args:
        grower: one of the ranks'.
        what: names it in messages.

    Raises:
        RanksDisagree: the standings differ; on every rank, naming what differs.
        RankFailed: another rank raised, or is not heard of.
    """
    ranks = grower.ranks
    if ranks.size == 1:
        yield
        return
    with ranks.together(what):
        ranks.agree(f"where {what} begins", standing(grower, weighed=False))
        ranks.follow(grower.network.buffers())
        yield
        grower.ledger.settle(ranks)
        ranks.agree(f"what {what} leaves", standing(grower, weighed=True))


def standing(grower: Grower, *, weighed: bool) -> Standing:
    """Describe a network in growth.

    Args:
        grower: holds it.
        weighed: read every weight and buffer, too.
    """
    network = grower.network
    return Standing(
        epoch=grower.epoch,
        step=grower.step,
        germinated=network.germinated,
        seeds={seed.name: _seed(seed) for seed in [*network.seeds(), *grower.resting.values()]},
        groups={
            group["name"]: GroupStanding(
                learning_rate=float(group["lr"]),
                scale=group["scale"],
                born=group["born"],
                warmup=group["warmup"],
                parameters=sum(parameter.numel() for parameter in group["params"]),
            )
            for group in grower.optimizer.param_groups
        },
        tensors=checksums(network) if weighed else {},
    )


def _seed(seed: Seed) -> SeedStanding:
    return SeedStanding(
        record=msgspec.structs.replace(record_of(seed), kernel=None),
        graph=None if seed.graph is None else hashlib.sha256(seed.graph.encode()).hexdigest(),
        presence=seed.presence,
        isolated=seed.isolated,
        leaving=seed.life.leaving,
        ramp=seed.ramp,
    )
