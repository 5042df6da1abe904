"""What became of tries is kept once, summed up, and given to later jobs: the same to a resumed one as before."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_requests import contribution, observation, observations, option, request, seed

from esperd.builtins import strategies, triggers
from esperd.errors import StoreFailed
from esperd.messages.evidence import ForgetEvidence, ListEvidence, Precedent, TriedSeed
from esperd.messages.growth import Stage
from esperd.messages.policy import Arm, Conclude, Decided, Decision, PolicySettings
from esperd.messages.reports import SeedOutcome
from esperd.plugins import Plugins
from esperd.policy.actor import PolicyActor
from esperd.policy.credit import observe
from esperd.policy.decision_log import MIGRATIONS
from esperd.policy.evidence import MOST_KEPT, EvidenceStore
from esperd.policy.evidence_rows import rows_of
from esperd.policy.precedents import HALF_LIFE_TRIES, MOST_PRIOR_TRIES, gain_of, precedents_of, prior_of, third_of
from esperd.policy.rent import rent
from esperd.policy.state import BanditState
from esperd.policy.tracking import Book, conclude, decode_book, follow, undone
from esperd.store.database import Database

some = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RENT = rent(100, 1000.0, observation(), PolicySettings())
ARM = Arm(slot="s1", blueprint="conv")
GERMINATE = Decided(decisions=(Decision(action="germinate", arm=ARM, reason="first"),), state=b"")
WAIT = Decided(decisions=(Decision(action="wait", reason="later"),), state=b"")


def followed(*pages):
    """The tries that were told over pages of (observation, answer)."""
    book, told = Book(), []
    for point, (seen, answer) in enumerate(pages, start=1):
        book, tried = follow(decode_book(book.encode(), "j"), request(seen, point=point), answer, at=7.0)
        told.extend(tried)
    return told


def tried(gain=0.1, *, job="j0", blueprint="conv", topology="cnn", depth=1 / 3, outcome="fossilized", gate_loss=0.5):
    return TriedSeed(
        job=job,
        seed="s1#1",
        slot="s1",
        blueprint=blueprint,
        topology=topology,
        depth=depth,
        width=1.0,
        outcome=outcome,
        contribution=contribution(gain * gate_loss),
        parameters=100,
        flops_per_sample=1000.0,
        reward=gain * gate_loss - RENT,
        rent=RENT,
        gate_loss=gate_loss,
        begun_epoch=3,
        ended_epoch=9,
        point=9,
        recorded_at=7.0,
    )


# --- from the question to the end -----------------------------------------------------------------------------------------


def test_a_try_is_told_once_when_it_ends_with_the_loss_that_it_began_with():
    born = seed("s1#1", stage=Stage.TRAINING)
    kept = msgspec.structs.replace(
        seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.05)), incubation_loss=0.4, gradient_ratio=0.7
    )
    (told,) = followed(
        (observation(gate_loss=0.6, epoch=3), GERMINATE),
        (observation(gate_loss=0.5, epoch=4, seeds=(born,)), WAIT),
        (observation(gate_loss=0.4, epoch=9, seeds=(kept,)), WAIT),
        (observation(gate_loss=0.3, epoch=10, seeds=(kept,)), WAIT),
    )

    assert (told.job, told.seed, told.slot, told.blueprint, told.topology) == ("j", "s1#1", "s1", "conv", "cnn")
    assert (told.outcome, told.gate_loss, told.begun_epoch, told.ended_epoch, told.point) == ("fossilized", 0.6, 3, 9, 3)
    assert (told.depth, told.width) == (pytest.approx(1 / 3), 0.25)
    assert told.contribution == contribution(0.05)
    assert (told.incubation_loss, told.gradient_ratio) == (0.4, 0.7)
    assert told.reward == pytest.approx(0.05 - RENT)
    assert gain_of(told) == pytest.approx(0.05 / 0.6)


def test_a_try_is_told_with_the_seconds_it_was_charged_for_as_its_arm_is_credited_with_them():
    """They are measured as the seed germinates: when it was asked for, nobody knew them."""
    policy, timed = PolicySettings(rent_seconds=0.1), (msgspec.structs.replace(option(), seconds_share=0.5),)
    kept = seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.2))
    pages = (
        (observation(), GERMINATE),
        (observation(options=timed, seeds=(seed("s1#1", stage=Stage.TRAINING),)), WAIT),
        (observation(options=timed, seeds=(kept,)), GERMINATE),
        (observation(options=timed, seeds=(kept,)), WAIT),
    )
    book, state, told = Book(), BanditState(), []
    for point, (seen, answer) in enumerate(pages, start=1):
        book, ended = follow(book, request(seen, point=point, policy=policy), answer, at=7.0)
        told.extend(ended)
        state = observe(state, seen, policy)
    (fossil, refused), price = told, RENT + 0.1 * 0.5
    assert (fossil.seconds_share, fossil.rent) == (0.5, price)
    assert [fossil.reward] == [entry.reward for entry in state.tries]
    assert (refused.outcome, refused.seconds_share, refused.reward) == ("refused", 0.5, -price)
    assert rows_of(told)[0].seconds_share == 0.5
    (untimed,) = followed((observation(), GERMINATE), (observation(), WAIT))
    assert (untimed.seconds_share, untimed.rent, rows_of([untimed])[0].seconds_share) == (None, RENT, None)
    older = msgspec.to_builtins(fossil)
    del older["seconds_share"]  # as an older esperd kept it
    assert msgspec.convert(older, TriedSeed) == msgspec.structs.replace(fossil, seconds_share=None)


def test_a_culled_seed_keeps_what_was_measured_of_it_and_earned_nothing():
    ended = seed("s1#1", stage=Stage.CULLED, measured=contribution(0.05))
    (told,) = followed((observation(), GERMINATE), (observation(seeds=(ended,)), WAIT))

    assert (told.outcome, told.contribution, told.reward) == ("culled", contribution(0.05), -RENT)
    assert gain_of(told) == 0.0


def test_a_living_seed_that_is_no_longer_reported_was_culled_and_is_told_as_it_was_last_seen():
    living = seed("s1#1", stage=Stage.PROBATIONARY, measured=contribution(0.02))
    (told,) = followed((observation(), GERMINATE), (observation(seeds=(living,)), WAIT), (observation(), WAIT))

    assert (told.outcome, told.contribution) == ("culled", contribution(0.02))


def test_a_germination_that_did_not_happen_was_refused_but_not_for_want_of_a_kernel():
    (told,) = followed((observation(), GERMINATE), (observation(), WAIT))
    assert (told.outcome, told.seed, told.reward, told.contribution) == ("refused", None, -RENT, None)

    assert followed((observation(), GERMINATE), (observation(unavailable=(ARM,)), WAIT)) == []
    asked = msgspec.structs.replace(GERMINATE, decisions=(msgspec.structs.replace(GERMINATE.decisions[0], by="ada"),))
    assert followed((observation(), asked), (observation(), WAIT)) == [], "what a person asked for says nothing of the arm"


def test_of_a_seed_that_a_rollback_brings_back_to_life_the_last_end_is_told_and_says_when_the_try_began():
    kept = seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.05))
    gone, back = seed("s1#1", stage=Stage.CULLED), seed("s1#1", stage=Stage.TRAINING)
    history = enumerate((back, kept, kept, back, gone, gone))
    first, last = followed(*((observation(seeds=(record,), epoch=epoch), WAIT) for epoch, record in history))

    assert (first.outcome, first.reward, first.ended_epoch) == ("fossilized", pytest.approx(0.05 - RENT), 1)
    assert (last.outcome, last.reward, last.ended_epoch, last.begun_epoch) == ("culled", -RENT, 4, 0)


def test_a_kept_seed_that_went_with_the_network_is_told_again_as_culled():
    """Kept at one point; before the next one training went back, and the seed was culled or had not germinated yet."""
    kept = seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.05))
    for after in ((seed("s1#1", stage=Stage.EMBARGOED),), ()):
        told = followed((observation(seeds=(kept,)), WAIT), (observation(seeds=after), WAIT), (observation(), WAIT))
        assert [(one.seed, one.outcome) for one in told] == [("s1#1", "fossilized"), ("s1#1", "culled")]


def test_candidates_of_a_screening_that_lost_it_were_culled_and_are_told_with_what_they_had_shown():
    screened = Decided(
        decisions=tuple(
            Decision(action="germinate", arm=Arm(slot=slot, blueprint="conv"), reason="x", screening="point 1")
            for slot in ("s1", "s2", "s3")
        ),
        state=b"",
    )
    options = tuple(option(slot) for slot in ("s1", "s2", "s3"))
    loser = msgspec.structs.replace(seed("s2#1", stage=Stage.CULLED, screening="point 1"), incubation_loss=0.4)
    after = observation(options=options, seeds=(seed("s1#0", stage=Stage.TRAINING),), screened_out=(loser,))
    told = {one.slot: one for one in followed((observation(options=options), screened), (after, WAIT), (after, WAIT))}

    assert (told["s2"].seed, told["s2"].outcome, told["s2"].incubation_loss, told["s2"].reward) == ("s2#1", "culled", 0.4, -RENT)
    assert (told["s3"].seed, told["s3"].outcome) == (None, "refused"), "it did not come to be screened"
    assert told.keys() == {"s2", "s3"}


@pytest.mark.parametrize(
    ("heard", "state"),
    [(1, b"never returned"), (None, b"answer 1"), (3, b"answer 2")],
    ids=["by its number", "by its state", "went back, and went on from an answer that is not the last"],
)
def test_a_germination_of_an_answer_that_was_not_heard_was_not_tried(heard, state):
    late = msgspec.structs.replace(GERMINATE, state=b"answer 2")
    book, _ = follow(Book(), request(observation(), point=1), msgspec.structs.replace(WAIT, state=b"answer 1"), at=7.0)
    book, _ = follow(book, request(observation(), point=2, heard=1), late, at=7.0)
    after, told = follow(book, request(observation(), point=4, heard=heard, state=state), WAIT, at=7.0)

    assert (told, after.asked) == ((), ())
    for said in ({"heard": 2, "state": b"anything"}, {"heard": None, "state": b"answer 2"}):
        _, (refused,) = follow(book, request(observation(), point=3, **said), WAIT, at=7.0)
        assert refused.outcome == "refused"


def test_an_answer_is_told_from_another_whose_state_is_the_same():
    """A plugin's strategy may keep no state at all."""
    book, _ = follow(Book(), request(observation(), point=1, heard=0), GERMINATE, at=7.0)
    assert follow(book, request(observation(), point=2, heard=0), WAIT, at=7.0)[1] == ()
    assert follow(book, request(observation(), point=2, heard=1), WAIT, at=7.0)[1] != ()


