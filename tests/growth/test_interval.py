"""Intervals of a mean: Student's t against printed tables, the bootstrap against its theory, and both at their limits."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import UnknownName
from esperd.growth.interval import RESAMPLES, SMALLEST_SAMPLE, mean_interval, resampled_means, student_quantile

TABLE = [
    (0.975, 7, 2.365),
    (0.975, 10, 2.228),
    (0.975, 30, 2.042),
    (0.975, 120, 1.980),
    (0.95, 10, 1.812),
    (0.95, 29, 1.699),
    (0.995, 7, 3.499),
    (0.995, 10, 3.169),
    (0.995, 60, 2.660),
]
"""Printed tables of Student's t."""

METHODS = pytest.mark.parametrize("method", ["t", "bootstrap"])
SAMPLES = st.lists(st.floats(-1e3, 1e3), min_size=SMALLEST_SAMPLE, max_size=40)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, count):
    return torch.randn(count, generator=generator(seed), dtype=torch.float64)


def exponential(seed, count):
    """Of mean 1, skewed to the right."""
    return -torch.rand(count, generator=generator(seed), dtype=torch.float64).log()


def lognormal(seed, count):
    """Of mean exp(1/2), with a long tail."""
    return normal(seed, count).exp()


def coverage(method, draw, truth, *, count, trials=400):
    """Shares of 95 % intervals that hold the truth, that lie above it, and that lie below it."""
    found = [mean_interval(draw(seed, count), 0.95, method, seed)[1:] for seed in range(trials)]
    above = sum(lower > truth for lower, _ in found) / trials
    below = sum(upper < truth for _, upper in found) / trials
    return 1 - above - below, above, below


# --- Student's t -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "degrees", "value"), TABLE)
def test_quantiles_equal_the_printed_tables(probability, degrees, value):
    assert student_quantile(probability, degrees) == pytest.approx(value, rel=1e-3)
    assert student_quantile(1 - probability, degrees) == pytest.approx(-value, rel=1e-3)


def test_the_interval_of_eleven_pairs_equals_one_computed_by_hand():
    # mean 6, sum of squares 110, so variance 11 and half width 2.228 * sqrt(11 / 11)
    mean, lower, upper = mean_interval(torch.arange(1.0, 12.0), 0.95)
    assert (mean, lower, upper) == (6.0, pytest.approx(6 - 2.228, abs=2e-3), pytest.approx(6 + 2.228, abs=2e-3))


def test_the_interval_of_31_pairs_equals_one_computed_by_hand():
    # 15 times -1, 15 times 1 and once 0: mean 0, variance 30 / 30
    values = torch.tensor([-1.0] * 15 + [1.0] * 15 + [0.0])
    assert mean_interval(values, 0.95)[1:] == (
        pytest.approx(-2.042 / 31**0.5, rel=1e-3),
        pytest.approx(2.042 / 31**0.5, rel=1e-3),
    )


def test_nine_in_ten_intervals_of_level_09_hold_the_true_mean():
    draws, hits = generator(0), 0
    for _ in range(1000):
        _, lower, upper = mean_interval(torch.randn(12, generator=draws) + 2.0, 0.9)
        hits += lower <= 2.0 <= upper
    assert 870 <= hits <= 930


# --- the bootstrap -----------------------------------------------------------------------------------------------------------


def test_on_many_normal_samples_the_bootstrap_agrees_with_t():
    values = normal(0, 3000) + 0.3
    t, bootstrap = (mean_interval(values, 0.95, method) for method in ("t", "bootstrap"))
    width = t[2] - t[1]
    assert bootstrap[0] == t[0]
    assert bootstrap[1] == pytest.approx(t[1], abs=0.05 * width)
    assert bootstrap[2] == pytest.approx(t[2], abs=0.05 * width)


def test_bootstrap_intervals_of_normal_samples_hold_the_true_mean_as_often_as_they_say():
    assert coverage("bootstrap", normal, 0.0, count=60)[0] == pytest.approx(0.95, abs=0.03)


def test_the_lower_end_of_a_skewed_sample_is_as_careful_as_it_says_and_that_of_t_is_not():
    # 2.5 % of lower ends may lie above the truth. t never spends them, and pays with upper ends that lie below it.
    _, t_above, t_below = coverage("t", lognormal, math.exp(0.5), count=30)
    _, above, below = coverage("bootstrap", lognormal, math.exp(0.5), count=30)
    assert t_above <= 0.005
    assert 0.0125 <= above <= 0.045
    assert below < t_below


def test_the_bootstrap_leans_to_the_side_of_the_long_tail():
    mean, lower, upper = mean_interval(exponential(3, 50), 0.95, "bootstrap")
    assert upper - mean > 1.1 * (mean - lower)
    mean, lower, upper = mean_interval(-exponential(3, 50), 0.95, "bootstrap")
    assert mean - lower > 1.1 * (upper - mean)


def test_a_bootstrap_interval_is_drawn_from_its_seed_and_nothing_else():
    values, before = exponential(0, 30), torch.get_rng_state()
    first, again, other = (mean_interval(values, 0.95, "bootstrap", seed) for seed in (1, 1, 2))
    assert first == again
    assert first[1:] != other[1:]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("at_once", [1, 300, 10**9])
def test_resamples_are_the_same_however_many_are_drawn_at_once(at_once):
    values = normal(0, 50)
    plain, chunked = (resampled_means(values, generator(5), **options) for options in ({}, {"draws_at_once": at_once}))
    assert plain.shape == (RESAMPLES,)
    assert torch.equal(plain, chunked)


