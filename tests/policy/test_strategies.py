"""What holds for every registered strategy: it decides by the request alone, keeps to the limits, and says why."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
from bandit_world import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_requests import (
    BLUEPRINTS,
    SLOTS,
    contested,
    contribution,
    observation,
    observations,
    option,
    policies,
    request,
    scouted,
    seed,
)

from esperd.builtins.strategies import STRATEGIES
from esperd.declarations import resolve
from esperd.errors import CheckpointRejected, UnknownName
from esperd.messages.growth import LIVE_STAGES, Stage
from esperd.messages.policy import Arm, ArmMerit, ArmTrial, PolicySettings, SlotStatistics
from esperd.policy import successive_halving as halving
from esperd.policy.arms import RankedArm, by_score
from esperd.policy.rent import rent
from esperd.policy.state import ArmStatistics, BanditState, decode_state

EVERY = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}
GROWING = {name: decide for name, decide in EVERY.items() if name != "never"}
TRIES_ALL_FIRST = ("ucb", "discounted_ucb", "thompson", "epsilon_greedy", "softmax", "round_robin")
MEASURING_FIRST = ("gradient_merit", "merit_per_parameter", "successive_halving")
ARMS = [Arm(slot=record.slot, blueprint=blueprint) for record in SLOTS for blueprint in BLUEPRINTS]

every = pytest.mark.parametrize("decide", EVERY.values(), ids=EVERY)
growing = pytest.mark.parametrize("decide", GROWING.values(), ids=GROWING)
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def germinated(answer):
    return [decision for decision in answer.decisions if decision.action == "germinate"]


# --- whatever is asked ---------------------------------------------------------------------------------------------------


@every
@some
@given(st.lists(observations, min_size=1, max_size=5), policies, st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_same_history_is_answered_the_same_whatever_the_order_of_options(decide, history, policy, rng_seed, shuffler):
    states = [b"", b""]
    for point, seen in enumerate(history):
        shuffled = list(seen.options)
        shuffler.shuffle(shuffled)
        other = msgspec.structs.replace(seen, options=tuple(shuffled))
        asked = [
            request(told, policy=policy, state=state, point=point, rng_seed=rng_seed)
            for told, state in zip((seen, other), states, strict=True)
        ]
        answers = [decide(one) for one in asked]
        assert answers[0] == answers[1]
        assert answers[0] == decide(msgspec.msgpack.decode(msgspec.msgpack.encode(asked[0]), type=type(asked[0])))
        states = [answer.state for answer in answers]


@every
@some
@given(st.lists(observations, min_size=1, max_size=5), policies)
def test_only_available_arms_are_germinated_and_within_the_limits(decide, history, policy):
    state = b""
    for point, seen in enumerate(history):
        answer = decide(request(seen, policy=policy, state=state, point=point))
        state, wanted = answer.state, germinated(answer)
        ended = {decision.seed for decision in answer.decisions if decision.action in ("cull", "fossilize")}
        living = [record for record in seen.seeds if record.stage in LIVE_STAGES]
        kept = sum(record.stage is Stage.FOSSILIZED for record in seen.seeds)
        if wanted:
            assert len({record.screening or record.seed for record in living if record.seed not in ended}) < policy.max_live_seeds
            assert kept + len(living) < policy.max_fossilized
        assert {decision.arm for decision in wanted} <= {made.arm for made in seen.options if made.available}
        assert len({decision.arm for decision in wanted}) == len(wanted) <= policy.nursery
        assert {decision.screening for decision in wanted} == {f"point {point}" if len(wanted) > 1 else ""} or not wanted


@every
@some
@given(st.lists(observations, min_size=1, max_size=5), policies)
def test_every_decision_says_why_and_shows_the_tries_of_every_other_arm(decide, history, policy):
    state = b""
    for point, seen in enumerate(history):
        answer = decide(request(seen, policy=policy, state=state, point=point))
        state = answer.state
        assert answer.decisions
        assert all(decision.reason for decision in answer.decisions)
        for decision in answer.decisions:
            if decision.arm is not None and decision.action not in ("gauge", "try"):
                pulls = {entry.arm: entry.pulls for entry in decode_state(state).arms}
                available = {made.arm for made in seen.options if made.available}
                assert {other.arm for other in decision.alternatives} == available - {decision.arm}
                assert all(other.pulls == pulls.get(other.arm, 0) for other in decision.alternatives)


@growing
def test_a_state_that_cannot_be_read_is_refused(decide):
    for state in (b"\xc1", b"garbage", msgspec.msgpack.encode({"version": 2})):
        with pytest.raises(CheckpointRejected):
            decide(request(observation(), state=state))


@growing
def test_seeds_on_probation_are_judged_by_every_strategy_alike(decide):
    seeds = (
        seed("s1#1", stage=Stage.PROBATIONARY, measured=contribution(0.1)),
        seed("s2#2", stage=Stage.PROBATIONARY, measured=contribution(-0.1)),
    )
    answer = scouted(decide, request(observation(seeds=seeds)))
    assert [decision.action for decision in answer.decisions[:2]] == ["fossilize", "cull"]


@growing
def test_an_arm_that_costs_more_than_there_is_to_save_is_declined_by_name(decide):
    (decision,) = scouted(decide, request(observation(gate_loss=0.001))).decisions

    assert (decision.action, decision.arm) == ("wait", option().arm)
    assert "more than the whole gate loss" in decision.reason


# --- chance and order ----------------------------------------------------------------------------------------------------


def chosen(name, *, rng_seed=0, point=3, state=b"", arms=ARMS, **policy):
    seen = observation(options=tuple(option(arm.slot, arm.blueprint) for arm in arms))
    asked = request(seen, policy=PolicySettings(**policy), state=state, point=point, rng_seed=rng_seed)
    wanted = germinated(scouted(EVERY[name], asked))
    return wanted[0].arm if wanted else None


@pytest.mark.parametrize("name", [name for name in GROWING if name not in MEASURING_FIRST])
def test_no_arm_comes_first_by_where_it_stands(name):
    assert len({chosen(name, rng_seed=rng_seed) for rng_seed in range(60)}) > len(ARMS) // 2


def test_the_first_arm_is_the_same_at_every_point_of_a_job_and_uniform_draws_anew():
    assert len({chosen("first_arm", point=point) for point in range(40)}) == 1
    assert {chosen("uniform", point=point) for point in range(150)} == set(ARMS)


def test_round_robin_counts_a_try_whose_seed_still_lives():
    first = chosen("round_robin")
    living = seed(f"{first.slot}#1", stage=Stage.TRAINING, blueprint=first.blueprint)
    seen = observation(options=tuple(option(arm.slot, arm.blueprint) for arm in ARMS), seeds=(living,))
    assert germinated(EVERY["round_robin"](request(seen)))[0].arm != first


REPLAY = """
import hashlib
from bandit_world import DECIDE, answers
for name in DECIDE:
    print(name, hashlib.sha256(b"".join(answers(name, rng_seed=5, points=25))).hexdigest())