def test_a_point_that_is_answered_after_later_ones_changes_nothing_in_the_book():
    living = seed("s1#1", stage=Stage.TRAINING)
    book, _ = follow(Book(), request(observation(epoch=1), point=1), WAIT, at=7.0)
    book, _ = follow(book, request(observation(epoch=3), point=3), GERMINATE, at=7.0)
    book, _ = follow(book, request(observation(epoch=4, seeds=(living,)), point=4), WAIT, at=7.0)

    assert follow(book, request(observation(epoch=2), point=2), GERMINATE, at=8.0) == (book, ())


def test_a_name_that_a_resumed_job_gave_to_another_arm_is_another_seed():
    first = seed("s1#1", stage=Stage.CULLED)
    other = seed("s1#1", stage=Stage.CULLED, blueprint="gate")
    told = followed((observation(seeds=(first,)), WAIT), (observation(seeds=(other,)), WAIT))
    assert [(one.seed, one.blueprint) for one in told] == [("s1#1", "conv"), ("s1#1", "gate")]


def test_a_book_of_an_older_esperd_is_read_and_what_it_told_is_not_told_again():
    """It kept the names of seeds that ended, and neither the point nor the state of its last answer."""
    kept = seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.05))
    new, _ = follow(Book(), request(observation(seeds=(kept,))), GERMINATE, at=7.0)
    kept_then = {key: value for key, value in msgspec.to_builtins(new).items() if key in ("living", "asked", "ended")}
    old = decode_book(msgspec.msgpack.encode(kept_then), "j")
    assert (old.ended, old.over, old.point) == (("s1#1",), (), None)
    later = request(observation(seeds=(kept,)), point=4, heard=3)
    assert [one.outcome for one in follow(old, later, WAIT, at=7.0)[1]] == ["refused"], "of its last answer nobody knows more"
    back = request(observation(seeds=(seed("s1#1", stage=Stage.TRAINING),)), point=4)
    assert follow(old, back, WAIT, at=7.0)[0].ended == ()


