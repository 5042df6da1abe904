"""The bandit: what it keeps, culls, tries and declines, and that nothing but the request decides it."""

from __future__ import annotations

import random

import msgspec
import policy_requests
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esperd.errors import CheckpointRejected
from esperd.messages.growth import Contribution, SeedRecord, Stage
from esperd.messages.policy import Arm, ArmOption, Decide, PolicySettings
from esperd.policy import never, ucb
from esperd.policy.rent import rent
from esperd.policy.state import ArmStatistics, BanditState, decode_state


def arm(slot="s1", blueprint="conv"):
    return Arm(slot=slot, blueprint=blueprint)


def option(slot="s1", blueprint="conv", *, parameters=100, flops=1000.0, available=True, why_not=""):
    return ArmOption(
        arm=arm(slot, blueprint), parameters=parameters, flops_per_sample=flops, available=available, why_not=why_not
    )


def contribution(loss, half_width=0.001, epoch=5):
    return Contribution(loss=loss, lower=loss - half_width, upper=loss + half_width, confidence=0.95, samples=360, epoch=epoch)


def seed(name="s1#1", *, stage=Stage.PROBATIONARY, blueprint="conv", parameters=100, flops=1000.0, measured=None):
    return SeedRecord(
        seed=name,
        slot=name.partition("#")[0],
        blueprint=blueprint,
        stage=stage,
        alpha=1.0,
        parameters=parameters,
        flops_per_sample=flops,
        germinated_epoch=1,
        epochs_in_stage=1,
        contribution=measured,
    )


def observation(**fields):
    return policy_requests.observation(**{"slots": (), "options": (option(),), **fields})


def ask(seen, *, policy=None, state=b"", point=3, rng_seed=0):
    data = state.encode() if isinstance(state, BanditState) else state
    request = Decide(job="j", point=point, rng_seed=rng_seed, settings=policy or PolicySettings(), observation=seen, state=data)
    return ucb.decide(request)


def growth_of(answer):
    return answer.decisions[-1]


def statistics(entry, *rewards):
    return ArmStatistics(arm=entry, pulls=len(rewards), total=sum(rewards), squares=sum(r * r for r in rewards))


RENT = rent(100, 1000.0, observation(), PolicySettings())
"""Of the seeds above: a tenth of parameters and of FLOPs, at 0.02 each."""


def test_rent_is_charged_for_parameters_and_flops_relative_to_the_host():
    assert pytest.approx(0.02 * 0.1 + 0.02 * 0.1) == RENT
    assert rent(1, 1.0, observation(host_parameters=0, host_flops_per_sample=0.0), PolicySettings()) == pytest.approx(0.04)


# --- seeds on probation ------------------------------------------------------------------------------------------------


def test_a_seed_whose_whole_interval_pays_its_rent_is_fossilized_with_the_numbers():
    verdict = ask(observation(seeds=(seed(measured=contribution(0.05)),))).decisions[0]

    assert (verdict.action, verdict.seed) == ("fossilize", "s1#1")
    assert "[+0.0490, +0.0510]" in verdict.reason
    assert f"{RENT:.4f}" in verdict.reason


def test_a_seed_that_helps_less_than_its_rent_is_culled():
    assert ask(observation(seeds=(seed(measured=contribution(RENT / 2, RENT / 4)),))).decisions[0].action == "cull"


def test_an_undecided_seed_is_measured_again_until_patience_ends():
    state, actions = b"", []
    for epoch in (5, 6):
        answer = ask(observation(epoch=epoch, seeds=(seed(measured=contribution(RENT, 0.01, epoch)),)), state=state)
        state = answer.state
        actions.append(answer.decisions[0].action)

    assert actions == ["wait", "cull"]


def test_the_same_measurement_is_counted_once():
    state = b""
    for _ in range(5):
        answer = ask(observation(seeds=(seed(measured=contribution(RENT, 0.01, epoch=5)),)), state=state)
        state = answer.state

    assert answer.decisions[0].action == "wait"
    assert decode_state(state).pending[0].measurements == 1


def test_a_seed_without_a_measurement_waits():
    assert ask(observation(seeds=(seed(),))).decisions[0].action == "wait"


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.SHADOWING, Stage.FOSSILIZED])
def test_only_probation_is_judged(stage):
    answer = ask(observation(seeds=(seed(stage=stage, measured=contribution(-1.0)),)))

    assert all(decision.seed is None for decision in answer.decisions)


# --- declining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 1}, "warming up: 1 of 2 epochs"),
        ({"epochs_left": 8.0}, "too late"),
        ({"seeds": (seed("a#1", stage=Stage.TRAINING), seed("b#2", stage=Stage.BLENDING))}, "2 seeds live already"),
        ({"seeds": tuple(seed(f"a#{n}", stage=Stage.FOSSILIZED) for n in range(8))}, "8 seeds are kept"),
        ({"options": ()}, "no blueprint fits"),
        ({"options": (option(available=False, why_not="slot taken"),)}, "slot taken"),
    ],
)
def test_it_waits_and_says_why(fields, message):
    decision = growth_of(ask(observation(**fields)))

    assert (decision.action, decision.arm) == ("wait", None)
    assert message in decision.reason