"""


def test_another_process_decides_the_same():
    told = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run([sys.executable, "-c", REPLAY], check=True, capture_output=True, text=True, env=environment)
        told.add(done.stdout)
    assert len(told) == 1
    assert len(told.pop().splitlines()) == len(EVERY)


# --- what is measured before anything is grown -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURING_FIRST)
def test_nothing_is_measured_where_no_arm_is_affordable(name):
    (decision,) = EVERY[name](request(all_arms(gate_loss=0.001))).decisions
    assert "more than the whole gate loss" in decision.reason


def all_arms(**fields):
    return observation(options=tuple(option(arm.slot, arm.blueprint) for arm in ARMS), **fields)


@pytest.mark.parametrize("name", MEASURING_FIRST)
def test_the_arm_that_measured_best_is_grown_wherever_it_stands(name):
    for best in ARMS:
        (wanted,) = germinated(scouted(EVERY[name], request(all_arms()), lambda arm, best=best: 0.05 + 0.05 * (arm == best)))
        assert wanted.arm == best


def test_a_merit_for_the_parameters_prefers_a_small_seed_to_a_large_one_of_the_same_gradient():
    small, large = option("s1", "conv", parameters=100), option("s2", "gate", parameters=400)
    asked = request(observation(options=(small, large)))
    norms = {small.arm: 1.0, large.arm: 1.9}
    (whole,) = germinated(scouted(EVERY["gradient_merit"], asked, norms.get))
    (each,) = germinated(scouted(EVERY["merit_per_parameter"], asked, norms.get))
    assert (whole.arm, whole.score) == (large.arm, 1.9)
    assert (each.arm, each.score) == (small.arm, 0.1)
    assert "largest gradient merit per parameter of 2 arms that may be grown: 0.1 over" in each.reason
    assert [other.score for other in each.alternatives] == [pytest.approx(1.9 / 20)]


def test_of_several_candidates_each_is_told_its_own_place():
    asked = request(all_arms(), policy=PolicySettings(nursery=3, max_live_seeds=9))
    reasons = [made.reason for made in germinated(scouted(EVERY["gradient_merit"], asked))]
    assert [reason.partition(" gradient")[0] for reason in reasons] == ["largest", "2nd largest", "3rd largest"]
    places = [found.why for found in by_score([scored(place) for place in range(1, 23)], 0, "best")]
    assert [places[place - 1] for place in (1, 2, 3, 4, 11, 12, 13, 21, 22)] == [
        f"{place}best of all" for place in ("", "2nd ", "3rd ", "4th ", "11th ", "12th ", "13th ", "21st ", "22nd ")
    ]


def scored(place):
    return RankedArm(option=option("s1", f"b{place}"), rent=0.0, pulls=0, mean=None, score=-float(place), why="of all")


def test_merits_count_for_a_tenth_of_the_job_and_are_measured_anew_then():
    first = scouted(EVERY["gradient_merit"], request(all_arms()))
    soon = EVERY["gradient_merit"](request(all_arms(epoch=9, epochs_left=36.0), state=first.state))
    assert {decision.action for decision in soon.decisions} == {"germinate"}
    again = EVERY["gradient_merit"](request(all_arms(epoch=10, epochs_left=35.0), state=first.state))
    assert {decision.action for decision in again.decisions} == {"gauge"}
    refused = germinated(first)[0].arm  # no seed came of it: that does not pay
    assert {decision.arm for decision in again.decisions} == set(ARMS) - {refused}


def gauging(name, seen, state=b""):
    """Arms that are gauged at a point, in how many batches; and what is decided then."""
    told, answer = {}, EVERY[name](request(seen, state=state))
    while any(decision.action == "gauge" for decision in answer.decisions):
        told |= {decision.arm: decision.batches for decision in answer.decisions}
        merits = tuple(ArmMerit(arm=arm, norm=0.1, batches=batches, epoch=seen.epoch) for arm, batches in told.items())
        answer = EVERY[name](request(msgspec.structs.replace(seen, merits=merits), state=answer.state))
    return told, answer


@pytest.mark.parametrize("name", ["gradient_merit", "merit_per_parameter"])
def test_gauging_takes_a_twentieth_of_a_job_at_most_whatever_an_epoch_holds(name):
    """Of 45 epochs with 10 steps each that is 22 passes of the host; a seed of a tenth of it makes 1.1 of each."""
    few = all_arms(steps_per_epoch=10)
    told, answer = gauging(name, few)
    assert told == dict.fromkeys(ARMS, 1)
    later = all_arms(epoch=20, epochs_left=25.0, steps_per_epoch=10)
    again, answer = gauging(name, later, answer.state)
    refused = 1  # no seed came of what was germinated: that arm is out
    assert len(again) == int((0.05 * 450 - 12 * 1.1) / 1.1) < len(ARMS) - refused
    last = all_arms(epoch=40, epochs_left=5.0, progress=0.5, steps_per_epoch=10, shortest_life_epochs=3)
    none, answer = gauging(name, last, answer.state)
    assert not none
    assert "largest gradient merit" in germinated(answer)[0].reason, "older merits go on to count"


def test_arms_that_a_job_cannot_bear_to_gauge_come_after_the_others_as_it_lists_them():
    one_step = all_arms(steps_per_epoch=1, epochs_left=95.0)  # five passes: four arms
    some, answer = gauging("gradient_merit", one_step)
    (grown,) = germinated(answer)
    assert grown.arm in some
    assert "largest gradient merit of 4 of 12 arms" in grown.reason
    none, answer = gauging("gradient_merit", all_arms(steps_per_epoch=1, epochs_left=10.0))
    assert not none
    (listed,) = germinated(answer)
    assert "not gauged, because that would take more than 5% of the job; next in its list" in listed.reason


def test_those_are_gauged_first_that_never_were():
    one_step = all_arms(steps_per_epoch=1, epochs_left=95.0)  # five passes: four arms
    first, answer = gauging("gradient_merit", one_step)
    assert len(first) == 4
    state = msgspec.structs.replace(decode_state(answer.state), gauged_passes=0.0).encode()
    second, _ = gauging("gradient_merit", msgspec.structs.replace(one_step, epoch=50, epochs_left=50.0), state)
    assert len(second) == 4
    assert not set(first) & set(second)


def test_an_arm_that_could_not_be_gauged_is_not_grown():
    asked = request(all_arms())
    merits = tuple(ArmMerit(arm=arm, norm=None, batches=8, epoch=5, why_not="it does not build") for arm in ARMS)
    told = request(all_arms(merits=merits), state=EVERY["gradient_merit"](asked).state)
    (decision,) = EVERY["gradient_merit"](told).decisions
    assert (decision.action, decision.arm is None) == ("wait", False)
    assert "it does not build" in decision.reason


def test_arms_that_will_not_be_grown_are_not_gauged():
    one, failed, dear = option("s1", "conv"), option("s2", "gate"), option("s3", "wide", parameters=50_000)
    known = (ArmStatistics(arm=failed.arm, pulls=2, total=-0.02, squares=2e-4),)
    seen = observation(options=(one, failed, dear))
    first = EVERY["gradient_merit"](request(seen, state=BanditState(arms=known).encode()))
    assert [(made.action, made.arm) for made in first.decisions] == [("gauge", one.arm)]
    nothing = msgspec.structs.replace(seen, options=(failed, dear))
    (told,) = EVERY["gradient_merit"](request(nothing, state=BanditState(arms=known).encode())).decisions
    assert (told.action, told.arm) == ("wait", failed.arm)
    assert "does not pay: mean reward -0.0100 over 2 tries" in told.reason


def contest(worth, **policy):
    """Arms of each round of a contest, its lengths, and the answer."""
    asked = request(all_arms(), policy=PolicySettings(**policy))
    told = []

    def watched(one):
        answer = EVERY["successive_halving"](one)
        told.append([decision for decision in answer.decisions if decision.action == "try"])
        return answer

    answer = scouted(watched, asked, worth)
    rounds = [made for made in told if made]
    return [{decision.arm for decision in made} for made in rounds], [made[0].epochs for made in rounds], answer


def worth_of(arm):
    return 0.02 + 0.01 * ARMS.index(arm)


def test_each_round_of_a_contest_the_better_half_goes_on_for_twice_as_long():
    rounds, lengths, answer = contest(worth_of, contenders=8)
    assert rounds == [set(ARMS[4:]), set(ARMS[8:]), set(ARMS[10:])]
    assert lengths[1:] == [2 * lengths[0], 4 * lengths[0]]
    assert germinated(answer)[0].arm == ARMS[-1]


def test_a_contest_takes_its_share_of_the_epochs_left():
    rounds, lengths, _ = contest(worth_of, contenders=8, contest_share=0.2)
    spent = sum((len(arms) + 1) * length for arms, length in zip(rounds, lengths, strict=True))
    assert spent == pytest.approx(0.2 * observation().epochs_left)


def test_gate_passes_count_for_the_share_and_where_they_are_dear_fewer_arms_compete():
    def spent(gate_pass_epochs):
        asked = request(all_arms(gate_pass_epochs=gate_pass_epochs), policy=PolicySettings(contenders=8, contest_share=0.2))
        told = []

        def watched(one):
            told.append([made for made in EVERY["successive_halving"](one).decisions if made.action == "try"])
            return EVERY["successive_halving"](one)

        scouted(watched, asked, worth_of)
        rounds = [made for made in told if made]
        dearest = 1.1  # of an arm over the host alone
        passes = sum(len(made) + 1 for made in rounds) * gate_pass_epochs * dearest
        return len(rounds[0]), passes + sum((len(made) + 1) * made[0].epochs for made in rounds)

    allowed = 0.2 * observation().epochs_left
    assert spent(0.1) == (8, pytest.approx(allowed))
    fewer, all_together = spent(0.4)
    assert 2 < fewer < 8
    assert all_together == pytest.approx(allowed)


def planned(options, **seen):
    """Arms that enter a contest, and epochs of its first round; None where there is none, with what is decided instead."""
    told = observation(options=tuple(options), gate_pass_epochs=0.01, **seen)
    asked = request(told, policy=PolicySettings(contenders=8, contest_share=0.2, rent_flops=0.0))
    (*_, last) = decisions = EVERY["successive_halving"](asked).decisions
    if last.action != "try":
        return None, last
    return [decision.arm for decision in decisions], last.epochs


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 40])
def test_rounds_of_a_contest_last_whole_steps_and_all_together_keep_to_the_share(steps):
    dear, options = 1.1, [option(arm.slot, arm.blueprint) for arm in ARMS[:8]]
    entered = []
    for left in (12.0, 40.0, 200.0):
        arms, length = planned(options, steps_per_epoch=steps, epochs_left=left)
        if arms is None:
            assert "cannot compete" in length.reason
            continue
        entered.append(len(arms))
        assert length * steps == pytest.approx(round(length * steps))
        assert length * steps > dear, "each affords a step"
        sizes = halving.rounds(len(arms))
        spent = sum((size + 1) * (length * 2**number + 0.01 * dear) for number, size in enumerate(sizes))
        spent += sum(size * 3 * dear / steps for size in sizes)  # probes of newborn seeds
        assert spent <= 0.2 * left
    assert entered == sorted(entered)
    assert entered[-1] == 8 if steps >= 3 else entered[-1] >= 2


def test_where_not_even_two_arms_and_a_step_each_fit_there_is_no_contest_and_nothing_is_grown():
    none, decision = planned([option("s1"), option("s2")], steps_per_epoch=1, epochs_left=20.0)
    assert (none, decision.action) == (None, "wait")
    assert "a contest may take 4 epochs, which is less than 2 contenders take that train for a step each" in decision.reason


def test_an_arm_too_dear_for_a_step_in_the_shortest_contest_is_left_out_and_the_others_compete():
    dear = option("s1", "wide", flops=1e6)
    arms, _ = planned([option("s1"), option("s2"), dear], steps_per_epoch=2, epochs_left=90.0)
    assert {arm.blueprint for arm in arms} == {"conv"}
    assert planned([dear], steps_per_epoch=2, epochs_left=90.0)[0] is None


def test_who_does_not_beat_training_on_after_rent_is_not_grown():
    price = rent(100, 1000.0, observation(), PolicySettings())
    _, _, answer = contest(lambda _arm: 0.9 * price)
    (decision,) = answer.decisions
    assert decision.action == "wait"
    assert "beat training on by" in decision.reason


def after_a_contest(worth, known=()):
    """What is decided when arms went so far: (length of their last round, what they brought in it)."""
    trials = tuple(ArmTrial(arm=arm, epochs=length, trial=contested(loss), epoch=5) for arm, (length, loss) in worth.items())
    state = BanditState(arms=known, trials=tuple(sorted(trials, key=lambda trial: trial.arm)))
    return EVERY["successive_halving"](request(all_arms(), state=state.encode())).decisions[-1]


def test_who_lost_to_arms_that_brought_nothing_in_the_end_is_not_grown():
    lost = {ARMS[2]: (1.0, 0.03), ARMS[3]: (1.0, 0.02)}
    refuted = after_a_contest({ARMS[0]: (2.0, -0.02), ARMS[1]: (2.0, -0.03), **lost})
    assert (refuted.action, refuted.arm) == ("wait", ARMS[0])
    assert after_a_contest({ARMS[0]: (2.0, 0.02), ARMS[1]: (2.0, -0.03), **lost}).arm == ARMS[0]
    failed = ArmStatistics(arm=ARMS[0], pulls=1, total=-0.01, squares=1e-4)
    later = after_a_contest({ARMS[0]: (2.0, 0.02), ARMS[1]: (2.0, -0.03), **lost}, (failed,))
    assert later.action == "wait", "the winner's seed was culled since"
    paid = ArmStatistics(arm=ARMS[0], pulls=1, total=0.01, squares=1e-4)
    assert after_a_contest({ARMS[0]: (2.0, 0.02), ARMS[1]: (2.0, -0.03), **lost}, (paid,)).action == "germinate"


def test_there_is_one_contest_a_job_and_growth_follows_its_order():
    _, _, answer = contest(worth_of, contenders=8)
    left = observation(options=tuple(option(arm.slot, arm.blueprint) for arm in ARMS[:-1]), epoch=6)
    (decision,) = EVERY["successive_halving"](request(left, state=answer.state)).decisions
    assert (decision.action, decision.arm) == ("germinate", ARMS[-2])


def test_an_arm_that_a_contest_could_not_try_is_out():
    asked = request(all_arms(), policy=PolicySettings(contenders=12))
    first = EVERY["successive_halving"](asked)
    trials = tuple(
        ArmTrial(
            arm=arm,
            epochs=1.0,
            trial=contested(0.05) if arm == ARMS[3] else None,
            epoch=5,
            why_not="" if arm == ARMS[3] else "no",
        )
        for arm in ARMS
    )
    told = request(all_arms(trials=trials), state=first.state, policy=PolicySettings(contenders=12))
    second = EVERY["successive_halving"](told)
    assert [decision.arm for decision in second.decisions] == [ARMS[3]]


# --- tries known ---------------------------------------------------------------------------------------------------------


def after(name, *pulls, **policy):
    """The state after pulls of arms, told to the strategy as seeds that ended: (arm, reward after rent)."""
    price, state = rent(100, 1000.0, observation(), PolicySettings()), b""
    for number, (arm, reward) in enumerate(pulls):
        measured = contribution(reward + price)
        ended = seed(f"{arm.slot}#{number}", stage=Stage.FOSSILIZED, blueprint=arm.blueprint, measured=measured)
        told = request(observation(seeds=(ended,), options=()), policy=PolicySettings(**policy), state=state)
        state = EVERY[name](told).state
    return state


ONCE_EACH = [(arm, 0.01 + 0.001 * place) for place, arm in enumerate(ARMS)]


@pytest.mark.parametrize("name", TRIES_ALL_FIRST)
def test_an_arm_never_tried_comes_before_every_other_where_that_is_promised(name):
    for left in (0, 5, 11):
        state = after(name, *(ONCE_EACH[:left] + ONCE_EACH[left + 1 :]))
        assert chosen(name, state=state) == ARMS[left]


@pytest.mark.parametrize("name", [*TRIES_ALL_FIRST, "uniform"])
def test_no_arm_starves_under_a_strategy_that_promises_it(name):
    found = run(name, rng_seed=1, points=400, policy=PolicySettings(exploration=1.0))
    assert min(found.pulls.values()) >= 1
    if name == "round_robin":
        assert max(found.pulls.values()) - min(found.pulls.values()) <= 1


def draws(name, state, **policy):
    return [chosen(name, state=state, point=point, **policy) for point in range(200)]


def test_temperature_decides_how_evenly_softmax_draws():
    state = after("softmax", *ONCE_EACH)
    assert set(draws("softmax", state, temperature=0.01)) == {ARMS[-1]}
    counts = [draws("softmax", state, temperature=temperature).count(ARMS[-1]) for temperature in (0.2, 1.0, 100.0)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(draws("softmax", state, temperature=100.0))) == len(ARMS)


def test_epsilon_falls_with_the_evidence_and_with_exploration():
    state, more = after("epsilon_greedy", *ONCE_EACH), after("epsilon_greedy", *ONCE_EACH * 5)
    strays = [
        sum(arm != ARMS[-1] for arm in draws("epsilon_greedy", known, exploration=exploration))
        for known, exploration in ((state, 1.0), (state, 0.5), (more, 0.5), (more, 0.0))
    ]
    assert strays == sorted(strays, reverse=True)
    assert strays[0] > strays[1] > strays[2] > strays[3] == 0


def test_thompson_draws_anew_at_every_point_and_by_exploration():
    state = after("thompson", *ONCE_EACH)
    assert set(draws("thompson", state, exploration=0.0)) == {ARMS[-1]}
    assert len(set(draws("thompson", state, exploration=1.0))) > 3


def test_discounted_evidence_fades_and_undiscounted_is_ucb():
    stale, fresh = ARMS[0], ARMS[1]
    told = [(stale, 0.10), *[(arm, 0.01) for arm in ARMS[1:]], *[(stale, 0.02)] * 3, *[(fresh, 0.04)] * 3]
    state = after("discounted_ucb", *told)
    assert chosen("discounted_ucb", state=state, discount=1.0, exploration=0.0) == stale
    assert chosen("discounted_ucb", state=state, discount=0.5, exploration=0.0) == fresh
    for exploration in (0.0, 0.5, 2.0):
        bounds = chosen("discounted_ucb", state=state, discount=1.0, exploration=exploration)
        assert bounds == chosen("ucb", state=state, exploration=exploration)


def test_a_context_tells_what_an_arm_never_tried_is_like():
    good = [(arm, 0.05) for arm in ARMS if arm.blueprint == "wide" and arm.slot != "s3"]
    bad = [(arm, -0.004) for arm in ARMS if arm.blueprint != "wide" and arm.slot != "s3"]
    state, untried = after("contextual", *good, *bad), [arm for arm in ARMS if arm.slot == "s3"]
    for rng_seed in range(10):
        assert chosen("contextual", state=state, arms=untried, rng_seed=rng_seed, exploration=0.0).blueprint == "wide"


def measured_at(**gradients):
    return tuple(SlotStatistics(slot=slot, gradient=norm, steps=4) for slot, norm in gradients.items())


def test_a_context_tells_what_gradients_at_slots_went_with_and_unknown_ones_say_nothing():
    """Seeds paid where the gradient was larger. Norms fall while a job trains, so what counts is where a slot's stands."""
    state = b""
    for number in range(12):
        slot, norms = ("s1", {"s1": 4.0, "s2": 1.0}) if number % 2 else ("s2", {"s1": 4.0, "s2": 1.0})
        if number % 4 > 1:  # depth and width say nothing
            norms = {"s1": norms["s2"], "s2": norms["s1"]}
        reward = 0.05 if norms[slot] == 4.0 else 0.01
        ended = seed(f"{slot}#{number}", stage=Stage.FOSSILIZED, blueprint="conv", measured=contribution(reward))
        told = observation(seeds=(ended,), options=(), slot_statistics=measured_at(**norms))
        state = EVERY["contextual"](request(told, state=state)).state

    def score(**gradients):
        seen = observation(options=(option("s3"),), slot_statistics=measured_at(**gradients))
        (decision,) = EVERY["contextual"](request(seen, state=state, policy=PolicySettings(exploration=0.0))).decisions
        return decision.score

    large, small = score(s1=0.01, s2=0.01, s3=0.04), score(s1=0.04, s2=0.04, s3=0.01)
    assert small + 0.01 < score(s1=0.02, s2=0.02, s3=0.02) < large - 0.01
    unknown = score()
    assert small < unknown < large
    assert unknown == score(s3=0.04) == score(s1=0.04, s2=0.01, s3=None) == score(s1=0.04, s2=0.01, s3=0.0)