def outcome(name, stage, measured=None):
    return SeedOutcome(
        seed=name,
        slot="s1",
        blueprint="conv",
        stage=stage,
        reason="",
        contribution=measured,
        parameters=100,
        flops_per_sample=1000.0,
        germinated_epoch=1,
        ended_epoch=9,
    )


@pytest.mark.parametrize("stage", [Stage.FOSSILIZED, Stage.CULLED])
def test_what_the_last_decision_ended_is_told_when_the_job_concludes_and_once(stage):
    living = msgspec.structs.replace(seed("s1#1", stage=Stage.PROBATIONARY), gradient_ratio=0.7)
    book, _ = follow(Book(), request(observation(seeds=(living,))), WAIT, at=7.0)
    ending = Conclude(job="j", point=9, epoch=9, seeds=(outcome("s1#1", stage, contribution(0.05)),))
    closed, (told,) = conclude(book, ending, at=8.0)

    assert (told.seed, told.outcome, told.contribution) == ("s1#1", stage.value, contribution(0.05))
    assert (told.gradient_ratio, told.ended_epoch, told.point) == (0.7, 9, 9)
    assert told.reward == pytest.approx(0.05 - RENT if stage is Stage.FOSSILIZED else -RENT)
    assert conclude(closed, ending, at=9.0) == (closed, ())


