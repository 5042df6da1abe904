"""Tries of earlier jobs as a person wants to see them: by blueprint, topology and depth. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from esperd.messages.evidence import EvidenceRow, TriedSeed
from esperd.policy.precedents import gain_of, third_of, weights_of


def rows_of(tried: Iterable[TriedSeed]) -> tuple[EvidenceRow, ...]:
    """Sum tries up.

    Args:
        tried: oldest first.

    Returns:
        By blueprint, topology and third of the depth, in that order.
    """
    groups: dict[tuple[str, str, int], list[TriedSeed]] = {}
    for one in tried:
        third = 0 if one.depth is None else third_of(one.depth)
        groups.setdefault((one.blueprint, one.topology or "", third), []).append(one)
    return tuple(_row(groups[key]) for key in sorted(groups))


def _row(tried: list[TriedSeed]) -> EvidenceRow:
    newest = tried[-1]
    measured = [one.contribution for one in tried if one.contribution is not None]
    return EvidenceRow(
        blueprint=newest.blueprint,
        topology=newest.topology,
        third=None if newest.depth is None else third_of(newest.depth),
        tries=len(tried),
        kept=sum(one.outcome == "fossilized" for one in tried),
        refused=sum(one.outcome == "refused" for one in tried),
        jobs=len({one.job for one in tried}),
        contribution=_mean(contribution.loss for contribution in measured),
        lower=_mean(contribution.lower for contribution in measured),
        upper=_mean(contribution.upper for contribution in measured),
        gain=_gain(tried),
        reward=_mean(one.reward for one in tried),
        incubation_loss=_mean(one.incubation_loss for one in tried),
        gradient_ratio=_mean(one.gradient_ratio for one in tried),
        activation_bytes=_mean(one.activation_bytes for one in tried),
        seconds_share=_mean(one.seconds_share for one in tried),
        parameters=(min(one.parameters for one in tried), max(one.parameters for one in tried)),
        flops_per_sample=(min(one.flops_per_sample for one in tried), max(one.flops_per_sample for one in tried)),
        newest=newest.recorded_at,
    )


def _gain(tried: list[TriedSeed]) -> float | None:
    known = [gain for gain in map(gain_of, tried) if gain is not None]
    return fmean(known, weights_of(len(known))) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known; None when nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