def test_a_state_that_knew_no_gradients_is_read_and_an_older_one_is_refused():
    state = msgspec.msgpack.decode(after("contextual", *ONCE_EACH))
    for known in state["tries"]:
        del known["circumstances"]["gradient"]
    state["version"] = 4
    read = decode_state(msgspec.msgpack.encode(state))
    assert {known.circumstances.gradient for known in read.tries} == {None}
    assert read.encode() == after("contextual", *ONCE_EACH), "it goes on as one of this version"
    state["version"] = 3
    with pytest.raises(CheckpointRejected, match="version 3, this esperd knows 4 and 5"):
        decode_state(msgspec.msgpack.encode(state))


def test_an_arm_never_tried_is_not_declined_for_what_others_earned():
    lost = [(arm, -0.004) for arm in ARMS[1:]] * 4
    (decision,) = germinated(EVERY["contextual"](request(observation(), state=after("contextual", *lost))))
    assert decision.arm == ARMS[0]
    assert "never tried" in decision.reason


def test_a_context_needs_its_slot_described():
    state = after("contextual", *ONCE_EACH)
    with pytest.raises(UnknownName, match="'s9'"):
        EVERY["contextual"](request(observation(options=(option("s9"),)), state=state))


LEARNING = ("ucb", "discounted_ucb", "thompson", "epsilon_greedy", "softmax", "contextual")


