"""What all strategies do alike: judge the seeds on probation, then germinate, or say why not. A strategy is what ranks the arms.

Pure, torch-free and deterministic: the answer depends on the request alone.
"""

from __future__ import annotations

import msgspec

from esperd.messages.growth import Stage
from esperd.messages.policy import Decide, Decided, Decision, Observation, PolicySettings
from esperd.policy import wording
from esperd.policy.arms import RankedArm, Select, Selection, affordable, available_arms
from esperd.policy.circumstances import circumstances_of
from esperd.policy.credit import observe
from esperd.policy.judge import judge
from esperd.policy.obstacles import in_time, none_in_time, nothing_available, obstacle
from esperd.policy.starving import starving_first
from esperd.policy.state import AskedArm, BanditState, decode_state
from esperd.policy.stop_rule import worthwhile
from esperd.policy.trigger import held_back


def answer(request: Decide, select: Select) -> Decided:
    """Decide one point of one job.

    Args:
        request: observation, settings and the state of the last answer.
        select: ranks the arms that may be germinated.

    Returns:
        One decision for each seed on probation, then about growing: one ``germinate``, several that are screened against each
        other, or one ``wait``. Or nothing but what is to be measured first.

    Raises:
        CheckpointRejected: when ``request.state`` is not a state of this version.
        HandlerFailed: when the trigger of the settings was not asked before.
    """
    observation, settings = request.observation, request.settings
    state = observe(decode_state(request.state), observation, settings)
    verdicts = _judge_all(observation, state, settings)
    growth = _grow(request, state, select, ended={verdict.seed for verdict in verdicts if verdict.action != "wait"})
    if isinstance(growth, Selection):  # seeds are judged when it is known what is grown
        return Decided(
            decisions=tuple(sorted(growth.measure, key=lambda decision: (decision.action, decision.arm))), state=state.encode()
        )
    if isinstance(growth, Decision):
        return Decided(decisions=(*verdicts, growth), state=state.encode())
    asked = tuple(_ask(found, observation) for found, _ in growth)
    decisions = (*verdicts, *(decision for _, decision in growth))
    return Decided(decisions=decisions, state=msgspec.structs.replace(state, asked=asked).encode())


def _judge_all(observation: Observation, state: BanditState, settings: PolicySettings) -> list[Decision]:
    pending = {entry.seed: entry for entry in state.pending}
    on_probation = [record for record in observation.seeds if record.stage is Stage.PROBATIONARY]
    return [judge(record, pending[record.seed], settings) for record in sorted(on_probation, key=lambda record: record.seed)]


def _grow(
    request: Decide, state: BanditState, select: Select, ended: set[str | None]
) -> list[tuple[RankedArm, Decision]] | Decision | Selection:
    """Germinate the best arm, or the best few to be screened, or say why not.

    Args:
        request: the decision point.
        state: up to date with the observation.
        select: ranks the arms.
        ended: seeds this point's verdicts end; their places count as free.

    Returns:
        Arms to germinate, each with its decision; or the decision to wait; or the selection, when it has to measure first.
    """
    observation, settings = request.observation, request.settings
    available = available_arms(observation, state.arms, settings, request.evidence)
    reason = obstacle(observation, settings, ended) or nothing_available(observation, available)
    reason = reason or none_in_time(observation, available)
    if reason:
        return Decision(action="wait", reason=reason)
    available = [found for found in available if in_time(found, observation)]
    if waiting := held_back(request):
        return waiting
    selection = select(request, state, available)
    if selection.measure:
        if any(affordable(found, observation) for found in available):
            return selection
        # whatever was measured, none of them would be grown
        return wording.decline_price(sorted(available, key=lambda found: found.arm), observation.gate_loss)
    selection = starving_first(selection, state, observation, settings)
    ranked = selection.ranked
    payable = [found for found in ranked if affordable(found, observation)]
    if not payable:
        return wording.decline_price(ranked, observation.gate_loss)
    willing = [found for found in payable if found.pays]
    if not willing:
        return wording.decline_promise(payable[0], selection)
    worth = worthwhile(request, state, selection, willing)
    if isinstance(worth, Decision):
        return worth
    chosen = worth[: settings.nursery]
    screening = f"point {request.point}" if len(chosen) > 1 else ""
    return [(found, wording.germinate(found, ranked, screening)) for found in chosen]


def _ask(found: RankedArm, observation: Observation) -> AskedArm:
    option = found.option
    circumstances = circumstances_of(found.arm.slot, option.parameters, option.flops_per_sample, observation)
    return AskedArm(arm=found.arm, rent=found.rent, circumstances=circumstances)
