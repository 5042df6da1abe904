"""The strategy ``ucb``: judge seeds on probation, then germinate at most one arm, or decline with a reason.

Pure, torch-free and deterministic: the answer depends on the request alone.
"""

from __future__ import annotations

import msgspec

from esperd.messages.growth import LIVE_STAGES, SeedRecord, Stage
from esperd.messages.policy import Alternative, Decide, Decided, Decision, Observation, PolicySettings
from esperd.policy.credit import observe
from esperd.policy.judge import judge
from esperd.policy.ranking import RankedArm, rank
from esperd.policy.state import AskedArm, BanditState, decode_state

LONGEST_ALTERNATIVES = 5
"""Alternatives named in a decision; chosen for reading."""


def decide(request: Decide) -> Decided:
    """Decide one point of one job.

    Args:
        request: observation, settings and the state of the last answer.

    Returns:
        One decision for each seed on probation, then about growing: one ``germinate``, several that are screened against each
        other, or one ``wait``.

    Raises:
        CheckpointRejected: when ``request.state`` is not a state of this strategy.
    """
    observation, settings = request.observation, request.settings
    state = observe(decode_state(request.state), observation, settings)
    verdicts = _judge_all(observation, state, settings)
    growth, asked = _grow(request, state, ended={verdict.seed for verdict in verdicts if verdict.action != "wait"})
    return Decided(decisions=(*verdicts, *growth), state=msgspec.structs.replace(state, asked=asked).encode())


def _judge_all(observation: Observation, state: BanditState, settings: PolicySettings) -> list[Decision]:
    pending = {entry.seed: entry for entry in state.pending}
    on_probation = [record for record in observation.seeds if record.stage is Stage.PROBATIONARY]
    return [judge(record, pending[record.seed], settings) for record in sorted(on_probation, key=_by_name)]


def _grow(request: Decide, state: BanditState, ended: set[str | None]) -> tuple[tuple[Decision, ...], tuple[AskedArm, ...]]:
    """Germinate the best arm, or the best few to be screened, or say why not.

    Args:
        request: the decision point.
        state: up to date with the observation.
        ended: seeds this point's verdicts end; their places count as free.
    """
    observation, settings = request.observation, request.settings
    ranked = rank(observation, state.arms, settings, request.rng_seed)
    obstacle = _obstacle(observation, settings, ended) or _nothing_available(observation, ranked)
    if obstacle:
        return (Decision(action="wait", reason=obstacle),), ()
    affordable = [found for found in ranked if found.score is not None or not 0.0 < observation.gate_loss < found.rent]
    if not affordable:
        return (_decline_price(ranked, observation),), ()
    best = affordable[0]
    if best.score is not None and best.score <= 0.0:
        return (_decline_promise(best, ranked),), ()
    chosen = [found for found in affordable if found.score is None or found.score > 0.0][: settings.nursery]
    screening = f"point {request.point}" if len(chosen) > 1 else ""
    decisions = tuple(
        Decision(
            action="germinate",
            arm=found.arm,
            score=found.score,
            reason=_promise(found, ranked),
            alternatives=_alternatives(ranked, found),
            screening=screening,
        )
        for found in chosen
    )
    return decisions, tuple(AskedArm(arm=found.arm, rent=found.rent) for found in chosen)


def _obstacle(observation: Observation, settings: PolicySettings, ended: set[str | None]) -> str:
    """Why nothing may be germinated now, whatever the arms promise; empty when it may."""
    living = [record for record in observation.seeds if record.stage in LIVE_STAGES and record.seed not in ended]
    live = {record.screening or record.seed for record in living}  # of a screening one at most goes on
    kept = [record for record in observation.seeds if record.stage is Stage.FOSSILIZED]
    # A seed judged at this point may still be kept, so it counts for the limit on kept seeds until it is gone.
    may_be_kept = len(kept) + sum(record.stage in LIVE_STAGES for record in observation.seeds)
    if observation.epoch < settings.warmup_epochs:
        return f"warming up: {observation.epoch} of {settings.warmup_epochs} epochs"
    if observation.progress >= settings.latest_germination:
        return (
            f"too late: {observation.progress:.0%} of the budget is spent, and nothing is grown after "
            f"{settings.latest_germination:.0%} (latest_germination)"
        )
    if observation.epochs_left is not None and observation.epochs_left < observation.shortest_life_epochs:
        return (
            f"too late: the budget allows {observation.epochs_left:.1f} more epochs and a seed needs "
            f"{observation.shortest_life_epochs} to show what it brings"
        )
    if len(live) >= settings.max_live_seeds:
        return f"{len(live)} seeds live already (max_live_seeds {settings.max_live_seeds})"
    if may_be_kept >= settings.max_fossilized:
        return f"{len(kept)} seeds are kept and {may_be_kept - len(kept)} may be (max_fossilized {settings.max_fossilized})"
    return ""


def _nothing_available(observation: Observation, ranked: list[RankedArm]) -> str:
    if ranked:
        return ""
    if not observation.options:
        return "no blueprint fits any slot"
    reasons = sorted({option.why_not for option in observation.options if option.why_not})
    return f"none of {len(observation.options)} arms is available: {'; '.join(reasons) or 'no reason was given'}"


def _decline_price(ranked: list[RankedArm], observation: Observation) -> Decision:
    """Every arm that could be tried costs more than the loss there is to save."""
    cheapest = min(ranked, key=lambda found: (found.rent, found.arm))
    return Decision(
        action="wait",
        arm=cheapest.arm,
        reason=(
            f"declined: its rent of {cheapest.rent:.4f} is more than the whole gate loss of {observation.gate_loss:.4f}, so no "
            f"gain could cover it; it is the cheapest of {len(ranked)} available arms"
        ),
        alternatives=_alternatives(ranked, cheapest),
    )


def _decline_promise(best: RankedArm, ranked: list[RankedArm]) -> Decision:
    """Every arm that could be tried has shown that it does not pay."""
    return Decision(
        action="wait",
        arm=best.arm,
        score=best.score,
        reason=(
            f"declined: the best available arm promises at most {best.score:.4f} after rent (mean {best.mean:.4f} over "
            f"{best.pulls} tries, rent {best.rent:.4f})"
        ),
        alternatives=_alternatives(ranked, best),
    )


def _promise(best: RankedArm, ranked: list[RankedArm]) -> str:
    price = f"{best.option.parameters} parameters, rent {best.rent:.4f}"
    if best.mean is None or best.score is None:
        unseen = sum(found.score is None for found in ranked)
        return f"never tried ({price}); {unseen} of {len(ranked)} available arms have not been tried"
    return (
        f"best of {len(ranked)} available arms: mean reward {best.mean:.4f} over {best.pulls} tries, "
        f"upper bound {best.score:.4f} ({price})"
    )


def _alternatives(ranked: list[RankedArm], chosen: RankedArm) -> tuple[Alternative, ...]:
    others = [found for found in ranked if found is not chosen][:LONGEST_ALTERNATIVES]
    return tuple(Alternative(arm=found.arm, score=found.score, pulls=found.pulls) for found in others)


def _by_name(record: SeedRecord) -> str:
    return record.seed