def test_resampling_five_thousand_samples_never_holds_all_draws(monkeypatch):
    largest, randint = [], torch.randint

    def noting(high, size, **options):
        largest.append(math.prod(size))
        return randint(high, size, **options)

    monkeypatch.setattr(torch, "randint", noting)
    mean_interval(normal(0, 5000), 0.95, "bootstrap")
    assert sum(largest) == 5000 * RESAMPLES
    assert max(largest) <= 2**20


def bca_step_by_step(values, confidence, seed):
    """Efron's formulas as they are printed, the jackknife by leaving one out, on the resamples of this seed."""
    mean, count = fmean(values), len(values)
    resamples = sorted(resampled_means(torch.tensor(values, dtype=torch.float64), generator(seed)).tolist())
    ties = sum(abs(value - mean) < 1e-9 for value in resamples)
    below = sum(value <= mean - 1e-9 for value in resamples)
    bias = NormalDist().inv_cdf((below + ties / 2) / RESAMPLES)
    without = [(sum(values) - value) / (count - 1) for value in values]
    pulls = [fmean(without) - value for value in without]
    acceleration = sum(pull**3 for pull in pulls) / (6 * sum(pull**2 for pull in pulls) ** 1.5)
    ends = []
    for probability in (0.5 - confidence / 2, 0.5 + confidence / 2):
        z = bias + NormalDist().inv_cdf(probability)
        rank = NormalDist().cdf(bias + z / (1 - acceleration * z)) * (RESAMPLES + 1)
        first, second = resamples[math.floor(rank) - 1 : math.floor(rank) + 1]
        ends.append(first + (rank - math.floor(rank)) * (second - first))
    return ends


@pytest.mark.parametrize(
    "values",
    [
        exponential(3, 20).tolist(),
        (-exponential(4, 60) + 5.0).tolist(),
        [1.0] * 3 + [-1.0] + [0.0] * 16,  # of a metric that is 0 or 1: many resamples have exactly the sample's mean
    ],
    ids=["right", "left", "ties"],
)
def test_the_bootstrap_equals_efrons_formulas_step_by_step(values):
    assert list(mean_interval(torch.tensor(values), 0.9, "bootstrap", 7)[1:]) == pytest.approx(
        bca_step_by_step(values, 0.9, 7), abs=1e-6
    )


def test_a_level_finer_than_the_resamples_is_unbounded():
    _, lower, upper = mean_interval(normal(0, 100), 0.9999, "bootstrap")
    assert (lower, upper) == (-math.inf, math.inf)


# --- both --------------------------------------------------------------------------------------------------------------------


@METHODS
def test_a_higher_confidence_is_a_wider_interval(method):
    ends = [mean_interval(normal(0, 40), confidence, method)[1:] for confidence in (0.8, 0.95, 0.99)]
    widths = [upper - lower for lower, upper in ends]
    assert widths == sorted(widths)
    assert widths[0] > 0.1


@METHODS
@settings(max_examples=25, deadline=None)
@given(values=SAMPLES)
def test_the_mean_lies_in_its_interval_and_between_the_extremes(method, values):
    mean, lower, upper = mean_interval(torch.tensor(values, dtype=torch.float64), 0.9, method)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= mean <= max(values) + slack
    assert lower <= mean + slack
    assert upper >= mean - slack


@METHODS
@settings(max_examples=25, deadline=None)
@given(values=SAMPLES, shift=st.floats(-1e3, 1e3), factor=st.floats(0.01, 100))
def test_an_interval_moves_with_its_values_and_scales_with_them(method, values, shift, factor):
    plain = torch.tensor(values, dtype=torch.float64)
    found = mean_interval(plain, 0.9, method)
    moved = mean_interval(plain * factor + shift, 0.9, method)
    tolerance = 1e-6 * (1 + abs(shift) + factor * max(map(abs, values)))
    assert moved == pytest.approx([factor * end + shift for end in found], abs=tolerance)


@METHODS
@settings(max_examples=25, deadline=None)
@given(value=st.floats(-1e6, 1e6), count=st.integers(SMALLEST_SAMPLE, 30))
def test_a_constant_difference_is_certain(method, value, count):
    found = mean_interval(torch.full((count,), value, dtype=torch.float64), 0.95, method)
    assert found == pytest.approx((value, value, value), rel=1e-9, abs=1e-300)


def test_differences_too_small_to_square_still_have_a_bootstrap_interval():
    mean, lower, upper = mean_interval(1e-160 * exponential(0, 20), 0.95, "bootstrap")
    assert 0 < lower < mean < upper < 1e-158


@METHODS
@pytest.mark.parametrize("count", [1, 2, SMALLEST_SAMPLE - 1])
def test_too_few_pairs_bound_nothing(method, count):
    assert mean_interval(torch.ones(count), 0.95, method) == (1.0, -math.inf, math.inf)
    assert mean_interval(torch.ones(SMALLEST_SAMPLE), 0.95, method) == (1.0, 1.0, 1.0)


@METHODS
def test_no_pairs_have_no_mean(method):
    mean, lower, upper = mean_interval(torch.empty(0), 0.95, method)
    assert math.isnan(mean)
    assert (lower, upper) == (-math.inf, math.inf)


@METHODS
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_not_finite_bounds_nothing(method, broken):
    mean, lower, upper = mean_interval(torch.tensor([1.0] * 20 + [broken]), 0.95, method)
    assert not math.isfinite(mean)
    assert (lower, upper) == (-math.inf, math.inf)


def test_an_unknown_interval_is_refused_with_those_that_exist():
    with pytest.raises(UnknownName, match="no interval is called 'magic'; there are: t, bootstrap") as caught:
        mean_interval(torch.ones(3), 0.95, "magic")
    assert caught.value.fields["available"] == ["t", "bootstrap"]
