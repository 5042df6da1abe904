"""What tries of other jobs come to, and what a job may expect of an arm by them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esperd.messages.evidence import Precedent, TriedSeed
from esperd.messages.policy import ArmOption, Observation

HALF_LIFE_TRIES = 20
"""A try counts half when so many newer ones of its blueprint and topology are known. By number, not by time: what a daemon
learned does not fade while nothing is trained. Chosen, not measured."""

MOST_PRIOR_TRIES = 2.0
"""What other jobs know of an arm counts like so many tries of this job at most: they had other hosts and other data. Chosen, not
measured."""

THIRDS = 3


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What may be expected of an arm before this job has tried it.

    Args:
        mean: reward, in units of the job's loss.
        tries: of this job that it counts like.
        spread: standard deviation of single rewards.
        why: the evidence, in words.
    """

    mean: float
    tries: float
    spread: float
    why: str


def third_of(depth: float) -> int:
    """Third of the depth: 1 is nearest to the input.

    Args:
        depth: place of the slot, 1/n for the first of n, 1 for the last.
    """
    return min(max(math.ceil(THIRDS * depth - 1e-9), 1), THIRDS)


def gain_of(tried: TriedSeed) -> float | None:
    """What a try brought before rent, as a share of the gate loss when it began; None where that says nothing.

    Before rent, because prices are the asking job's own.
    """
    if not (tried.gate_loss > 0.0 and math.isfinite(tried.gate_loss)):
        return None
    if tried.outcome != "fossilized":
        return 0.0
    if tried.contribution is None or not math.isfinite(tried.contribution.loss):
        return None
    return tried.contribution.loss / tried.gate_loss


def weights_of(tried: int) -> list[float]:
    """Weight of each of so many tries, oldest first; the newest weighs 1."""
    return [0.5 ** ((tried - 1 - place) / HALF_LIFE_TRIES) for place in range(tried)]


def precedents_of(tried: Iterable[TriedSeed]) -> tuple[Precedent, ...]:
    """Sum up tries by blueprint and topology, as a whole and by third of the depth.

    Args:
        tried: oldest first. A try's age is the number of newer ones of its blueprint and topology, wherever their slot stood.

    Returns:
        Sorted; equal tries give equal precedents.
    """
    groups: dict[tuple[str, str], list[tuple[int | None, float, bool]]] = {}
    for one in tried:
        gain = gain_of(one)
        if gain is None or one.topology is None:
            continue
        third = None if one.depth is None else third_of(one.depth)
        groups.setdefault((one.blueprint, one.topology), []).append((third, gain, one.outcome == "fossilized"))
    found: list[Precedent] = []
    for (blueprint, topology), known in sorted(groups.items()):
        weighed = [(third, weight, gain, kept) for weight, (third, gain, kept) in zip(weights_of(len(known)), known, strict=True)]
        for third in (None, *range(1, THIRDS + 1)):
            part = [(weight, gain, kept) for place, weight, gain, kept in weighed if third is None or place == third]
            if part:
                found.append(_precedent(blueprint, topology, third, part))
    return tuple(found)


def _precedent(blueprint: str, topology: str, third: int | None, part: Sequence[tuple[float, float, bool]]) -> Precedent:
    weight = math.fsum(weight for weight, _, _ in part)
    mean = math.fsum(weight * gain for weight, gain, _ in part) / weight
    return Precedent(
        blueprint=blueprint,
        topology=topology,
        third=third,
        weight=weight,
        gain=mean,
        spread=math.sqrt(math.fsum(weight * (gain - mean) ** 2 for weight, gain, _ in part) / weight),
        kept=math.fsum(weight for weight, _, kept in part if kept) / weight,
    )


def prior_of(option: ArmOption, price: float, observation: Observation, evidence: Sequence[Precedent]) -> Prior | None:
    """What other jobs lead this one to expect of an arm.

    The gain is that of the arm's third of the depth, drawn towards that of all depths as if the latter were
    :data:`MOST_PRIOR_TRIES` more tries there.

    Args:
        option: the arm.
        price: its rent.
        observation: names the slots in the order of the host, and the gate loss that there is to save.
        evidence: of other jobs.

    Returns:
        None when there is none on its blueprint at slots of that topology, or no gate loss above 0 to have a share of.
    """
    places = [record.slot for record in observation.slots]
    if not evidence or option.arm.slot not in places or not observation.gate_loss > 0.0:
        return None
    place = places.index(option.arm.slot)
    kind = (option.arm.blueprint, observation.slots[place].topology)
    known = {entry.third: entry for entry in evidence if (entry.blueprint, entry.topology) == kind}
    if None not in known:
        return None
    overall, gain = known[None], known[None].gain
    near = known.get(third_of((place + 1) / len(places)))
    if near is not None:
        gain = (near.weight * near.gain + MOST_PRIOR_TRIES * gain) / (near.weight + MOST_PRIOR_TRIES)
    mean, tries = gain * observation.gate_loss - price, min(overall.weight, MOST_PRIOR_TRIES)
    return Prior(
        mean=mean,
        tries=tries,
        spread=overall.spread * observation.gate_loss,
        why=(
            f"{overall.weight:.1f} tries of other jobs, {overall.kept:.0%} of them kept, lead to expect {mean:.4f} and count as "
            f"{tries:.1f}"
        ),
    )
