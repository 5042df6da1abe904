"""Turns what became of seeds into rewards of arms.

A seed that was fossilized earned its last contribution minus its rent. One that was culled brought nothing and was still
paid for: its reward is minus its rent, whatever it showed before. The same holds for a germination that was refused, so
that an arm no gate lets in does not stay "never tried" for ever, and for one that was screened out. A germination that failed
because the kernel could not be provided teaches nothing about the arm, and is not credited.
"""

from __future__ import annotations

import math
from typing import TypeVar

import msgspec

from esperd.messages.growth import LIVE_STAGES, SeedRecord, Stage
from esperd.messages.policy import Arm, ArmMerit, ArmTrial, Observation, PolicySettings
from esperd.policy.circumstances import circumstances_of
from esperd.policy.rent import rent, seconds_share_of
from esperd.policy.state import ArmStatistics, AskedArm, BanditState, Circumstances, PendingSeed, Try


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
    asked = {entry.arm: entry for entry in state.asked}
    book = _Book(state)
    pending: list[PendingSeed] = []
    arrived: set[Arm] = set()

    for seed in sorted(records):
        record = records[seed]
        if seed in credited and record.stage not in LIVE_STAGES:
            continue
        if seed not in known:
            arrived.add(_arm(record))
            known[seed] = _adopt(record, asked.get(_arm(record)), observation, settings)
        if record.stage in LIVE_STAGES:
            pending.append(_measured(known[seed], record))
            continue
        credited.add(seed)
        earned = reward(record, known[seed].rent)
        if earned is not None:
            book.credit(known[seed].arm, earned, known[seed].circumstances)
    for seed in sorted(known.keys() - records.keys() - credited):
        credited.add(seed)
        book.credit(known[seed].arm, -known[seed].rent, known[seed].circumstances)
    for entry in state.asked:
        if entry.arm not in arrived and entry.arm not in observation.unavailable:
            book.credit(entry.arm, -entry.rent, entry.circumstances, refused=True)

    return BanditState(
        arms=tuple(book.statistics[arm] for arm in sorted(book.statistics)),
        tries=tuple(book.tries),
        pending=tuple(pending),
        credited=tuple(sorted(credited)),
        merits=_latest(state.merits, observation.merits),
        gauged_passes=state.gauged_passes + _new_passes(state.merits, observation),
        trials=_latest(state.trials, observation.trials),
    )


ScoutedT = TypeVar("ScoutedT", bound=ArmMerit | ArmTrial)


def _latest(known: tuple[ScoutedT, ...], new: tuple[ScoutedT, ...]) -> tuple[ScoutedT, ...]:
    """The latest of each arm, sorted."""
    by_arm = {found.arm: found for found in (*known, *new)}
    return tuple(by_arm[arm] for arm in sorted(by_arm))


def passes_of(flops_per_sample: float, observation: Observation) -> float:
    """What a pass of the network with a seed costs, in passes of the host."""
    return 1.0 + flops_per_sample / max(observation.host_flops_per_sample, 1.0)


def _new_passes(known: tuple[ArmMerit, ...], observation: Observation) -> float:
    """Passes that merits took which are told for the first time: at one point each round tells those of the rounds before."""
    told = {(merit.arm, merit.epoch) for merit in known}
    prices = {option.arm: passes_of(option.flops_per_sample, observation) for option in observation.options}
    new = (merit for merit in observation.merits if (merit.arm, merit.epoch) not in told)
    return math.fsum(merit.batches * prices.get(merit.arm, 1.0) for merit in new)


def reward(record: SeedRecord, price: float) -> float | None:
    """What a pull earned, in units of the job's loss.

    Args:
        record: a seed that ended.
        price: its rent.

    Returns:
        Contribution minus rent for a fossilized seed, minus the rent for any other; None when a fossilized seed has no
        measured contribution, or none that is a finite number, which teaches nothing.
    """
    if record.stage is not Stage.FOSSILIZED:
        return -price
    if record.contribution is None or not math.isfinite(record.contribution.loss):
        return None
    return record.contribution.loss - price


class _Book:
    """Rewards of arms, as single tries and summed up."""

    def __init__(self, state: BanditState) -> None:
        self.statistics = {entry.arm: entry for entry in state.arms}
        self.tries = list(state.tries)

    def credit(self, arm: Arm, earned: float, circumstances: Circumstances | None, *, refused: bool = False) -> None:
        before = self.statistics.get(arm, ArmStatistics(arm=arm, pulls=0, total=0.0, squares=0.0))
        self.statistics[arm] = ArmStatistics(
            arm=arm,
            pulls=before.pulls + 1,
            total=before.total + earned,
            squares=before.squares + earned * earned,
            refused=before.refused + refused,
            refused_total=before.refused_total + (earned if refused else 0.0),
        )
        self.tries.append(Try(arm=arm, reward=earned, circumstances=circumstances))


def _adopt(record: SeedRecord, asked: AskedArm | None, observation: Observation, settings: PolicySettings) -> PendingSeed:
    """A seed that is reported for the first time; one that nobody asked for has the circumstances of now."""
    if asked is None:
        circumstances = circumstances_of(record.slot, record.parameters, record.flops_per_sample, observation)
    else:
        circumstances = asked.circumstances
    seconds_share = seconds_share_of(_arm(record), observation)
    price = rent(record.parameters, record.flops_per_sample, observation, settings, seconds_share)
    return PendingSeed(seed=record.seed, arm=_arm(record), rent=price, circumstances=circumstances)


def _measured(pending: PendingSeed, record: SeedRecord) -> PendingSeed:
    """Count a contribution once, and only those of PROBATIONARY."""
    contribution = record.contribution
    if record.stage is not Stage.PROBATIONARY or contribution is None or contribution.epoch == pending.measured_epoch:
        return pending
    return msgspec.structs.replace(pending, measurements=pending.measurements + 1, measured_epoch=contribution.epoch)


def _arm(record: SeedRecord) -> Arm:
    return Arm(slot=record.slot, blueprint=record.blueprint)
