"""Shapley values: what each player of a game brings, on average over every order in which they could join.

Plain arithmetic: a game is a table of what coalitions gain, however that was measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev

import torch

Coalition = frozenset[str]
Order = tuple[str, ...]

SMALLEST_ERROR_SAMPLE = 2
"""Pairs of orders from which a standard error can be told."""


def exact_values(players: Sequence[str], gains: Mapping[Coalition, float]) -> dict[str, float]:
    """Shapley values from all 2^n coalitions (Shapley 1953).

    Args:
        players: n names.
        gains: what each coalition gains; that of nobody is 0 or any other level.

    Returns:
        One value for each player. They add up to the gain of all minus that of nobody.
    """
    count = len(players)
    values = {}
    for player in players:
        others = [other for other in players if other != player]
        terms = []
        for size in range(count):
            weight = 1 / (count * math.comb(count - 1, size))
            for chosen in itertools.combinations(others, size):
                before = frozenset(chosen)
                terms.append(weight * (gains[before | {player}] - gains[before]))
        values[player] = math.fsum(terms)
    return values


def sampled_values(
    players: Sequence[str], gains: Mapping[Coalition, float], pairs: Sequence[tuple[Order, Order]]
) -> dict[str, tuple[float, float | None]]:
    """Shapley values from some orders, each with its reverse: antithetic, because who joins late in one joins early in the other.

    Unbiased, and as exact as all orders in one thing: the values add up to the gain of all minus that of nobody.

    Args:
        players: n names.
        gains: what every prefix of those orders gains.
        pairs: as from :func:`order_pairs`; the pairs are independent, the two orders of one are not.

    Returns:
        Value and standard error by player; the error of a single pair is not known: None.
    """
    values: dict[str, tuple[float, float | None]] = {}
    for player in players:
        effects = [fmean(_effect(player, order, gains) for order in pair) for pair in pairs]
        error = stdev(effects) / math.sqrt(len(effects)) if len(effects) >= SMALLEST_ERROR_SAMPLE else None
        values[player] = (fmean(effects), error)
    return values


def order_pairs(players: Sequence[str], rng_seed: int) -> Iterator[tuple[Order, Order]]:
    """Random orders of the players, each with its reverse, without end; the same ones for the same seed."""
    generator = torch.Generator().manual_seed(rng_seed)
    while True:
        order = tuple(players[index] for index in torch.randperm(len(players), generator=generator).tolist())
        yield order, order[::-1]


def prefixes(order: Order) -> list[Coalition]:
    """The coalitions that form while players join in this order, from nobody to all."""
    return [frozenset(order[:size]) for size in range(len(order) + 1)]


def _effect(player: str, order: Order, gains: Mapping[Coalition, float]) -> float:
    before = frozenset(order[: order.index(player)])
    return gains[before | {player}] - gains[before]