def test_without_a_bound_on_epochs_it_is_never_too_late():
    assert growth_of(ask(observation(epochs_left=None))).action == "germinate"


def test_an_arm_that_costs_more_than_there_is_to_save_is_declined_by_name():
    decision = growth_of(ask(observation(gate_loss=0.001)))

    assert (decision.action, decision.arm) == ("wait", arm())
    assert "more than the whole gate loss" in decision.reason


def test_an_arm_whose_upper_bound_does_not_pay_is_declined_by_name():
    state = BanditState(arms=(statistics(arm(), -0.02, -0.02, -0.03),))
    decision = growth_of(ask(observation(), state=state))

    assert (decision.action, decision.arm) == ("wait", arm())
    assert "promises at most" in decision.reason


def test_a_place_freed_by_a_verdict_counts_as_free():
    seeds = (seed("a#1", measured=contribution(-0.1)), seed("b#2", stage=Stage.TRAINING))
    answer = ask(observation(seeds=seeds))

    assert [decision.action for decision in answer.decisions] == ["cull", "germinate"]


# --- choosing ----------------------------------------------------------------------------------------------------------


def test_arms_never_tried_come_first_and_alternatives_are_named():
    options = tuple(option(blueprint=name) for name in "abcdefgh")
    state = BanditState(arms=(statistics(arm(blueprint="a"), 1.0),))
    decision = growth_of(ask(observation(options=options), state=state))

    assert decision.action == "germinate"
    assert decision.arm.blueprint != "a"
    assert decision.score is None
    assert len(decision.alternatives) == 7


def test_the_arm_with_the_highest_upper_bound_wins():
    options = (option(blueprint="a"), option(blueprint="b"))
    state = BanditState(arms=(statistics(arm(blueprint="a"), 0.1, 0.1), statistics(arm(blueprint="b"), 0.3, 0.3)))
    decision = growth_of(ask(observation(options=options), state=state))

    assert decision.arm.blueprint == "b"
    assert decision.score > 0.3
    assert "mean reward 0.3000 over 2 tries" in decision.reason


def test_the_first_arm_is_drawn_by_the_rng_seed():
    options = tuple(option(blueprint=name) for name in "abcd")
    first = {growth_of(ask(observation(options=options), rng_seed=n)).arm.blueprint for n in range(40)}

    assert first == set("abcd")


# --- credit ------------------------------------------------------------------------------------------------------------


def learned(*answers_to):
    """Statistics after a sequence of observations."""
    state = b""
    for seen in answers_to:
        state = ask(seen, state=state).state
    return {entry.arm: entry for entry in decode_state(state).arms}


def test_a_fossilized_seed_earns_its_contribution_minus_rent_once():
    kept = observation(seeds=(seed(stage=Stage.FOSSILIZED, measured=contribution(0.05)),), options=())
    found = learned(observation(seeds=(seed(),), options=()), kept, kept)

    assert (found[arm()].pulls, found[arm()].total) == (1, pytest.approx(0.05 - RENT))


@pytest.mark.parametrize("stage", [Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT])
def test_a_culled_seed_earns_minus_its_rent_whatever_it_showed(stage):
    ended = observation(seeds=(seed(stage=stage, measured=contribution(0.5)),), options=())
    found = learned(observation(seeds=(seed(),), options=()), ended, ended)

    assert (found[arm()].pulls, found[arm()].total) == (1, pytest.approx(-RENT))


def test_a_living_seed_that_is_no_longer_reported_was_culled():
    found = learned(observation(seeds=(seed(),), options=()), observation(options=()))

    assert (found[arm()].pulls, found[arm()].total) == (1, pytest.approx(-RENT))


def test_a_refused_germination_counts_as_a_try():
    found = learned(observation(), observation(options=()))

    assert (found[arm()].pulls, found[arm()].total) == (1, pytest.approx(-RENT))


def test_a_germination_whose_kernel_could_not_be_provided_teaches_nothing():
    assert learned(observation(), observation(options=(), unavailable=(arm(),))) == {}


def test_a_germination_that_happened_is_credited_when_its_seed_ends():
    assert learned(observation(), observation(seeds=(seed(stage=Stage.TRAINING),), options=())) == {}


def test_a_kept_seed_without_a_measurement_teaches_nothing():
    assert learned(observation(seeds=(seed(stage=Stage.FOSSILIZED),), options=())) == {}


# --- purity ------------------------------------------------------------------------------------------------------------


def test_a_state_of_another_version_or_of_garbage_is_refused():
    for state in (b"\xc1", b"garbage", msgspec.msgpack.encode({"version": 1})):
        with pytest.raises(CheckpointRejected):
            ask(observation(), state=state)


def test_with_a_nursery_the_best_few_arms_are_screened_against_each_other():
    options = tuple(option("s1", name) for name in "abcd")
    answer = ask(observation(options=options), policy=PolicySettings(nursery=3))
    wanted = [decision for decision in answer.decisions if decision.action == "germinate"]
    assert len(wanted) == len({decision.arm for decision in wanted}) == 3
    assert {decision.screening for decision in wanted} == {wanted[0].screening} != {""}
    assert len(decode_state(answer.state).asked) == 3