def test_what_ended_otherwise_than_was_told_is_told_again_when_the_job_concludes():
    kept = seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.05))
    book, (first,) = follow(Book(), request(observation(seeds=(kept,))), WAIT, at=7.0)
    same = Conclude(job="j", point=9, epoch=9, seeds=(outcome("s1#1", Stage.FOSSILIZED, contribution(0.05)),))
    taken_back = Conclude(job="j", point=9, epoch=9, seeds=(outcome("s1#1", Stage.CULLED),))

    assert (first.outcome, conclude(book, same, at=8.0)[1]) == ("fossilized", ())
    closed, (last,) = conclude(book, taken_back, at=8.0)
    assert (last.outcome, last.reward) == ("culled", -RENT)
    assert undone(book, closed, (last,)) == {"s1#1"}


def test_a_seed_that_came_and_went_since_the_last_answer_is_told_as_far_as_the_conclusion_knows_it():
    book, _ = follow(Book(), request(observation(epoch=1)), GERMINATE, at=7.0)
    ending = Conclude(job="j", point=9, epoch=9, seeds=(outcome("s1#1", Stage.CULLED),))
    _, (told,) = conclude(book, ending, at=8.0)

    assert (told.seed, told.outcome, told.incubation_loss, told.reward) == ("s1#1", "culled", None, -RENT)
    elsewhere = msgspec.structs.replace(ending.seeds[0], germinated_epoch=2)
    assert conclude(book, msgspec.structs.replace(ending, seeds=(elsewhere,)), at=8.0)[1] == (), "nobody asked for it then"


