"""Turns what became of seeds into rewards of arms.

A seed that was fossilized earned its last contribution minus its rent. One that was culled brought nothing and was still
paid for: its reward is minus its rent, whatever it showed before. The same holds for a germination that was refused, so
that an arm no gate lets in does not stay "never tried" for ever, and for one that was screened out. A germination that failed
because the kernel could not be provided teaches nothing about the arm, and is not credited.
"""

from __future__ import annotations

from esperd.messages.growth import LIVE_STAGES, SeedRecord, Stage
from esperd.messages.policy import Arm, Observation, PolicySettings
from esperd.policy.rent import rent
from esperd.policy.state import ArmStatistics, BanditState, PendingSeed


def observe(state: BanditState, observation: Observation, settings: PolicySettings) -> BanditState:
    """Bring the state up to an observation: adopt new seeds, count measurements, credit what ended. Pure.

    A living seed that is no longer reported is taken for culled. Each seed is credited once, even when a rollback brings it
    back to life.

    Args:
        state: as the last decision left it.
        observation: of this decision point.
        settings: prices of the rent.

    Returns:
        The new state; nothing is asked for in it.
    """
    records = {record.seed: record for record in observation.seeds}
    known = {pending.seed: pending for pending in state.pending}
    credited = set(state.credited)
    statistics = {entry.arm: entry for entry in state.arms}
    pending: list[PendingSeed] = []
    arrived: set[Arm] = set()

    for seed in sorted(records):
        record = records[seed]
        if seed in credited and record.stage not in LIVE_STAGES:
            continue
        if seed not in known:
            arrived.add(_arm(record))
            price = rent(record.parameters, record.flops_per_sample, observation, settings)
            known[seed] = PendingSeed(seed=seed, arm=_arm(record), rent=price)
        if record.stage in LIVE_STAGES:
            pending.append(_measured(known[seed], record))
            continue
        credited.add(seed)
        earned = reward(record, known[seed].rent)
        if earned is not None:
            _credit(statistics, known[seed].arm, earned)
    for seed in sorted(known.keys() - records.keys() - credited):
        credited.add(seed)
        _credit(statistics, known[seed].arm, -known[seed].rent)
    for asked in state.asked:
        if asked.arm not in arrived and asked.arm not in observation.unavailable:
            _credit(statistics, asked.arm, -asked.rent)

    return BanditState(
        arms=tuple(statistics[arm] for arm in sorted(statistics)),
        pending=tuple(pending),
        credited=tuple(sorted(credited)),
    )


def reward(record: SeedRecord, price: float) -> float | None:
    """What a pull earned, in units of the job's loss.

    Args:
        record: a seed that ended.
        price: its rent.

    Returns:
        Contribution minus rent for a fossilized seed, minus the rent for any other; None when a fossilized seed has no
        measured contribution, which teaches nothing.
    """
    if record.stage is not Stage.FOSSILIZED:
        return -price
    return None if record.contribution is None else record.contribution.loss - price


def _measured(pending: PendingSeed, record: SeedRecord) -> PendingSeed:
    """Count a contribution once, and only those of PROBATIONARY."""
    contribution = record.contribution
    if record.stage is not Stage.PROBATIONARY or contribution is None or contribution.epoch == pending.measured_epoch:
        return pending
    return PendingSeed(
        seed=pending.seed,
        arm=pending.arm,
        rent=pending.rent,
        measurements=pending.measurements + 1,
        measured_epoch=contribution.epoch,
    )


def _credit(statistics: dict[Arm, ArmStatistics], arm: Arm, earned: float) -> None:
    before = statistics.get(arm, ArmStatistics(arm=arm, pulls=0, total=0.0, squares=0.0))
    statistics[arm] = ArmStatistics(
        arm=arm, pulls=before.pulls + 1, total=before.total + earned, squares=before.squares + earned * earned
    )


def _arm(record: SeedRecord) -> Arm:
    return Arm(slot=record.slot, blueprint=record.blueprint)