@pytest.mark.parametrize("name", LEARNING)
def test_arms_that_were_tried_and_never_paid_are_declined_by_name(name):
    state = after(name, *[(arm, -0.004) for arm in ARMS for _ in range(8)])
    seen = observation(options=tuple(option(arm.slot, arm.blueprint) for arm in ARMS))
    answers = [
        EVERY[name](request(seen, state=state, point=point, policy=PolicySettings(exploration=0.0))) for point in range(20)
    ]

    assert all(answer.decisions[0].action == "wait" and answer.decisions[0].arm in ARMS for answer in answers)
    assert all("declined: the best available arm" in answer.decisions[0].reason for answer in answers)


def test_the_circumstances_of_a_try_are_those_of_the_decision_that_asked_for_it():
    asked = EVERY["contextual"](request(observation(progress=0.2, options=(option("s2"),))))
    grown = observation(progress=0.5, seeds=(seed("s2#1", stage=Stage.FOSSILIZED, measured=contribution(0.1)),), options=())
    (known,) = decode_state(EVERY["contextual"](request(grown, state=asked.state)).state).tries

    assert known.circumstances.progress == 0.2
    assert known.circumstances.depth == pytest.approx(2 / 3)
    assert known.circumstances.width == 0.5
    assert known.circumstances.flops == pytest.approx(1000 / 11_000)
