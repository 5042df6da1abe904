"""Ways to choose where, when and what to grow. Declarations only: the code is in :mod:`esperd.policy`."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Strategy
from esperd.hookspecs import hookimpl


@hookimpl
def esperd_strategies() -> Iterable[Strategy]:
    """The bandit, and the strategy that never grows anything."""
    return (
        Strategy(
            name="ucb",
            decide="esperd.policy.ucb:decide",
            description="UCB1 over slot x blueprint, rewarded by contribution minus rent; declines what does not pay",
        ),
        Strategy(name="never", decide="esperd.policy.never:decide", description="grows nothing; for comparisons"),
    )