def test_an_arm_that_is_alone_is_not_screened():
    answer = ask(observation(options=(option("s1", "a"),)), policy=PolicySettings(nursery=3))
    assert [decision.screening for decision in answer.decisions if decision.action == "germinate"] == [""]


def test_candidates_of_one_screening_count_as_one_living_seed():
    candidates = tuple(
        msgspec.structs.replace(seed(f"s1#{number}", stage=Stage.TRAINING, blueprint="a"), screening="point 3")
        for number in range(4)
    )
    options = (option("s2", "b"),)
    answer = ask(observation(options=options, seeds=candidates), policy=PolicySettings(max_live_seeds=2))
    assert [decision.action for decision in answer.decisions] == ["germinate"]
    full = ask(observation(options=options, seeds=candidates), policy=PolicySettings(max_live_seeds=1))
    assert [decision.action for decision in full.decisions] == ["wait"]


def test_never_grows_nothing_and_keeps_the_state():
    request = Decide(job="j", point=0, rng_seed=0, settings=PolicySettings(), observation=observation(), state=b"x")

    assert [decision.action for decision in never.decide(request).decisions] == ["wait"]
    assert never.decide(request).state == b"x"


names = st.sampled_from("abc")
options = st.lists(
    st.builds(option, names, names, parameters=st.integers(1, 5000), available=st.booleans()),
    max_size=9,
    unique_by=lambda o: o.arm,
)
seeds = st.lists(
    st.builds(
        seed,
        st.builds(lambda slot, n: f"{slot}#{n}", names, st.integers(1, 9)),
        stage=st.sampled_from(Stage),
        blueprint=names,
        measured=st.none() | st.builds(contribution, st.floats(-0.1, 0.1), st.floats(0, 0.05), st.integers(0, 3)),
    ),
    max_size=4,
    unique_by=lambda record: record.seed,
)
observations = st.builds(
    lambda **fields: observation(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}),
    epoch=st.integers(0, 9),
    gate_loss=st.floats(0.0, 2.0),
    seeds=seeds,
    options=options,
)


@given(st.lists(observations, min_size=1, max_size=5), st.integers(0, 99), st.randoms(use_true_random=False))
def test_decisions_are_deterministic_whatever_the_order_of_options(history, rng_seed, shuffler):
    states = [b"", b""]
    for point, seen in enumerate(history):
        shuffled = list(seen.options)
        shuffler.shuffle(shuffled)
        other = msgspec.structs.replace(seen, options=tuple(shuffled))
        answers = [ask(s, state=state, point=point, rng_seed=rng_seed) for s, state in zip((seen, other), states, strict=True)]
        assert answers[0] == answers[1]
        states = [answer.state for answer in answers]


@given(st.lists(observations, min_size=1, max_size=5))
def test_only_available_arms_are_germinated_and_at_most_one_at_a_point(history):
    state = b""
    for seen in history:
        answer = ask(seen, state=state)
        state = answer.state
        wanted = [decision for decision in answer.decisions if decision.action == "germinate"]
        assert len(wanted) <= 1
        assert all(decision.arm in {o.arm for o in seen.options if o.available} for decision in wanted)
        assert all(decision.reason for decision in answer.decisions)


def simulate(worth, rng_seed, points):
    """A job in which an arm's seed ends one point after germination and is kept when it is worth more than its rent.

    Args:
        worth: contribution by arm.
        rng_seed: the job's.
        points: decision points.

    Returns:
        Pulls by arm, and the policy's final ranking of them by mean reward.
    """
    options = [option(a.slot, a.blueprint) for a in worth]
    random.Random(rng_seed).shuffle(options)
    policy = PolicySettings(max_fossilized=10**6)
    state, ended, pulls = b"", [], dict.fromkeys(worth, 0)
    for point in range(points):
        answer = ask(observation(options=tuple(options), seeds=tuple(ended)), policy=policy, state=state, rng_seed=rng_seed)
        state, wanted = answer.state, answer.decisions[-1]
        if wanted.action == "germinate":
            pulls[wanted.arm] += 1
            stage = Stage.FOSSILIZED if worth[wanted.arm] > RENT else Stage.CULLED
            name = f"{wanted.arm.slot}#{point}"
            ended.append(seed(name, stage=stage, blueprint=wanted.arm.blueprint, measured=contribution(worth[wanted.arm])))
    final = decode_state(state).arms
    return pulls, max(final, key=lambda entry: entry.total / entry.pulls).arm


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.0, 0.1), min_size=6, max_size=6, unique=True), st.integers(0, 10**6))
def test_no_arm_starves_and_the_best_arm_is_found_whatever_the_order(values, rng_seed):
    arms = [arm(slot, blueprint) for slot in ("s1", "s2") for blueprint in "abc"]
    worth = dict(zip(arms, values, strict=True))
    pulls, best = simulate(worth, rng_seed, points=20)

    assert min(pulls.values()) >= 1
    if max(values) > RENT:
        assert worth[best] == pytest.approx(max(values), abs=1e-9), "two that differ by rounding alone are equally good"