def test_what_still_lives_when_the_budget_ends_is_not_told_of():
    living = seed("s1#1", stage=Stage.PROBATIONARY)
    book, tried = follow(Book(), request(observation(seeds=(living,))), WAIT, at=7.0)

    assert (tried, conclude(book, Conclude(job="j", point=9, epoch=9, seeds=()), at=8.0)) == ((), (Book(point=9), ()))


@some
@given(st.lists(observations, min_size=1, max_size=6))
def test_of_every_seed_one_record_stands_at_most_and_none_of_one_that_lives_whatever_is_observed(history):
    book, standing = Book(), []
    for point, seen in enumerate(history, start=1):
        turned, told = follow(decode_book(book.encode(), "j"), request(seen, point=point), GERMINATE, at=7.0)
        void = undone(book, turned, told)
        standing = [name for name in standing if name not in void] + [one.seed for one in told if one.seed is not None]
        book = turned
        assert sorted(standing) == list(book.ended)
        assert not set(standing) & {entry.record.seed for entry in book.living}


# --- summing up ------------------------------------------------------------------------------------------------------------


def test_a_gain_is_a_share_of_the_loss_so_that_jobs_of_different_losses_compare():
    assert gain_of(tried(0.1, gate_loss=2.0)) == pytest.approx(gain_of(tried(0.1, gate_loss=0.02)))
    assert gain_of(tried(gate_loss=0.0)) is None
    assert gain_of(tried(gate_loss=float("nan"))) is None
    assert gain_of(msgspec.structs.replace(tried(), contribution=None)) is None


def test_a_try_counts_half_when_a_half_life_of_newer_ones_is_known():
    old, new = tried(0.3), [tried(0.0, outcome="culled")] * HALF_LIFE_TRIES
    (overall,) = [found for found in precedents_of([old, *new]) if found.third is None]
    alone = sum(0.5 ** (age / HALF_LIFE_TRIES) for age in range(HALF_LIFE_TRIES))

    assert overall.weight == pytest.approx(alone + 0.5)
    assert overall.gain == pytest.approx(0.5 * 0.3 / overall.weight)
    assert overall.kept == pytest.approx(0.5 / overall.weight)


def test_the_thirds_of_the_depth_share_the_age_of_the_whole():
    early, late = tried(0.2, depth=0.2), tried(0.4, depth=1.0)
    found = {entry.third: entry for entry in precedents_of([early, late])}

    assert set(found) == {None, 1, 3}
    assert found[1].weight == pytest.approx(0.5 ** (1 / HALF_LIFE_TRIES))
    assert (found[1].gain, found[3].gain) == (pytest.approx(0.2), pytest.approx(0.4))


