"""What strategies make of other jobs' experience, and the least that is explored whatever they make of it."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from statistics import fmean

import msgspec
import pytest
from bandit_world import ARMS, DECIDE, learned, play, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_requests import BLUEPRINTS, contribution, observation, observations, option, policies, request, seed

from esperd.messages.evidence import Precedent
from esperd.messages.growth import Stage
from esperd.messages.policy import PolicySettings
from esperd.policy.rent import rent
from esperd.policy.state import decode_state

LEARNING = ("ucb", "discounted_ucb", "thompson", "epsilon_greedy", "softmax", "contextual")
DECLINING = ("ucb", "discounted_ucb", "thompson", "epsilon_greedy", "softmax")
UNTAUGHT = ("first_arm", "uniform", "round_robin", "never")

every = pytest.mark.parametrize("name", DECIDE)
learning = pytest.mark.parametrize("name", LEARNING)
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ALL = tuple(option(arm.slot, arm.blueprint) for arm in ARMS)
PRICE = rent(100, 1000.0, observation(), PolicySettings())


def precedent(gain, blueprint, *, topology="cnn", third=None, weight=5.0, spread=0.01):
    return Precedent(
        blueprint=blueprint, topology=topology, third=third, weight=weight, gain=gain, spread=spread, kept=float(gain > 0.0)
    )


def growth(name, seen, evidence=(), **fields):
    return DECIDE[name](request(seen, evidence=evidence, **fields)).decisions[-1]


# --- what is not known changes nothing -----------------------------------------------------------------------------------


@every
@some
@given(st.lists(observations, min_size=1, max_size=4), policies)
def test_evidence_that_speaks_of_no_arm_changes_no_byte(name, history, policy):
    """Above all: none at all is what it always was."""
    elsewhere = (precedent(0.5, "conv", topology="transformer"), precedent(-0.5, "unknown"))
    states = [b"", b""]
    for point, seen in enumerate(history):
        answers = [
            DECIDE[name](request(seen, policy=policy, state=state, point=point, evidence=evidence))
            for state, evidence in zip(states, ((), elsewhere), strict=True)
        ]
        assert answers[0] == answers[1]
        states = [answer.state for answer in answers]


@pytest.mark.parametrize("name", UNTAUGHT)
def test_a_strategy_that_learns_nothing_learns_nothing_from_others(name):
    chosen = [growth(name, observation(options=ALL), evidence) for evidence in ((), (precedent(0.5, "wide"),))]
    assert chosen[0].arm == chosen[1].arm


@pytest.mark.parametrize("name", LEARNING)
@some
@given(st.lists(observations, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_neither_the_order_of_options_nor_that_of_precedents_has_an_influence(name, history, shuffler):
    evidence = [precedent(0.02 * place, blueprint, weight=0.3 + place) for place, blueprint in enumerate(BLUEPRINTS[:3])]
    states = [b"", b""]
    for point, seen in enumerate(history):
        shuffled, others = list(seen.options), list(evidence)
        shuffler.shuffle(shuffled)
        shuffler.shuffle(others)
        other = msgspec.structs.replace(seen, options=tuple(shuffled))
        answers = [
            DECIDE[name](request(told, state=state, point=point, evidence=tuple(given)))
            for told, state, given in ((seen, states[0], evidence), (other, states[1], others))
        ]
        assert answers[0] == answers[1]
        states = [answer.state for answer in answers]


# --- what is known ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ucb", "discounted_ucb", "thompson", "contextual"])
def test_of_arms_never_tried_here_the_one_that_others_did_best_with_comes_first(name):
    known = tuple(precedent(gain, blueprint) for gain, blueprint in zip((0.01, 0.02, 0.03, 0.2), BLUEPRINTS, strict=True))
    for rng_seed in range(5):
        wanted = growth(name, observation(options=ALL), known, rng_seed=rng_seed, policy=PolicySettings(exploration=0.1))
        assert wanted.arm.blueprint == "wide"
        assert "tries of other jobs" in wanted.reason


@learning
def test_an_arm_of_which_nothing_is_known_is_not_passed_over_for_ever(name):
    known = tuple(precedent(0.05, blueprint) for blueprint in BLUEPRINTS if blueprint != "gate")
    tried = {
        growth(name, observation(options=ALL), known, rng_seed=rng_seed, point=rng_seed).arm.blueprint for rng_seed in range(30)
    }
    assert "gate" in tried
    if name != "contextual":
        assert tried == {"gate"}


@pytest.mark.parametrize("name", DECLINING)
def test_what_brought_nothing_in_other_jobs_is_declined_by_name_as_what_brought_nothing_here(name):
    known = tuple(precedent(0.0, blueprint, spread=0.0) for blueprint in BLUEPRINTS)
    declined = growth(name, observation(options=ALL), known, policy=PolicySettings(exploration=0.0))

    assert (declined.action, declined.arm in ARMS) == ("wait", True)
    assert "0% of them kept" in declined.reason


@pytest.mark.parametrize("name", ["ucb", "thompson"])
def test_tries_of_this_job_soon_outweigh_those_of_others(name):
    praised, known, state = option("s1", "conv"), (precedent(0.1, "conv"), precedent(0.03, "gate")), b""
    for number in range(6):
        lost = seed(f"s1#{number}", stage=Stage.CULLED)
        state = DECIDE[name](request(observation(seeds=(lost,), options=()), state=state, evidence=known)).state
    wanted = growth(
        name,
        observation(options=(praised, option("s1", "gate"))),
        known,
        state=state,
        policy=PolicySettings(exploration=0.0),
    )
    assert wanted.arm.blueprint == "gate"


@learning
def test_the_tries_that_are_shown_are_those_of_this_job(name):
    known = tuple(precedent(0.05, blueprint) for blueprint in BLUEPRINTS)
    assert all(other.pulls == 0 for other in growth(name, observation(options=ALL), known).alternatives)


def test_evidence_does_not_make_up_for_a_price_that_no_gain_could_cover():
    wanted = growth("ucb", observation(gate_loss=0.001), (precedent(0.9, "conv"),))
    assert (wanted.action, "more than the whole gate loss" in wanted.reason) == ("wait", True)


# --- what it is worth ------------------------------------------------------------------------------------------------------

FAMILIES = range(10)


@cache
def regret(name, *, told, points=20, misled=False):
    """Mean over families of worlds in which a blueprint brings alike: a fourth job, told or not of three that went before."""
    found = []
    for family in FAMILIES:
        earlier = [1000 + 10 * family + job for job in range(3)]
        learned_in = family + 500 if misled else family
        evidence = learned("ucb", jobs=earlier, family=learned_in, points=20) if told else ()
        found.append(run(name, rng_seed=family, family=family, points=points, evidence=evidence).regret)
    return fmean(found)


@pytest.mark.parametrize(
    ("name", "share"),
    [("ucb", 0.4), ("discounted_ucb", 0.5), ("thompson", 0.5), ("epsilon_greedy", 0.6), ("softmax", 0.8), ("contextual", 0.7)],
)
def test_told_of_three_earlier_jobs_a_short_job_regrets_less(name, share):
    assert regret(name, told=True) < share * regret(name, told=False)


@pytest.mark.parametrize("name", ["ucb", "contextual"])
def test_misled_by_jobs_of_another_kind_a_job_finds_out_by_itself(name):
    assert regret(name, told=True, misled=True) < 1.3 * regret(name, told=False)


# --- the least that is explored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", ["first_arm", "gradient_merit", "ucb", "contextual", "softmax"])
def test_with_min_share_every_arm_has_its_part_of_the_tries_when_it_is_due(name, share):
    policy = PolicySettings(min_share=share, exploration=0.0)
    grown = [wanted.arm for _, wanted, _ in play(name, rng_seed=3, points=90, policy=policy) if wanted.action == "germinate"]
    assert len(grown) > 80
    for tries in range(len(grown) + 1):
        due = math.floor(share * tries / len(ARMS) + 1e-9)
        assert min(Counter(dict.fromkeys(ARMS, 0) | Counter(grown[:tries])).values()) >= due, (tries, due)


@pytest.mark.parametrize("nursery", [3, 5, 8])
def test_with_min_share_every_arm_has_its_part_where_several_are_tried_at_once(nursery):
    """What is due between two points is there at the first of them."""
    policy, state, tried = PolicySettings(min_share=0.5, nursery=nursery, max_fossilized=99), b"", Counter(dict.fromkeys(ARMS, 0))
    lost = ()
    for point in range(40):
        answer = DECIDE["first_arm"](request(observation(options=ALL, seeds=lost), policy=policy, state=state, point=point))
        state = answer.state
        germinated = [decision.arm for decision in answer.decisions if decision.action == "germinate"]
        tried.update(germinated)
        lost = tuple(
            seed(f"{arm.slot}#{point}-{number}", stage=Stage.CULLED, blueprint=arm.blueprint)
            for number, arm in enumerate(germinated)
        )
        assert min(tried.values()) >= math.floor(0.5 * tried.total() / len(ARMS) + 1e-9), (point, tried)


@pytest.mark.parametrize("name", ["first_arm", "ucb"])
def test_until_tries_are_needed_for_what_is_due_the_strategy_has_its_way(name):
    policy = PolicySettings(min_share=0.5, exploration=0.0)
    reasons = [wanted.reason for _, wanted, _ in play(name, rng_seed=3, points=24, policy=policy)]
    assert not any("min_share" in reason for reason in reasons[: len(ARMS)])


def test_the_arm_that_is_due_says_so_and_is_tried_although_the_strategy_declines_it():
    state = b""
    for number, arm in enumerate([ARMS[0]] * 2 + list(ARMS[2:]) + list(ARMS[2:])):
        lost = seed(f"{arm.slot}#{number}", stage=Stage.CULLED, blueprint=arm.blueprint)
        state = DECIDE["ucb"](request(observation(seeds=(lost,), options=()), state=state)).state
    assert sum(entry.pulls for entry in decode_state(state).arms) == 22
    bad = (precedent(0.0, ARMS[1].blueprint, spread=0.0),)
    never, due = (
        growth("ucb", observation(options=ALL), bad, state=state, policy=PolicySettings(min_share=share, exploration=0.0))
        for share in (0.0, 0.6)
    )

    assert never.action == "wait"
    assert (due.action, due.arm) == ("germinate", ARMS[1])
    assert "due by min_share 0.6: 0 of the 1 tries that it is guaranteed within 20 in all" in due.reason


def test_a_price_that_no_gain_could_cover_is_not_paid_for_the_sake_of_exploration():
    state = DECIDE["ucb"](request(observation(seeds=(seed("s2#1", stage=Stage.CULLED),), options=()))).state
    seen = observation(gate_loss=0.001, options=(option("s1"),))
    assert growth("ucb", seen, state=state, policy=PolicySettings(min_share=1.0)).action == "wait"
    tried = msgspec.structs.replace(seen, options=(option("s2"),))  # when the loss was higher
    assert "more than the whole gate loss" in growth("ucb", tried, state=state, policy=PolicySettings(min_share=1.0)).reason


@every
@some
@given(st.lists(observations, min_size=1, max_size=4))
def test_min_share_of_nothing_is_no_exploration_at_all(name, history):
    """The default; and with it, the answers are those of the strategy alone."""
    for point, seen in enumerate(history):
        reasons = [decision.reason for decision in DECIDE[name](request(seen, point=point)).decisions]
        assert not any("min_share" in reason for reason in reasons)


def test_a_precedent_speaks_of_the_contribution_before_rent():
    costly = observation(options=(option(parameters=900, flops=9000.0), option("s1", "gate")))
    wanted = growth("ucb", costly, (precedent(0.03, "conv"), precedent(0.03, "gate")), policy=PolicySettings(exploration=0.0))
    assert wanted.arm.blueprint == "gate"
    assert contribution(0.03).loss > PRICE
