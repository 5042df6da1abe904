"""Ways to choose where, when and what to grow. Declarations only: the code is in :mod:`esperd.policy`."""

from __future__ import annotations

from collections.abc import Iterable

from esperd.declarations import Strategy
from esperd.hookspecs import hookimpl

STRATEGIES = (
    Strategy(
        name="ucb",
        decide="esperd.policy.ucb:decide",
        description="UCB1 over slot x blueprint, rewarded by contribution minus rent; declines what does not pay",
    ),
    Strategy(
        name="discounted_ucb",
        decide="esperd.policy.discounted_ucb:decide",
        description="UCB whose evidence fades, for rewards that drift",
    ),
    Strategy(
        name="thompson",
        decide="esperd.policy.thompson:decide",
        description="draws each arm's mean reward from what is believed about it; the highest draw wins",
    ),
    Strategy(
        name="epsilon_greedy",
        decide="esperd.policy.epsilon_greedy:decide",
        description="the best mean, or any arm with a probability that falls as evidence gathers",
    ),
    Strategy(
        name="softmax",
        decide="esperd.policy.softmax:decide",
        description="draws an arm the more often the better it did",
    ),
    Strategy(
        name="contextual",
        decide="esperd.policy.contextual:decide",
        description="LinUCB over depth, width, price, blueprint and progress: what one arm earned tells about others like it",
    ),
    Strategy(
        name="gradient_merit",
        decide="esperd.policy.gradient_merit:decide",
        description="grows where the gradient of a newborn seed is largest; measured before anything is grown",
    ),
    Strategy(
        name="merit_per_parameter",
        decide="esperd.policy.gradient_merit:decide_per_parameter",
        description="the same for the parameters that a seed takes: where the mean square of its gradient is largest",
    ),
    Strategy(
        name="successive_halving",
        decide="esperd.policy.successive_halving:decide",
        description="arms compete with each other and with growing nothing, at equal FLOPs, before one is grown",
    ),
    Strategy(
        name="first_arm",
        decide="esperd.policy.unlearned:first_arm",
        description="always the first available arm, as drawn by the RNG seed; the baseline that must lose",
    ),
    Strategy(
        name="uniform",
        decide="esperd.policy.unlearned:uniform",
        description="any available arm by lot; for comparisons",
    ),
    Strategy(
        name="round_robin",
        decide="esperd.policy.unlearned:round_robin",
        description="every available arm in turn; for comparisons",
    ),
    Strategy(name="never", decide="esperd.policy.never:decide", description="grows nothing; for comparisons"),
)


@hookimpl
def esperd_strategies() -> Iterable[Strategy]:
    """Bandits, baselines, and the strategy that never grows anything."""
    return STRATEGIES
