"""A bench for bandits: a small world of arms with known worth, in which a seed ends one decision point after it germinated."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec
from policy_requests import BLUEPRINTS, SLOTS, contribution, observation, option, request, scouted, seed

from esperd.builtins.strategies import STRATEGIES
from esperd.declarations import resolve
from esperd.messages.growth import Stage
from esperd.messages.policy import Arm, PolicySettings
from esperd.policy.precedents import precedents_of
from esperd.policy.rent import rent
from esperd.policy.tracking import Book, follow

DECIDE = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}
ARMS = tuple(Arm(slot=record.slot, blueprint=blueprint) for record in SLOTS for blueprint in BLUEPRINTS)
PRICE = rent(100, 1000.0, observation(), PolicySettings())
"""Of every arm: they differ in worth alone."""


@dataclass(frozen=True)
class Ran:
    """One job of the bench: loss not saved for want of the best arm, after rent; and tries by arm."""

    regret: float
    pulls: dict[Arm, int]


def worths(rng_seed, *, alike=True, family=None):
    """Expected contribution of each arm.

    Args:
        rng_seed: of the world.
        alike: arms that share a slot or a blueprint are alike: each brings its part, the two together a little more. False: no
            arm says anything about another.
        family: worlds of one family share what each blueprint brings; None: this one is of no family.
    """
    rng = random.Random(f"worth {rng_seed}")
    if not alike:
        return {arm: rng.uniform(0.0, 0.1) for arm in ARMS}
    by_slot = {record.slot: rng.uniform(0.0, 0.03) for record in SLOTS}
    shared = rng if family is None else random.Random(f"family {family}")
    by_blueprint = {blueprint: shared.uniform(0.0, 0.06) for blueprint in BLUEPRINTS}
    return {arm: by_slot[arm.slot] + by_blueprint[arm.blueprint] + rng.uniform(0.0, 0.02) for arm in ARMS}


def run(name, **world):
    """Let a strategy decide a job; see :func:`play`."""
    regret, pulls = 0.0, dict.fromkeys(ARMS, 0)
    for worth, wanted, _ in play(name, **world):
        regret += max(worth.values()) - PRICE
        if wanted.action == "germinate":
            pulls[wanted.arm] += 1
            regret -= worth[wanted.arm] - PRICE
    return Ran(regret=regret, pulls=pulls)


def answers(name, **world):
    """Every answer of a job, as it is sent."""
    return [msgspec.msgpack.encode(answer, order="deterministic") for _, _, answer in play(name, **world)]


def learned(name, *, jobs, family, **world):
    """What earlier jobs of a family come to.

    Args:
        name: of the strategy that decided them.
        jobs: RNG seeds, one a job.
        family: of their worlds.
        world: as for :func:`play`.
    """
    tries = []
    for rng_seed in jobs:
        for _ in play(name, rng_seed=rng_seed, family=family, tries=tries, **world):
            pass
    return precedents_of(tries)


def play(
    name,
    *,
    rng_seed,
    points=120,
    noise=0.01,
    alike=True,
    turn=None,
    policy=None,
    family=None,
    evidence=(),
    tries=None,
):
    """Decision points of a job: worth by arm, the decision about growing, the whole answer.

    Args:
        name: of the strategy.
        rng_seed: draws worth and noise of the world, and the strategy's lots.
        points: how many.
        noise: standard deviation of a measured contribution.
        alike: whether arms that share a slot or a blueprint are alike.
        turn: the point from which on the best arm is the worst and so on; None: worth does not drift.
        policy: settings.
        family: as for :func:`worths`.
        evidence: of earlier jobs.
        tries: takes what became of every try.
    """
    rng, before, book = random.Random(f"noise {rng_seed}"), worths(rng_seed, alike=alike, family=family), Book()
    ordered = sorted(before, key=lambda arm: before[arm])
    drifted = {arm: before[other] for arm, other in zip(ordered, reversed(ordered), strict=True)}
    options = [option(arm.slot, arm.blueprint) for arm in ARMS]
    state, ended, kept = b"", (), ()
    for point in range(1, points + 1):
        worth = before if turn is None or point < turn else drifted
        rng.shuffle(options)
        told = observation(options=tuple(options), seeds=ended, progress=0.5 * point / points)
        asked = request(told, policy=policy, state=state, point=point, rng_seed=rng_seed, evidence=evidence)
        answer = scouted(DECIDE[name], asked, lambda arm, worth=worth: worth[arm])
        if tries is not None:
            kept += ended  # a seed that was kept stays in the network
            page = msgspec.structs.replace(asked, observation=msgspec.structs.replace(told, seeds=kept))
            book, ended_now = follow(book, page, answer, at=0.0)
            tries.extend(ended_now)
        state, ended, wanted = answer.state, (), answer.decisions[-1]
        shown = rng.gauss(0.0, noise)  # drawn at every point: all strategies meet the same luck
        if wanted.action == "germinate":
            measured = contribution(worth[wanted.arm] + shown)
            grown = f"{wanted.arm.slot}#{point}"
            ended = (seed(grown, stage=Stage.FOSSILIZED, blueprint=wanted.arm.blueprint, measured=measured),)
        yield worth, wanted, answer
