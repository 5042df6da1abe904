"""What becomes of a seed on probation: kept, culled, or measured again."""

from __future__ import annotations

from esperd.messages.growth import Contribution, SeedRecord
from esperd.messages.policy import Decision, PolicySettings
from esperd.policy.state import PendingSeed


def judge(record: SeedRecord, pending: PendingSeed, settings: PolicySettings) -> Decision:
    """Decide on one PROBATIONARY seed by its contribution's interval.

    Above the rent: fossilize (gate G5 still has its word). Below: cull. Across it: wait for more evidence, and cull after
    ``patience`` measurements.

    Args:
        record: the seed.
        pending: its rent, and how often it was measured.
        settings: patience.
    """
    contribution, price = record.contribution, pending.rent
    if contribution is None:
        return Decision(action="wait", seed=record.seed, reason="its contribution has not been measured yet")
    measured = _describe(contribution)
    if contribution.lower > price:
        reason = f"{measured}: the interval lies above its rent of {price:.4f}"
        return Decision(action="fossilize", seed=record.seed, score=contribution.loss - price, reason=reason)
    if contribution.upper < price:
        reason = f"{measured}: the interval lies below its rent of {price:.4f}"
        return Decision(action="cull", seed=record.seed, score=contribution.loss - price, reason=reason)
    undecided = f"{measured}: the interval spans its rent of {price:.4f}"
    if pending.measurements >= settings.patience:
        reason = f"{undecided} and patience ends after {pending.measurements} measurements"
        return Decision(action="cull", seed=record.seed, score=contribution.loss - price, reason=reason)
    reason = f"{undecided}; measurement {pending.measurements} of {settings.patience}"
    return Decision(action="wait", seed=record.seed, score=contribution.loss - price, reason=reason)


def _describe(contribution: Contribution) -> str:
    return (
        f"without it the loss moves by {contribution.loss:+.4f} [{contribution.lower:+.4f}, {contribution.upper:+.4f}] "
        f"({contribution.confidence:.0%}, {contribution.samples} samples)"
    )
