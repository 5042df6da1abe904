"""Shapley values of games whose answer is known: exact ones by the axioms, sampled ones by how far they say they may be off."""

from __future__ import annotations

import itertools
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.growth.shapley import exact_values, order_pairs, prefixes, sampled_values

PLAYERS = tuple("abcdef")


def everybody(players):
    return [frozenset(chosen) for size in range(len(players) + 1) for chosen in itertools.combinations(players, size)]


def random_game(seed, players=PLAYERS):
    rng = random.Random(seed)
    return {on: rng.gauss(0, 1) for on in everybody(players)}


def pairs_of(seed, count, players=PLAYERS):
    return list(itertools.islice(order_pairs(players, seed), count))


def by_every_order(players, gains):
    """The definition: the mean over all n! orders of what a player adds when it joins."""
    orders = list(itertools.permutations(players))
    return {
        player: fmean(
            gains[frozenset(order[: order.index(player) + 1])] - gains[frozenset(order[: order.index(player)])]
            for order in orders
        )
        for player in players
    }


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_exact_values_are_the_mean_over_every_order(count):
    players = PLAYERS[:count]
    gains = random_game(count, players)
    assert exact_values(players, gains) == pytest.approx(by_every_order(players, gains))


def test_additive_players_get_what_they_add():
    worth = dict(zip(PLAYERS, (1.0, -2.0, 0.5, 3.0, 0.0, 7.0), strict=True))
    gains = {on: sum(worth[player] for player in on) for on in everybody(PLAYERS)}
    assert exact_values(PLAYERS, gains) == pytest.approx(worth)
    for player, (value, error) in sampled_values(PLAYERS, gains, pairs_of(0, 3)).items():
        assert value == pytest.approx(worth[player]), "whatever the orders"
        assert error == pytest.approx(0.0, abs=1e-12)


def test_players_who_bring_the_same_share_it_and_one_who_brings_nothing_gets_nothing():
    gains = {on: float(bool(on & {"a", "b"})) for on in everybody("abc")}
    assert exact_values("abc", gains) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0.0})


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), pairs=st.integers(1, 5))
def test_values_add_up_to_the_gain_of_all_exact_or_sampled(seed, count, pairs):
    players = PLAYERS[:count]
    gains = random_game(seed, players)
    whole = gains[frozenset(players)] - gains[frozenset()]
    assert sum(exact_values(players, gains).values()) == pytest.approx(whole, abs=1e-12)
    sampled = sampled_values(players, gains, pairs_of(seed, pairs, players))
    assert sum(value for value, _ in sampled.values()) == pytest.approx(whole, abs=1e-12)


def test_sampled_values_are_as_far_off_as_they_say():
    distances = []
    for seed in range(60):
        gains = random_game(seed)
        truth = exact_values(PLAYERS, gains)
        estimates = sampled_values(PLAYERS, gains, pairs_of(seed, 24))
        distances += [(value - truth[player]) / error for player, (value, error) in estimates.items()]
    assert fmean(distances) == pytest.approx(0.0, abs=0.15), "unbiased"
    assert fmean(distance**2 for distance in distances) == pytest.approx(1.0, abs=0.3), "the error is a standard error"


def test_a_reversed_order_cancels_the_luck_of_joining_late():
    gains = {on: float(len(on) ** 2) for on in everybody(PLAYERS)}
    estimates = sampled_values(PLAYERS, gains, pairs_of(0, 5))
    assert {player: value for player, (value, _) in estimates.items()} == pytest.approx(dict.fromkeys(PLAYERS, 6.0))
    assert max(error for _, error in estimates.values()) == pytest.approx(0.0, abs=1e-12)


def test_one_pair_of_orders_has_no_error():
    assert {error for _, error in sampled_values(PLAYERS, random_game(0), pairs_of(0, 1)).values()} == {None}


def test_orders_come_with_their_reverse_and_are_the_same_for_the_same_seed():
    first, again, other = pairs_of(1, 20), pairs_of(1, 20), pairs_of(2, 20)
    assert first == again != other
    for order, back in first:
        assert sorted(order) == sorted(PLAYERS)
        assert back == order[::-1]
    assert len(set(first)) > 15
    assert pairs_of(1, 5) == first[:5], "however many are asked for"


def test_prefixes_are_the_coalitions_on_the_way():
    assert prefixes(("b", "a")) == [frozenset(), frozenset("b"), frozenset("ab")]
