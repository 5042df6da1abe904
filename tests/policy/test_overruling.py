"""A person's word goes before the strategy's, a proposal waits for approval, and neither confuses what the strategy knows."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from policy_requests import contribution, observation, observations, option, policies, request, seed

from esperd.builtins.strategies import STRATEGIES
from esperd.declarations import resolve
from esperd.errors import IllegalTransition, NothingToShow, UnknownName
from esperd.messages.growth import Stage
from esperd.messages.overruling import Overrule
from esperd.messages.policy import Arm, Decided, Decision, PolicySettings
from esperd.policy.overruling import AWAITS, overrule, proposals, withhold
from esperd.policy.state import STATE_VERSION, decode_state
from esperd.policy.wishes import decisions_of

CONV, GATE = Arm(slot="s1", blueprint="conv"), Arm(slot="s2", blueprint="gate")
EVERY = {strategy.name: resolve(strategy.decide) for strategy in STRATEGIES}
every = pytest.mark.parametrize("decide", EVERY.values(), ids=EVERY)
some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def grow(arm=GATE, by="ada", **fields):
    return Decision(action="germinate", arm=arm, reason="ada said so", by=by, **fields)


def cull(name, by="ada"):
    return Decision(action="cull", seed=name, reason="ada said so", by=by)


def wait(by="ada"):
    return Decision(action="wait", reason="ada said so", by=by)


def answer(*decisions, state=b""):
    return Decided(decisions=decisions, state=state)


JUDGED = Decision(action="fossilize", seed="s3#0", reason="its interval lies above its rent")
MEASURED_AGAIN = Decision(action="wait", seed="s2#1", reason="measurement 1 of 3")
WANTED = Decision(action="germinate", arm=CONV, reason="never tried")
DECLINED = Decision(action="wait", arm=CONV, reason="declined")


def test_who_wants_to_grow_replaces_the_strategys_germination_and_leaves_its_judgement_of_seeds():
    overruled = overrule(answer(JUDGED, MEASURED_AGAIN, WANTED), [(grow(),)])
    assert overruled.decisions == (JUDGED, MEASURED_AGAIN, grow())


def test_who_says_wait_grows_nothing_at_this_point():
    assert overrule(answer(JUDGED, WANTED), [(wait(),)]).decisions == (JUDGED, wait())


@pytest.mark.parametrize("growth", [DECLINED, Decision(action="wait", reason="warming up")])
def test_who_wants_to_grow_replaces_a_wait_about_growing(growth):
    assert overrule(answer(growth), [(grow(),)]).decisions == (grow(),)


def test_who_speaks_of_a_seed_replaces_what_was_decided_on_it_and_nothing_else():
    overruled = overrule(answer(JUDGED, MEASURED_AGAIN, WANTED), [(cull("s3#0"),)])
    assert overruled.decisions == (MEASURED_AGAIN, WANTED, cull("s3#0"))


def test_of_words_about_one_slot_or_seed_the_last_one_counts():
    said = [(grow(GATE),), (cull("s3#0"),), (grow(Arm(slot="s2", blueprint="norm")),), (cull("s3#0", by="bob"),)]
    overruled = overrule(answer(JUDGED), said)
    assert overruled.decisions == (cull("s3#0", by="bob"), grow(Arm(slot="s2", blueprint="norm")))


def test_wishes_to_grow_at_two_slots_are_both_done_until_somebody_says_wait():
    assert overrule(answer(WANTED), [(grow(CONV),), (grow(GATE),)]).decisions == (grow(CONV), grow(GATE))
    assert overrule(answer(WANTED), [(grow(CONV),), (grow(GATE),), (wait(),)]).decisions == (wait(),)
    assert overrule(answer(WANTED), [(wait(),), (grow(GATE),)]).decisions == (grow(GATE),)


def test_a_measurement_that_the_strategy_asked_for_is_made_whatever_people_grow():
    trial = Decision(action="trial", seed="s1#4", reason="to be sure")
    assert overrule(answer(trial, WANTED), [(wait(),)]).decisions == (trial, wait())


def test_without_a_word_the_answer_stays_as_it_is():
    given_ = answer(JUDGED, WANTED, state=b"its own")
    assert overrule(given_, []) is given_


# --- proposals -----------------------------------------------------------------------------------------------------------


def test_what_would_change_the_structure_becomes_a_wait_that_says_what_it_awaits_approval_for():
    fade = Decision(action="somebodys_operation", seed="s1#9", reason="a plugin's idea")
    trial = Decision(action="trial", seed="s1#4", reason="to be sure")
    withheld = withhold(answer(JUDGED, MEASURED_AGAIN, fade, trial, WANTED))
    assert [made.action for made in withheld.decisions] == ["wait", "wait", "wait", "trial", "wait"]
    assert [made.proposes for made in withheld.decisions] == ["fossilize", "", "somebodys_operation", "", "germinate"]
    assert all(made.reason.startswith(AWAITS) for made in withheld.decisions if made.proposes)
    assert proposals(withheld) == (JUDGED, fade, WANTED)


def test_an_approved_candidate_is_screened_only_where_there_is_another_one():
    one, other = (grow(arm, screening="point 3") for arm in (CONV, GATE))
    assert [made.screening for made in overrule(answer(), [(one, other)]).decisions] == ["point 3", "point 3"]
    assert [made.screening for made in overrule(answer(), [(one,)]).decisions] == [""]


def test_a_proposal_that_somebody_answered_is_not_proposed_again_at_that_point():
    withheld = withhold(answer(JUDGED, WANTED))
    assert proposals(overrule(withheld, [(wait(),)])) == (JUDGED,)
    assert proposals(overrule(withheld, [(cull("s3#0"),)])) == (WANTED,)


@every
@some
@given(seen=observations, policy=policies)
def test_no_strategy_takes_a_proposal_that_was_never_carried_out_for_a_refusal(decide, seen, policy):
    first = decide(request(seen, policy=policy))
    proposed = withhold(first)
    assert not any(made.action in {"germinate", "fossilize", "cull"} for made in proposed.decisions)
    again = decide(request(seen, policy=policy, state=proposed.state, point=4))
    known, then = (decode_state(each.state).arms if each.state else () for each in (first, again))
    assert known == then


def test_a_germination_that_a_person_replaced_is_not_credited_as_refused_and_one_that_a_gate_refused_is():
    seen = observation(options=(option(),))
    decide = EVERY["ucb"]
    asked = decide(request(seen))
    assert [made.arm for made in asked.decisions if made.action == "germinate"] == [CONV]
    refused = decode_state(decide(request(seen, state=asked.state, point=4)).state)
    assert [entry.pulls for entry in refused.arms] == [1]
    replaced = overrule(asked, [(grow(),)])
    assert decode_state(decide(request(seen, state=replaced.state, point=4)).state).arms == ()


@pytest.mark.parametrize("end", [Stage.FOSSILIZED, Stage.CULLED])
def test_a_seed_that_a_person_grew_is_credited_when_it_ends_like_one_that_nobody_asked_for(end):
    decide, worth = EVERY["ucb"], contribution(0.5)
    state = overrule(decide(request(observation())), [(grow(),)]).state
    alive = observation(seeds=(seed("s2#0", stage=Stage.TRAINING, blueprint="gate"),), options=())
    state = decide(request(alive, state=state, point=4)).state
    assert [pending.seed for pending in decode_state(state).pending] == ["s2#0"]
    ended = observation(seeds=(seed("s2#0", stage=end, blueprint="gate", measured=worth),), options=())
    (credited,) = decode_state(decide(request(ended, state=state, point=5)).state).arms
    assert (credited.arm, credited.pulls, credited.total > 0) == (GATE, 1, end is Stage.FOSSILIZED)


THEIRS = [b"", b"\x00 a format of its own", msgspec.msgpack.encode({"version": STATE_VERSION, "asked": [], "mine": 1})]


@pytest.mark.parametrize("state", THEIRS)
def test_the_state_of_a_strategy_of_somebody_elses_is_left_as_it_is(state):
    assert withhold(answer(WANTED, state=state)).state == state
    assert overrule(answer(WANTED, state=state), [(wait(),)]).state == state


# --- wishes --------------------------------------------------------------------------------------------------------------

SEEN = observation(
    seeds=(seed("s1#0", stage=Stage.PROBATIONARY), seed("s2#1", stage=Stage.TRAINING), seed("s3#2", stage=Stage.FOSSILIZED)),
    options=(option("s1", "conv", available=False), option("s2", "gate"), option("s1", "gate")),
)


def wish(name, **fields):
    return Overrule(id="j", wish=name, by="ada", **fields)


def test_a_wish_becomes_a_decision_that_says_who_and_why():
    (grown,) = decisions_of(wish("grow", slot="s2", blueprint="gate", reason="try it"), SEEN, answer()).decisions
    assert (grown.action, grown.arm, grown.by, grown.reason) == ("germinate", GATE, "ada", "ada said: try it")
    (kept,) = decisions_of(wish("keep", seed="s1#0"), SEEN, answer()).decisions
    assert (kept.action, kept.seed, kept.reason) == ("fossilize", "s1#0", "ada said so")
    (gone,) = decisions_of(wish("cull", seed="s2#1"), SEEN, answer()).decisions
    assert (gone.action, gone.seed) == ("cull", "s2#1")
    assert decisions_of(wish("wait"), None, None).decisions[0].action == "wait"


def test_what_may_stand_in_the_way_is_said_at_once():
    assert decisions_of(wish("grow", slot="s2", blueprint="gate"), SEEN, answer()).note == ""
    assert "the slot is taken" in decisions_of(wish("grow", slot="s1", blueprint="conv"), SEEN, answer()).note
    assert "first decision point" in decisions_of(wish("grow", slot="s2", blueprint="gate"), None, None).note
    assert decisions_of(wish("keep", seed="s1#0"), SEEN, answer()).note == ""
    assert "training" in decisions_of(wish("keep", seed="s2#1"), SEEN, answer()).note


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (wish("grow", slot="s9", blueprint="gate"), UnknownName, r"no slot 's9'.*there are: s1, s2, s3"),
        (wish("grow", slot="s1", blueprint="gates"), UnknownName, "did you mean 'gate'"),
        (wish("grow", slot="s2", blueprint="conv"), UnknownName, "does not fit slot 's2'; there fit: gate"),
        (wish("cull", seed="s1#7"), UnknownName, "no seed 's1#7'; did you mean 's1#0'"),
        (wish("keep", seed="s3#2"), IllegalTransition, "s3#2 is fossilized"),
        (wish("approve"), NothingToShow, "nothing of job j awaits approval"),
    ],
)
def test_a_wish_that_means_nothing_is_a_typed_error(said, error, message):
    with pytest.raises(error, match=message):
        decisions_of(said, SEEN, answer(JUDGED))


def test_before_the_first_decision_point_there_are_no_seeds_to_speak_of():
    with pytest.raises(UnknownName, match="there are: none"):
        decisions_of(wish("cull", seed="s1#0"), None, None)


def test_once_the_budget_is_spent_nothing_is_decided_any_more():
    with pytest.raises(IllegalTransition, match="budget of job j is spent"):
        decisions_of(wish("wait"), observation(progress=1.0), answer())


def test_approving_takes_all_proposals_or_the_one_that_is_named():
    proposed = withhold(answer(JUDGED, MEASURED_AGAIN, WANTED))
    both = decisions_of(wish("approve", reason="fine"), SEEN, proposed).decisions
    assert [(made.action, made.by) for made in both] == [("fossilize", "ada"), ("germinate", "ada")]
    assert both[0].reason == "approved by ada (fine): its interval lies above its rent"
    (second,) = decisions_of(wish("approve", number=2), SEEN, proposed).decisions
    assert second.arm == CONV
    with pytest.raises(NothingToShow, match="no proposal 3: there are 2"):
        decisions_of(wish("approve", number=3), SEEN, proposed)


def test_settings_ask_for_no_approval_unless_told():
    assert PolicySettings().approve is False
