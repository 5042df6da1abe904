"""The nursery: several candidates learn behind the host at once, and the one that promises most goes on.

Candidates of a screening are seeds in TRAINING, at one slot or at several, each taught by second passes of its own that start
from one shared pass of the host. None hears of another, and the host hears of none: a candidate ends with the weights it would
have had alone. After ``growth.screening_epochs`` the gate split is read once more with each of them switched on. The best of
them goes on in the job's own mode of incubation; the others are taken out at once, and their slots do not rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esperd.growth.network import Seed
from esperd.messages.growth import Stage


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a screening ended.

    Args:
        winner: goes on; None when no candidate is to.
        losers: with the reason why each of them is not.
    """

    winner: Seed | None
    losers: tuple[tuple[Seed, str], ...]


def screenings(seeds: Iterable[Seed]) -> dict[str, list[Seed]]:
    """Candidates by the name of their screening."""
    found: dict[str, list[Seed]] = {}
    for seed in seeds:
        if seed.screening and seed.stage is Stage.TRAINING:
            found.setdefault(seed.screening, []).append(seed)
    return found


def choose(candidates: Sequence[Seed], *, gate_loss: float, largest_rise: float) -> Choice:
    """Who goes on: the candidate whose switching on lowers the gate loss most, unless it would raise it too much.

    Args:
        candidates: measured switched on at this decision point.
        gate_loss: of the network as it is.
        largest_rise: of the gate loss, relative to its size, that switching the winner on may cause; it goes on learning.
    """
    measured = [seed for seed in candidates if seed.prospect is not None]
    ranked = sorted(measured, key=lambda seed: -_promise(seed))
    best = ranked[0] if ranked else None
    if best is None or not -_promise(best) <= largest_rise * abs(gate_loss):
        told = {seed.name: f"switched on it would change the loss by {-_promise(seed):+.4f}" for seed in measured}
        return Choice(winner=None, losers=tuple((seed, told.get(seed.name, "it was never measured")) for seed in candidates))
    return Choice(
        winner=best,
        losers=tuple((seed, _why_not(seed, best)) for seed in candidates if seed is not best),
    )


def _promise(seed: Seed) -> float:
    """What the network would gain; of a seed that is no number nothing is promised."""
    assert seed.prospect is not None  # noqa: S101 - only measured candidates are asked
    return seed.prospect.loss if seed.prospect.loss == seed.prospect.loss else float("-inf")


def _why_not(seed: Seed, best: Seed) -> str:
    if seed.prospect is None:
        return f"screened out for {best.name}: it was never measured"
    rival = f"{best.blueprint} at {best.record.slot}"
    return f"screened out for {best.name}: it promised {_promise(seed):+.4f}, {rival} {_promise(best):+.4f}"
