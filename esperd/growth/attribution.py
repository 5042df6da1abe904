"""How the loss of a network divides among its seeds: alone, left out, in pairs, and by Shapley values. Exact and charged.

Positive means that a seed lowers the loss. Known limit, as of every contribution: the host has adapted to its seeds, so this
explains the network that is there; it does not say what it would be had a seed never been grown.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from esperd.growth.coalitions import Coalitions
from esperd.growth.contribution import LARGEST_PASS, Alphas, CostOf, PerSample
from esperd.growth.network import GrowingNetwork
from esperd.growth.shapley import Coalition, Order, exact_values, order_pairs, prefixes, sampled_values
from esperd.messages.growth import Attribution, Interaction, IntervalMethod, SeedAttribution

EXACT_SEEDS = 6
"""Up to this many seeds all 2^n coalitions are measured where the FLOPs reach: of six, 32 pairs of orders pass through 61 of the
64 anyway, and would leave an error."""

PERMUTATION_PAIRS = 32
"""Most orders sampled for Shapley values, each with its reverse. Chosen, not measured."""

NOBODY: Coalition = frozenset()


def attribute(
    network: GrowingNetwork,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    loss: PerSample,
    seeds: Alphas,
    *,
    cost_of: CostOf,
    flops_cap: float,
    epoch: int,
    confidence: float,
    interval: IntervalMethod = "t",
    fused: bool = False,
    rng_seed: int = 0,
    largest_pass: int = LARGEST_PASS,
) -> Attribution:
    """Attribute the loss on a split to seeds.

    Measured in this order, as far as the FLOPs reach: all on and all off, each seed left out, each alone, pairs; of up to four
    seeds these are all coalitions. Shapley values are exact where every coalition is known, and of up to six seeds the rest
    are measured if all of them fit the cap. Otherwise orders are sampled, each with its reverse, until the cap or 32 pairs.
    What is missing is None, and said.

    Args:
        network: left as it was, to the bit. Seeds that are not in ``seeds`` stay as they are, whatever their stage.
        batches: (inputs, targets), each (B, ...); the split.
        loss: per-sample loss.
        seeds: the seeds to attribute to, with the alpha each has where it is on.
        cost_of: FLOPs of a pass, per sample; a larger set of seeds never costs less.
        flops_cap: passes that would exceed it do not run; ``math.inf`` for none.
        epoch: when this is measured.
        confidence: level of the intervals.
        interval: how they are computed.
        fused: whether passes may be stacked; see :func:`~esperd.growth.contribution.fuses`.
        rng_seed: of sampled orders and bootstrap intervals; the same seed gives the same attribution.
        largest_pass: samples in a stacked pass.

    Returns:
        The values, what is missing and why, and the FLOPs spent, for the caller to charge.

    Raises:
        InvalidSlot: a seed is not in the network.
        ValueError: an alpha is not above 0 and at most 1.
    """
    for name, alpha in seeds.items():
        network.seed(name)
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"seed {name!r} has alpha {alpha} where it is on; it must be above 0 and at most 1")
    names, everyone = tuple(seeds), frozenset(seeds)
    coalitions = Coalitions(
        network=network,
        batches=batches,
        loss=loss,
        seeds=seeds,
        cost_of=cost_of,
        flops_cap=flops_cap,
        fused=fused,
        largest_pass=largest_pass,
    )
    left_out, alone = [everyone - {name} for name in names], [frozenset({name}) for name in names]
    pairs = [frozenset(pair) for pair in itertools.combinations(names, 2)]
    complete = coalitions.measure([everyone, NOBODY, *left_out, *alone, *pairs])
    shapley = _shapley(coalitions, names, rng_seed, PERMUTATION_PAIRS if complete else 0)
    told = partial(coalitions.contribution, epoch=epoch, confidence=confidence, interval=interval, rng_seed=rng_seed)
    return Attribution(
        epoch=epoch,
        samples=coalitions.samples,
        loss_all_on=coalitions.mean(everyone),
        loss_all_off=coalitions.mean(NOBODY),
        seeds=tuple(
            SeedAttribution(
                seed=name,
                alpha=alpha,
                leave_one_out=told(name, everyone - {name}),
                solo=told(name, NOBODY),
                shapley=shapley.values.get(name),
                shapley_error=shapley.errors.get(name),
            )
            for name, alpha in seeds.items()
        ),
        interactions=_interactions(coalitions, names),
        exact=shapley.exact,
        permutations=shapley.permutations,
        coalitions=len(coalitions.means),
        flops=coalitions.spent,
        not_measured=(*_missing(coalitions, names), *shapley.missing),
    )


@dataclass(frozen=True, kw_only=True)
class _Shapley:
    """Shapley values and standard errors by seed, as far as they are known."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    exact: bool | None = None
    permutations: int = 0
    missing: tuple[str, ...] = ()


