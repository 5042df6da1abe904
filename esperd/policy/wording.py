"""Decisions about growing in words and numbers: what was chosen or declined, why, and what else there was."""

from __future__ import annotations

from collections.abc import Sequence

from esperd.messages.policy import Alternative, Decision
from esperd.policy.arms import RankedArm, Selection


def germinate(found: RankedArm, ranked: Sequence[RankedArm], screening: str) -> Decision:
    """Grow this arm.

    Args:
        found: the arm.
        ranked: all available arms.
        screening: name of the screening that it is a candidate of; empty: of none.
    """
    price = f"{found.option.parameters} parameters, rent {found.rent:.4f}"
    if found.why:
        reason = f"{found.why} ({price})"
    else:
        unseen = sum(other.pulls == 0 for other in ranked)
        reason = f"never tried ({price}); {unseen} of {len(ranked)} available arms have not been tried"
    return Decision(
        action="germinate",
        arm=found.arm,
        score=found.score,
        reason=reason,
        alternatives=alternatives(ranked, found),
        screening=screening,
    )


def gauge(found: RankedArm, batches: int) -> Decision:
    """Measure the gradient merit of an arm."""
    reason = f"its gradient merit is not known ({found.option.parameters} parameters, rent {found.rent:.4f})"
    return Decision(action="gauge", arm=found.arm, batches=batches, reason=reason)


def compete(found: RankedArm, epochs: float, contenders: int) -> Decision:
    """Let an arm compete with others and with growing nothing."""
    reason = f"one of {contenders} contenders at equal FLOPs, worth {epochs:.2g} epochs each (rent {found.rent:.4f})"
    return Decision(action="try", arm=found.arm, epochs=epochs, reason=reason)


def decline_price(ranked: Sequence[RankedArm], gate_loss: float) -> Decision:
    """Every arm that could be tried costs more than the loss there is to save."""
    cheapest = min(ranked, key=lambda found: (found.rent, found.arm))
    return Decision(
        action="wait",
        arm=cheapest.arm,
        reason=(
            f"declined: its rent of {cheapest.rent:.4f} is more than the whole gate loss of {gate_loss:.4f}, so no "
            f"gain could cover it; it is the cheapest of {len(ranked)} available arms"
        ),
        alternatives=alternatives(ranked, cheapest),
    )


def decline_promise(best: RankedArm, selection: Selection) -> Decision:
    """Every arm that could be tried has shown that it does not pay."""
    if best.score is None:
        reason = f"declined: no available arm is worth a try; the first of {len(selection.ranked)} {best.why}"
        return Decision(action="wait", arm=best.arm, reason=reason, alternatives=alternatives(selection.ranked, best))
    return Decision(
        action="wait",
        arm=best.arm,
        score=best.score,
        reason=(
            f"declined: the best available arm {selection.promise} {best.score:.4f} after rent "
            f"({record(best)}, rent {best.rent:.4f})"
        ),
        alternatives=alternatives(selection.ranked, best),
    )


def alternatives(ranked: Sequence[RankedArm], chosen: RankedArm) -> tuple[Alternative, ...]:
    """Every other arm that could have been grown, with its tries: an arm that starves is seen."""
    return tuple(Alternative(arm=found.arm, score=found.score, pulls=found.pulls) for found in ranked if found is not chosen)


def record(found: RankedArm) -> str:
    """What is known about an arm."""
    return "never tried" if found.expected is None else f"mean {found.expected:.4f} over {found.known}"
