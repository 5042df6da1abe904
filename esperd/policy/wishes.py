"""What a person wishes, as decisions: checked against what the last decision point knew, as far as it knew anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import msgspec

from esperd.errors import IllegalTransition, NothingToShow, UnknownName
from esperd.messages.growth import LIVE_STAGES, Stage
from esperd.messages.overruling import Overrule, Overruled
from esperd.messages.policy import Arm, Decided, Decision, Observation
from esperd.policy.overruling import proposals


def decisions_of(wish: Overrule, seen: Observation | None, answer: Decided | None) -> Overruled:
    """Say what a wish means.

    Args:
        wish: of a person.
        seen: the observation of the last decision point; None before the first one, and where it was not kept.
        answer: what was decided there; None before the first.

    Raises:
        UnknownName: when no slot, blueprint or seed is called so, or the blueprint does not fit the slot.
        IllegalTransition: when the seed does not live any more, or no decision point is left.
        NothingToShow: when there is nothing to approve, or no proposal has this number.
    """
    if seen is not None and seen.progress >= 1.0:
        raise IllegalTransition(
            f"the budget of job {wish.id} is spent: after epoch {seen.epoch} nothing is decided any more", job=wish.id
        )
    if wish.wish == "grow":
        arm = Arm(slot=wish.slot, blueprint=wish.blueprint)
        note = _about_arm(arm, seen)
        return Overruled(decisions=(Decision(action="germinate", arm=arm, reason=_said(wish), by=wish.by),), note=note)
    if wish.wish == "keep":
        stage = _require_living(wish, seen)
        return Overruled(
            decisions=(Decision(action="fossilize", seed=wish.seed, reason=_said(wish), by=wish.by),),
            note=""
            if stage is Stage.PROBATIONARY
            else f"it was {stage} when last seen, and only a probationary seed can be kept",
        )
    if wish.wish == "cull":
        _require_living(wish, seen)
        return Overruled(decisions=(Decision(action="cull", seed=wish.seed, reason=_said(wish), by=wish.by),))
    if wish.wish == "wait":
        return Overruled(decisions=(Decision(action="wait", reason=_said(wish), by=wish.by),))
    return Overruled(decisions=tuple(_approved(wish, proposal) for proposal in _chosen(wish, answer)))


def _said(wish: Overrule) -> str:
    return f"{wish.by} said: {wish.reason}" if wish.reason else f"{wish.by} said so"


def _approved(wish: Overrule, proposal: Decision) -> Decision:
    why = f" ({wish.reason})" if wish.reason else ""
    return msgspec.structs.replace(proposal, by=wish.by, reason=f"approved by {wish.by}{why}: {proposal.reason}")


def _chosen(wish: Overrule, answer: Decided | None) -> tuple[Decision, ...]:
    offered = () if answer is None else proposals(answer)
    if not offered:
        raise NothingToShow(f"nothing of job {wish.id} awaits approval; see `esper decide {wish.id}`", job=wish.id)
    if wish.number is None:
        return offered
    if wish.number > len(offered):
        raise NothingToShow(
            f"job {wish.id} has no proposal {wish.number}: there {'is 1' if len(offered) == 1 else f'are {len(offered)}'}",
            job=wish.id,
            number=wish.number,
        )
    return (offered[wish.number - 1],)


def _about_arm(arm: Arm, seen: Observation | None) -> str:
    """What may stand in the way of growing this arm; empty: nothing that is known."""
    if seen is None:
        return (
            "which slots and arms the job has is known from its first decision point on; the gates will say whether this one fits"
        )
    _require("slot", arm.slot, [record.slot for record in seen.slots])
    _require("blueprint", arm.blueprint, [option.arm.blueprint for option in seen.options])
    for option in seen.options:
        if option.arm == arm:
            return "" if option.available else f"after epoch {seen.epoch} it could not be grown: {option.why_not}"
    fitting = sorted({option.arm.blueprint for option in seen.options if option.arm.slot == arm.slot})
    raise UnknownName(
        f"blueprint {arm.blueprint!r} does not fit slot {arm.slot!r}; there fit: {', '.join(fitting) or 'none'}",
        kind="blueprints",
        name=arm.blueprint,
        available=fitting,
    )


def _require_living(wish: Overrule, seen: Observation | None) -> Stage:
    records = {} if seen is None else {record.seed: record for record in seen.seeds}
    _require("seed", wish.seed, records)
    stage = records[wish.seed].stage
    if stage not in LIVE_STAGES:
        raise IllegalTransition(
            f"seed {wish.seed} is {stage}: only a living seed can be kept or culled", seed=wish.seed, stage=str(stage)
        )
    return stage


def _require(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises: UnknownName: when nothing is called so."""
    names = list(dict.fromkeys(known))
    if name in names:
        return
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise UnknownName(
        f"the job has no {kind} {name!r}; {hint}there are: {', '.join(names) or 'none'}",
        kind=f"{kind}s",
        name=name,
        available=names,
    )