def _shapley(coalitions: Coalitions, names: Sequence[str], rng_seed: int, most: int) -> _Shapley:
    """From all coalitions where all are known; otherwise from as many pairs of orders as the FLOPs reach, ``most`` at most.

    The first pair that does not fit ends it: going on with cheaper ones would prefer orders whose coalitions are known.
    """
    everything = 2 ** len(names)
    if most and len(names) <= EXACT_SEEDS:
        coalitions.measure(
            (frozenset(on) for size in range(len(names)) for on in itertools.combinations(names, size)), whole=True
        )
    sampled: list[tuple[Order, Order]] = []
    for pair in itertools.islice(order_pairs(names, rng_seed), most):
        joined = [on for order in pair for on in prefixes(order)]
        if len(coalitions.means) == everything or not coalitions.finite or not coalitions.measure(joined, whole=True):
            break
        sampled.append(pair)
    if not coalitions.finite:
        return _Shapley(missing=("Shapley values: a loss is not finite",))
    gains = {on: gain for on in coalitions.means if (gain := coalitions.gain(on)) is not None}
    if len(gains) == everything:
        return _Shapley(values=exact_values(names, gains), errors=dict.fromkeys(names, 0.0), exact=True)
    if not sampled:
        return _Shapley(missing=("Shapley values: the FLOPs cap",))
    estimates = sampled_values(names, gains, sampled)
    short = most - len(sampled)
    return _Shapley(
        values={name: value for name, (value, _) in estimates.items()},
        errors={name: error for name, (_, error) in estimates.items()},
        exact=False,
        permutations=2 * len(sampled),
        missing=(f"{short} of {most} pairs of orders for Shapley values: the FLOPs cap",) if short else (),
    )


def _interactions(coalitions: Coalitions, names: Sequence[str]) -> tuple[Interaction, ...]:
    """What pairs gain beyond the gains of their two, for every pair of which that is known."""
    found = []
    for first, second in itertools.combinations(names, 2):
        gains = [coalitions.gain(frozenset(on)) for on in ({first, second}, {first}, {second})]
        known = [gain for gain in gains if gain is not None]
        if len(known) == len(gains):
            found.append(Interaction(first=first, second=second, value=known[0] - known[1] - known[2]))
    return tuple(found)


def _missing(coalitions: Coalitions, names: Sequence[str]) -> list[str]:
    """What cannot be told of losses, seeds and pairs, each with its reason."""
    everyone = frozenset(names)
    parts = {"loss with all on": [everyone], "loss with all off": [NOBODY]}
    for name in names:
        parts[f"{name} left out"] = [everyone, everyone - {name}]
        parts[f"{name} alone"] = [NOBODY, frozenset({name})]
    for first, second in itertools.combinations(names, 2):
        pair = frozenset({first, second})
        parts[f"{first} with {second}"] = [NOBODY, frozenset({first}), frozenset({second}), pair]
    return [f"{what}: {why}" for what, needed in parts.items() if (why := coalitions.why_not(*needed))]
