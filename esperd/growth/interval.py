"""Confidence intervals of a mean of paired differences: Student's t, or the bootstrap where the differences are skewed."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import get_args

import torch

from esperd.errors import UnknownName
from esperd.messages.growth import IntervalMethod

SMALLEST_SAMPLE = 8
"""Below this many pairs no interval is given: a t interval of so few says nothing about a skewed loss. Chosen, not measured."""

RESAMPLES = 2000
"""Bootstrap resamples: an end of a 95 % interval is about the 50th of them. Chosen, not measured."""

DRAWS_AT_ONCE = 2**20
"""Samples drawn at once while resampling: 16 MiB of indices and values. Of a larger sample one resample at a time is drawn."""

TIE = 1e-12
"""Resampled means this close to the sample's, in units of the largest deviation, are equal to it but for rounding: metrics that
are 0 or 1 hit the sample's mean often. Far below the smallest step of such a mean, 1 / N."""

NORMAL = NormalDist()


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by the expansion around the normal quantile (Abramowitz & Stegun 26.7.5).

    Relative error below 1e-3 for 7 or more degrees of freedom at probabilities up to 0.995.
    """
    z = NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(degrees) ** (power + 1) for power, term in enumerate(terms))


def mean_interval(
    differences: torch.Tensor, confidence: float, method: IntervalMethod = "t", rng_seed: int = 0
) -> tuple[float, float, float]:
    """Mean of paired differences with its two-sided interval.

    Args:
        differences: (N,) one difference per sample.
        confidence: level, for example 0.95.
        method: ``t``, or ``bootstrap`` for the bias-corrected and accelerated one (see :func:`bootstrap_interval`).
        rng_seed: of the bootstrap's resamples; the same seed gives the same interval.

    Returns:
        mean, lower, upper. With fewer than 8 samples, or a difference that is not finite, the interval is unbounded: nothing
        is known.

    Raises:
        UnknownName: there is no such method.
    """
    if method not in get_args(IntervalMethod):
        known = list(get_args(IntervalMethod))
        raise UnknownName(
            f"no interval is called {method!r}; there are: {', '.join(known)}", kind="intervals", name=method, available=known
        )
    values = differences.double().cpu()
    count = values.numel()
    mean = float(values.mean()) if count else float("nan")
    if count < SMALLEST_SAMPLE or not bool(torch.isfinite(values).all()):
        return mean, float("-inf"), float("inf")
    if method == "bootstrap":
        return mean, *bootstrap_interval(values, confidence, torch.Generator().manual_seed(rng_seed))
    half = student_quantile(0.5 + confidence / 2, count - 1) * float(values.std(unbiased=True)) / count**0.5
    return mean, mean - half, mean + half


def bootstrap_interval(values: torch.Tensor, confidence: float, generator: torch.Generator) -> tuple[float, float]:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987, "Better Bootstrap Confidence Intervals").

    Args:
        values: (N,) finite, double, on the CPU.
        confidence: level, for example 0.95.
        generator: draws the resamples.

    Returns:
        lower, upper. An end beyond the outermost resample is unbounded: 2,000 resamples say nothing about a tail of 1e-4.
    """
    mean = float(values.mean())
    if bool((values == values[0]).all()):
        return mean, mean
    deviations = values - mean
    scale = float(deviations.abs().max())
    deviations = deviations / scale  # neither squares nor cubes of them under- or overflow
    means = resampled_means(deviations, generator).sort().values  # (RESAMPLES,)
    ties = int((means.abs() <= TIE).sum())
    below = int((means < -TIE).sum()) + ties / 2
    bias = NORMAL.inv_cdf(min(max(below, 0.5), RESAMPLES - 0.5) / RESAMPLES)
    # The jackknife's acceleration; leaving one value out moves a mean by its deviation, up to a factor that cancels.
    acceleration = float((deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5))

    def position(probability: float) -> float:
        """Rank of the order statistic, from 1, at which an end lies."""
        shifted = bias + NORMAL.inv_cdf(probability)
        room = 1 - acceleration * shifted
        return NORMAL.cdf(bias + shifted / room if room > 0 else math.copysign(math.inf, shifted)) * (RESAMPLES + 1)

    low, high = position(0.5 - confidence / 2), position(0.5 + confidence / 2)
    lower = mean + scale * _order_statistic(means, low) if low >= 1 else float("-inf")
    upper = mean + scale * _order_statistic(means, high) if high <= RESAMPLES else float("inf")
    return lower, upper


def resampled_means(values: torch.Tensor, generator: torch.Generator, draws_at_once: int = DRAWS_AT_ONCE) -> torch.Tensor:
    """Means of resamples with replacement, (N,) → (RESAMPLES,); the same numbers however many are drawn at once."""
    count = values.numel()
    rows = max(1, draws_at_once // count)
    means = []
    for start in range(0, RESAMPLES, rows):
        picks = torch.randint(count, (min(rows, RESAMPLES - start), count), generator=generator)
        means.append(values[picks].mean(1))
    return torch.cat(means)


def _order_statistic(ordered: torch.Tensor, position: float) -> float:
    """The value at a rank that need not be whole, from 1; ranks beyond the ends are the ends."""
    below = min(max(math.floor(position), 1), len(ordered))
    above = min(below + 1, len(ordered))
    share = min(max(position - below, 0.0), 1.0)
    first, second = float(ordered[below - 1]), float(ordered[above - 1])
    return first + share * (second - first)
