"""A person's word goes before the strategy's: what was said for a point replaces what the strategy decided about the same thing.

Pure: the answer of a point depends on its request and on what was said for it, so that it can be computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from esperd.errors import CheckpointRejected
from esperd.messages.policy import Arm, Decided, Decision
from esperd.policy.state import decode_state

AWAITS = "awaits approval: "
"""What the reason of every proposal begins with."""

LEAVES_THE_STRUCTURE = frozenset({"wait", "trial", "gauge", "try"})
"""Actions that measure or do nothing. Whatever else is decided, a plugin's operation included, needs approval where it is asked
for."""


MEASURES = frozenset({"gauge", "try"})
"""Actions after which the policy is asked again, at the same epoch."""


def measures(answer: Decided) -> bool:
    """Whether an answer only measures: the decisions of its epoch are those of a later point."""
    return any(made.action in MEASURES for made in answer.decisions)


def withhold(answer: Decided) -> Decided:
    """Turn what would change the structure into proposals: waits that say what they await approval for.

    The strategy must not take a germination that was never carried out for one that was refused: it is forgotten that it
    was asked for.
    """
    return _settled(
        tuple(_proposed(made) if made.action not in LEAVES_THE_STRUCTURE else made for made in answer.decisions), answer
    )


def proposals(answer: Decided) -> tuple[Decision, ...]:
    """What awaits approval, each as it would be decided."""
    return tuple(
        msgspec.structs.replace(made, action=made.proposes, proposes="", reason=made.reason.removeprefix(AWAITS))
        for made in answer.decisions
        if made.proposes
    )


def overrule(answer: Decided, said: Sequence[Sequence[Decision]]) -> Decided:
    """Let people's words take the place of the strategy's.

    Who speaks of growing (grow, wait, an approved germination) replaces every germination of the strategy, and its wait; who
    speaks of a seed replaces what the strategy decided on that seed. All else stays as the strategy decided.

    Args:
        answer: of the strategy; its germinations may be proposals.
        said: what people said for this point, oldest first. What was said later about the same slot or seed replaces what was
            said before; ``wait`` replaces every wish to grow, and the other way round.
    """
    if not said:
        return answer
    seeds, growth, others = _last_words(said)
    kept = [made for made in answer.decisions if made.seed not in seeds and not (growth and _speaks_of_growing(made))]
    return _settled((*kept, *seeds.values(), *others, *_screened_together(growth)), answer)


def _last_words(said: Sequence[Sequence[Decision]]) -> tuple[dict[str, Decision], list[Decision], list[Decision]]:
    """What counts of all that was said: by seed, about growing, and of operations that are neither."""
    seeds: dict[str, Decision] = {}
    growth: list[Decision] = []
    others: list[Decision] = []
    for words in said:
        seeds.update({word.seed: word for word in words if word.seed is not None})
        about_growing = [word for word in words if word.seed is None and _speaks_of_growing(word)]
        others += [word for word in words if word.seed is None and not _speaks_of_growing(word)]
        if any(word.action == "wait" for word in about_growing):
            growth = about_growing
        elif about_growing:
            slots = {_slot(word) for word in about_growing}
            growth = [word for word in growth if word.action != "wait" and _slot(word) not in slots] + about_growing
    return seeds, growth, others


def _slot(word: Decision) -> str | None:
    return None if word.arm is None else word.arm.slot


def _screened_together(growth: Sequence[Decision]) -> list[Decision]:
    """A screening of one compares nothing: a candidate that was approved alone is grown as any other arm."""
    names = [word.screening for word in growth]
    return [msgspec.structs.replace(word, screening="") if names.count(word.screening) == 1 else word for word in growth]


def _speaks_of_growing(made: Decision) -> bool:
    return "germinate" in (made.action, made.proposes) or (made.action == "wait" and made.seed is None and not made.proposes)


def _proposed(made: Decision) -> Decision:
    return msgspec.structs.replace(made, action="wait", proposes=made.action, reason=f"{AWAITS}{made.reason}")


def _settled(decisions: tuple[Decision, ...], answer: Decided) -> Decided:
    """The answer with other decisions. Its state does not remember having asked for germinations that are not among them."""
    asked = {made.arm for made in answer.decisions if made.action == "germinate" and made.arm is not None}
    left = {made.arm for made in decisions if made.action == "germinate" and not made.by}
    return msgspec.structs.replace(answer, decisions=decisions, state=_without_asked(answer.state, asked - left))


def _without_asked(state: bytes, arms: Collection[Arm]) -> bytes:
    """A strategy's state in which these arms were not asked for. What is not exactly one of our own states belongs to a plugin's
    strategy and stays as it is: that strategy sees in the next observation what was grown.
    """
    if not arms:
        return state
    try:
        known = decode_state(state)
    except CheckpointRejected:
        return state
    if known.encode() != state:
        return state
    return msgspec.structs.replace(known, asked=tuple(entry for entry in known.asked if entry.arm not in arms)).encode()