@pytest.mark.parametrize("slots", range(1, 13))
def test_every_slot_lies_in_one_third_and_in_order(slots):
    thirds = [third_of((place + 1) / slots) for place in range(slots)]
    assert thirds == sorted(thirds)
    assert set(thirds) <= {1, 2, 3}
    if slots % 3 == 0:
        assert all(thirds.count(third) == slots // 3 for third in (1, 2, 3))


gains = st.floats(-0.5, 0.5)
tries = st.lists(
    st.builds(
        tried,
        gains,
        blueprint=st.sampled_from(["conv", "gate"]),
        topology=st.sampled_from(["cnn", "mlp", None]),
        depth=st.sampled_from([None, 0.1, 0.5, 1.0]),
        outcome=st.sampled_from(["fossilized", "culled", "refused"]),
        gate_loss=st.sampled_from([0.0, 0.5, 2.0]),
    ),
    max_size=30,
)


@some
@given(tries)
def test_precedents_lie_within_what_was_seen_and_their_parts_make_the_whole(known):
    found = precedents_of(known)
    assert len({(entry.blueprint, entry.topology, entry.third) for entry in found}) == len(found)
    for entry in found:
        assert 0.0 < entry.weight <= len(known)
        assert -0.5 - 1e-9 <= entry.gain <= 0.5 + 1e-9
        assert 0.0 <= entry.kept <= 1.0 + 1e-9
        assert 0.0 <= entry.spread <= 0.5 + 1e-9
        parts = [other for other in found if other.third is not None and other.blueprint == entry.blueprint]
        same = [other.weight for other in parts if other.topology == entry.topology]
        if entry.third is None:
            assert sum(same) <= entry.weight + 1e-9


# --- what a job expects ------------------------------------------------------------------------------------------------------


def precedent(gain=0.1, *, blueprint="conv", third=None, weight=5.0, spread=0.02, kept=0.5):
    return Precedent(blueprint=blueprint, topology="cnn", third=third, weight=weight, gain=gain, spread=spread, kept=kept)


def test_a_job_expects_the_share_of_its_own_loss_less_its_own_rent():
    prior = prior_of(option(), 0.004, observation(gate_loss=0.6), (precedent(0.1),))

    assert prior.mean == pytest.approx(0.1 * 0.6 - 0.004)
    assert prior.spread == pytest.approx(0.02 * 0.6)


def test_what_others_know_counts_like_few_tries_however_much_they_know():
    seen = observation()
    assert prior_of(option(), 0.0, seen, (precedent(weight=25.0),)).tries == MOST_PRIOR_TRIES
    assert prior_of(option(), 0.0, seen, (precedent(weight=0.7),)).tries == 0.7


def test_a_third_of_the_depth_speaks_the_louder_the_more_is_known_there():
    seen, overall = observation(gate_loss=1.0), precedent(0.0)
    means = [
        prior_of(option("s1"), 0.0, seen, (overall, precedent(0.3, third=1, weight=weight))).mean for weight in (0.5, 2.0, 20.0)
    ]

    assert means == sorted(means)
    assert 0.0 < means[0] < 0.1
    assert means[1] == pytest.approx(0.15)
    assert prior_of(option("s3"), 0.0, seen, (overall, precedent(0.3, third=1))).mean == 0.0


def test_other_blueprints_other_topologies_and_slots_nobody_described_say_nothing():
    other = msgspec.structs.replace(precedent(), topology="mlp")
    assert prior_of(option(), 0.0, observation(), (precedent(blueprint="gate"), other)) is None
    assert prior_of(option("s9"), 0.0, observation(), (precedent(),)) is None
    assert prior_of(option(), 0.0, observation(gate_loss=0.0), (precedent(),)) is None


# --- the actor ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugins():
    found = Plugins()
    found.add("builtins.strategies", strategies)
    found.add("builtins.triggers", triggers)
    return found


def asked(job, point, seen, *, memory=False):
    return msgspec.structs.replace(request(seen, policy=PolicySettings(strategy="ucb", memory=memory), point=point), job=job)


BORN = observation(options=(), seeds=(seed("s1#1", stage=Stage.TRAINING),))
KEPT = observation(options=(), seeds=(seed("s1#1", stage=Stage.FOSSILIZED, measured=contribution(0.06)),))


async def play(actor, job, *seen, memory=False):
    """Ask for decisions of a job, one after the other; returns the answers."""
    state, answers = b"", []
    for point, told in enumerate(seen, start=1):
        wanted = msgspec.structs.replace(asked(job, point, told, memory=memory), state=state)
        answers.append(await actor.handle(wanted))
        state = answers[-1].state
    return answers


@pytest.mark.asyncio
async def test_a_resumed_job_records_nothing_twice(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        replayed = await play(PolicyActor(database, plugins), "a", observation(), BORN, KEPT, KEPT)
        known = await EvidenceStore(database).tries()

    assert [answer.replayed for answer in replayed] == [True, True, True, False]
    assert [(one.job, one.seed, one.outcome) for one in known] == [("a", "s1#1", "fossilized")]


@pytest.mark.asyncio
async def test_the_last_seeds_of_a_job_are_recorded_when_it_concludes_also_when_it_says_so_twice(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN)
        ending = Conclude(job="a", point=2, epoch=9, seeds=(outcome("s1#1", Stage.FOSSILIZED, contribution(0.05)),))
        for _ in range(2):
            await actor.handle(ending)
        known = await EvidenceStore(database).tries()

    assert [(one.job, one.seed, one.outcome) for one in known] == [("a", "s1#1", "fossilized")]


@pytest.mark.asyncio
async def test_of_a_seed_whose_end_came_undone_the_last_one_stands_alone_and_none_while_it_lives(tmp_path, plugins):
    gone = observation(options=(), seeds=(seed("s1#1", stage=Stage.EMBARGOED),))
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor, store = PolicyActor(database, plugins), EvidenceStore(database)

        async def known(job, *seen):
            await play(actor, job, *seen)
            return [(one.outcome, one.point) for one in await store.tries(job=job)]

        assert await known("a", observation(), BORN, KEPT) == [("fossilized", 3)]
        assert await known("a", observation(), BORN, KEPT, BORN) == []
        assert await known("a", observation(), BORN, KEPT, BORN, gone) == [("culled", 5)]
        assert await known("b", observation(), BORN, KEPT, gone) == [("culled", 4)], "nobody saw it live again"
        await actor.handle(ForgetEvidence(blueprint="*"))
        assert await known("c", observation(), BORN, KEPT) == [("fossilized", 3)]
        ending = Conclude(job="c", point=3, epoch=9, seeds=(outcome("s1#1", Stage.CULLED),))
        await actor.handle(ending)
        assert [one.outcome for one in await store.tries(job="c")] == ["culled"]


@pytest.mark.asyncio
async def test_a_point_missed_before_a_crash_and_answered_after_it_records_nothing_false(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        first = await actor.handle(asked("a", 1, observation(epoch=1)))
        third = await actor.handle(msgspec.structs.replace(asked("a", 3, observation()), state=first.state))
        await actor.handle(msgspec.structs.replace(asked("a", 4, BORN), state=third.state))
        again = await actor.handle(msgspec.structs.replace(asked("a", 2, observation(epoch=2)), state=first.state))
        before = await EvidenceStore(database).tries()
        await actor.handle(msgspec.structs.replace(asked("a", 5, KEPT), state=third.state))
        known = await EvidenceStore(database).tries()

    assert (again.replayed, before) == (False, [])
    assert [(one.seed, one.outcome) for one in known] == [("s1#1", "fossilized")]


@pytest.mark.asyncio
async def test_what_became_of_tries_is_recorded_whether_or_not_the_job_asks_for_evidence(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        (row,) = (await actor.handle(ListEvidence())).rows

    assert (row.blueprint, row.topology, row.third, row.tries, row.kept, row.jobs) == ("conv", "cnn", 1, 1, 1, 1)
    assert (row.contribution, row.lower, row.upper) == pytest.approx((0.06, 0.059, 0.061))
    assert row.gain == pytest.approx(0.06 / 0.6)
    assert (row.parameters, row.flops_per_sample) == ((100, 100), (1000.0, 1000.0))


@pytest.mark.asyncio
async def test_a_job_is_given_what_others_learned_at_its_first_decision_and_the_same_ever_after(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        (first,) = await play(actor, "b", observation(), memory=True)
        await play(actor, "c", observation(), BORN, KEPT)
        later = await actor.handle(msgspec.structs.replace(asked("b", 2, BORN, memory=True), state=first.state))
        (other,) = await play(actor, "d", observation(), memory=True)
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        resumed = await PolicyActor(database, plugins).handle(asked("b", 3, BORN, memory=True))

    assert (first.evidence.tries, first.evidence.jobs, first.evidence.precedents) == (1, 1, 2)
    assert first.evidence == later.evidence == resumed.evidence
    assert "1.0 tries of other jobs, 100% of them kept" in first.decisions[-1].reason
    assert (other.evidence.tries, other.evidence.jobs) == (2, 2)
    assert other.evidence.sha256 != first.evidence.sha256


@pytest.mark.asyncio
async def test_without_memory_nothing_is_given(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        (answer,) = await play(actor, "b", observation())

    assert answer.evidence is None
    assert "never tried" in answer.decisions[-1].reason


@pytest.mark.asyncio
async def test_a_job_is_not_given_its_own_tries(tmp_path, plugins):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        answer = await actor.handle(asked("a", 4, observation(), memory=True))

    assert answer.evidence.tries == 0


@pytest.mark.asyncio
async def test_equal_evidence_has_an_equal_hash(tmp_path, plugins):
    told = []
    for name in ("one", "two"):
        async with Database.open(tmp_path / f"{name}.db", MIGRATIONS) as database:
            actor = PolicyActor(database, plugins)
            await play(actor, "a", observation(), BORN, KEPT)
            told.append((await play(actor, "b", observation(), memory=True))[0].evidence)
    assert told[0] == told[1]


@pytest.mark.asyncio
async def test_an_answer_that_comes_second_records_nothing(tmp_path):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        from esperd.policy.decision_log import DecisionLog

        log, written = DecisionLog(database), []
        for _ in range(2):
            await log.append(request(observation()), WAIT, beside=lambda *_: written.append(1))
    assert written == [1]


@pytest.mark.asyncio
async def test_of_each_blueprint_and_topology_the_newest_tries_are_kept(tmp_path):
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        store = EvidenceStore(database, clock=lambda: 7.0)

        def fill(connection):
            for point in range(1, MOST_KEPT + 11):
                for blueprint in ("conv", "gate") if point <= 5 else ("conv",):
                    germinated = Decided(
                        decisions=(Decision(action="germinate", arm=Arm(slot="s1", blueprint=blueprint), reason="x"),), state=b""
                    )
                    seen = observation(options=(option(blueprint=blueprint),), epoch=point)
                    told = msgspec.structs.replace(request(seen, point=point), job=f"{blueprint}{point}")
                    store.record(connection, told, germinated)
                    store.record(connection, told, WAIT)

        await database.write(fill)
        known = await store.tries()

    assert [one.begun_epoch for one in known if one.blueprint == "conv"] == list(range(11, MOST_KEPT + 11))
    assert sum(one.blueprint == "gate" for one in known) == 5


@pytest.mark.asyncio
async def test_evidence_is_listed_and_forgotten_by_pattern_and_what_was_given_stays(tmp_path, plugins):
    gate = observation(options=(option(blueprint="gate"),))
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        await play(actor, "b", gate, observation(options=()))
        (given,) = await play(actor, "c", observation(), memory=True)

        async def names(**wanted):
            return [row.blueprint for row in (await actor.handle(ListEvidence(**wanted))).rows]

        assert await names() == ["conv", "gate"]
        assert await names(blueprint="g*") == ["gate"]
        assert await names(job="a") == ["conv"]
        assert (await actor.handle(ForgetEvidence(blueprint="c*"))).tries == 1
        assert await names() == ["gate"]
        assert (await actor.handle(ForgetEvidence(blueprint="*"))).tries == 1
        assert await names() == []
        again = await actor.handle(asked("c", 2, observation(), memory=True))

    assert again.evidence == given.evidence


@pytest.mark.asyncio
@pytest.mark.parametrize("table", ["books", "tries", "snapshots"])
async def test_a_damaged_record_is_reported_and_nothing_is_decided(tmp_path, plugins, table):
    damage = {
        "books": "UPDATE books SET book = x'c1'",
        "tries": "UPDATE tries SET record = x'c1'",
        "snapshots": "INSERT INTO snapshots SELECT 'b', told, x'c1', 0.0 FROM snapshots",
    }
    async with Database.open(tmp_path / "state.db", MIGRATIONS) as database:
        actor = PolicyActor(database, plugins)
        await play(actor, "a", observation(), BORN, KEPT)
        await play(actor, "c", observation(), memory=True)
        await database.write(lambda connection: connection.execute(damage[table]).close())
        job, point = ("a", 4) if table == "books" else ("b", 1)
        with pytest.raises(StoreFailed):
            await actor.handle(asked(job, point, observation(), memory=True))
        assert await database.read("SELECT * FROM decisions WHERE job = ? AND point = ?", (job, point)) == []
