"""``esper decide`` and ``esper explain``: what a person says, and what a person is shown."""

from __future__ import annotations

import anyio.from_thread
import msgspec
import pytest
import synthetic_job
from policy_requests import contested, contribution, observation, option, request, seed
from scripted_daemon import ScriptedDaemon

from esperd.builtins.strategies import STRATEGIES
from esperd.cli.client import esper
from esperd.cli.exit_codes import run
from esperd.cli.explained import Explained, outcome_cell, points_of
from esperd.cli.lines import describe
from esperd.client import user_name
from esperd.declarations import resolve
from esperd.messages.growth import Stage
from esperd.messages.overruling import LoggedDecision, Overrule, Overruled, ProposalList, ReplayedPoint
from esperd.messages.policy import Arm, ArmTrial, Decision, PolicySettings
from esperd.messages.telemetry import ArmTried, DecisionMade, PolicyUnavailable, StageChanged
from esperd.policy.overruling import proposals, withhold

ID = synthetic_job.JOB_ID
UCB = resolve(next(strategy.decide for strategy in STRATEGIES if strategy.name == "ucb"))
ASKED = request(
    observation(
        seeds=(seed("s3#0", stage=Stage.PROBATIONARY, measured=contribution(0.25)),),
        options=(option("s1", "conv"), option("s2", "gate"), option("s3", "conv", available=False)),
        rolled_back=("the loss was not finite; the network went back to epoch 4",),
    ),
    point=2,
)
ANSWER = UCB(ASKED)
POINT = LoggedDecision(point=2, decided_at=0.0, request=ASKED, answer=ANSWER, said=())
JUDGED, GROWN = ANSWER.decisions


def changed(name, before, after, epoch, reason):
    return StageChanged(
        epoch=epoch, seed=name, slot=name[:2], blueprint=GROWN.arm.blueprint, before=before, after=after, reason=reason
    )


def made(decision, point, refusal=""):
    return DecisionMade(epoch=point + 3, decision=decision, applied=not refusal, refusal=refusal, point=point)


WAITED = Decision(action="wait", reason="warming up: 1 of 2 epochs")
NEW = f"{GROWN.arm.slot}#1"
EVENTS = synthetic_job.numbered(
    [
        made(WAITED, 0),
        made(WAITED, 1),
        made(JUDGED, 2, refusal="G5: the interval's lower end lies below 0.3"),
        changed(NEW, Stage.DORMANT, Stage.GERMINATED, 5, "it fits"),
        made(GROWN, 2),
        changed(NEW, Stage.TRAINING, Stage.CULLED, 6, "G2: gradient ratio 0.01 is below 0.05"),
        made(Decision(action="cull", seed="s3#0", reason="ada said so", by="ada"), 3),
    ]
)


@pytest.fixture
def daemon(tmp_path):
    return ScriptedDaemon(tmp_path, log=EVENTS, decisions={2: POINT})


def ran(daemon, *words):
    with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(daemon.running()):
        return run(esper, [*words, "--endpoint", daemon.endpoint])


def wishes(daemon):
    return [message for message in daemon.asked if isinstance(message, Overrule)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["grow", "s2", "gate"], "germinate gate at s2"),
        (["cull", "s3#0"], "cull s3#0"),
        (["keep", "s3#0"], "fossilize s3#0"),
        (["wait"], "wait"),
    ],
)
def test_a_word_is_handed_to_the_daemon_with_the_users_name_and_reason(daemon, capsys, words, told):
    assert ran(daemon, "decide", ID, *words, "--reason", "to see") == 0
    (said,) = wishes(daemon)
    assert (said.wish, said.by, said.reason) == (words[0], user_name(), "to see")
    assert capsys.readouterr().out == f"at the next decision point of {ID}: {told}\n"


def test_what_may_stand_in_the_way_is_said(daemon, capsys):
    assert ran(daemon, "decide", ID, "grow", "s3", "conv") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "note: after epoch 5 it could not be grown: the slot is taken"


def test_a_word_can_be_approval_of_one_proposal_or_of_all(daemon, capsys):
    daemon.decisions = {2: msgspec.structs.replace(POINT, answer=withhold(ANSWER))}
    assert ran(daemon, "decide", ID, "approve") == 0
    assert ran(daemon, "decide", ID, "approve", "1", "--json") == 0
    assert [said.number for said in wishes(daemon)] == [None, 1]
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    (decision,) = msgspec.json.decode(out[2], type=Overruled).decisions
    assert decision.reason.startswith(f"approved by {user_name()}: ")


@pytest.mark.parametrize(
    "words",
    [["grow"], ["grow", "s1"], ["keep"], ["cull", "a", "b"], ["wait", "long"], ["approve", "0"], ["approve", "x"], ["shrink"]],
)
def test_words_that_say_nothing_are_a_usage_error(daemon, capsys, words):
    assert ran(daemon, "decide", ID, *words) == 2
    assert "say one of: grow SLOT BLUEPRINT" in capsys.readouterr().err
    assert not daemon.asked


def test_a_reason_alone_is_a_usage_error(daemon, capsys):
    assert ran(daemon, "decide", ID, "--reason", "just so") == 2
    assert "--reason belongs to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["decide", ID, "grow", "s9", "gate"], 2, "no slot 's9'"),
        (["decide", ID, "cull", "s3#9"], 2, "no seed 's3#9'"),
        (["decide", "nobody", "wait"], 4, "there is no job 'nobody'"),
        (["explain", "nobody"], 4, "there is no job 'nobody'"),
        (["explain", ID, "7"], 4, "no decision point 7"),
        (["explain", ID, "2", "--replay"], 2, "leave POINT out"),
    ],
)
def test_what_does_not_exist_is_a_typed_error(daemon, capsys, words, status, message):
    assert ran(daemon, *words) == status
    assert message in capsys.readouterr().err


def test_without_words_proposals_and_what_was_said_are_listed(daemon, capsys):
    daemon.approve = True
    said = Decision(action="cull", seed="s3#0", reason="ada said so", by="ada")
    daemon.proposals = ProposalList(point=2, proposals=proposals(withhold(ANSWER)), said=(said,))
    assert ran(daemon, "decide", ID) == 0
    out = capsys.readouterr().out
    assert "1  fossilize s3#0" in out
    assert f"2  germinate {GROWN.arm.blueprint} at {GROWN.arm.slot}" in out
    assert "never tried" in out
    assert "Said for the next decision point" in out
    assert ran(daemon, "decide", ID, "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=ProposalList) == daemon.proposals


def test_where_nothing_is_proposed_it_is_said_why(daemon, capsys):
    assert ran(daemon, "decide", ID) == 0
    assert "decides by itself (policy.approve = false)" in capsys.readouterr().out


def test_submitting_with_approve_asks_for_approval(daemon, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('host = "cnn"\ndata = "digits"\n[budget]\nepochs = 2\n')
    assert ran(daemon, "submit", str(file), "--approve") == 0
    (submitted,) = [message for message in daemon.asked if hasattr(message, "idempotency_key")]
    assert submitted.job.policy.approve is True


def test_decision_points_are_listed_with_who_decided_and_what_came_of_it(daemon, capsys):
    assert ran(daemon, "explain", ID) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows[1] == ["0-1", "3-4", "wait", "–", PolicySettings().strategy]  # noqa: RUF001 - the dash of what is unknown
    assert rows[2][:4] == ["2", "5", "fossilize s3#0", f"{JUDGED.score:.4f}"]
    assert rows[2][5].startswith("refused: G5")
    assert "applied" in rows[4]
    assert ["3", "6", "cull s3#0", "–", "ada", "applied"] in rows  # noqa: RUF001 - as above


def test_a_point_that_a_resumed_job_came_back_to_is_listed_once(daemon):
    again = synthetic_job.numbered([*(event.body for event in EVENTS), made(JUDGED, 2), made(GROWN, 2)])
    points = points_of(again)
    assert [point.point for point in points] == [0, 1, 2, 3]
    assert [told.applied for told in points[2].made] == [True, True]


def test_where_the_policy_decided_nothing_the_list_says_so_and_why(daemon, capsys):
    failed = PolicyUnavailable(epoch=7, reason="handler_failed: strategy 'mine' raised KeyError at point 7: 'x'")
    daemon.log = synthetic_job.numbered([failed, failed])
    assert ran(daemon, "explain", ID) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "After 2 epochs the policy decided nothing; after epoch 7: handler_failed: strategy 'mine' raised KeyError" in words
    daemon.log = synthetic_job.numbered([made(WAITED, 0), failed])
    assert ran(daemon, "explain", ID) == 0
    assert "After 1 epoch the policy decided nothing" in " ".join(capsys.readouterr().out.split())


def test_proposals_are_seen_in_the_list(daemon, capsys):
    daemon.log = synthetic_job.numbered([made(decision, 2) for decision in withhold(ANSWER).decisions])
    assert ran(daemon, "explain", ID) == 0
    out = capsys.readouterr().out
    assert "propose to fossilize s3#0" in out
    assert out.count("awaits approval") == 2


def test_a_point_is_explained_with_reasons_numbers_alternatives_and_what_became_of_it(daemon, capsys):
    assert ran(daemon, "explain", ID, "2") == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert f"point 2 of {ID}, after epoch 5 (20% of the budget, 40.0 epochs left): decided by ucb" in words
    assert "train loss 0.5000, gate loss 0.6000 (-0.1000), accuracy 80.00 %" in words
    assert "rolled back: the loss was not finite" in words
    assert "+0.2500 [+0.2490, +0.2510]" in words
    assert "refused: G5:" in words
    assert f"{NEW} is culled: G2:" in words
    for arm in (Arm(slot="s1", blueprint="conv"), Arm(slot="s2", blueprint="gate")):
        assert any(line.split()[:2] == [arm.slot, arm.blueprint] for line in out.splitlines())
    assert "1 more arm could not be grown: the slot is taken." in words


def test_the_rent_that_is_shown_charges_for_seconds(daemon):
    timed = tuple(msgspec.structs.replace(made, seconds_share=0.5) for made in (option("s1", "conv"), option("s3", "conv")))
    settings = PolicySettings(strategy="ucb", rent_parameters=0.0, rent_flops=0.0, rent_seconds=0.1)
    asked = request(msgspec.structs.replace(ASKED.observation, options=timed), policy=settings, point=2)
    point = LoggedDecision(point=2, decided_at=0.0, request=asked, answer=UCB(asked), said=())
    grids = {grid.title: grid for grid in Explained(daemon.info(), point, EVENTS).grids()}
    for title, rows in (("Seeds", 1), ("Arms", 2)):
        place = [column.title for column in grids[title].columns].index("rent")
        assert [row[place] for row in grids[title].rows] == ["0.0500"] * rows


def test_a_point_that_only_measured_says_so_and_a_contest_is_told_arm_by_arm():
    arm = Arm(slot="s1", blueprint="conv")
    assert "measured" in outcome_cell(Decision(action="gauge", arm=arm, batches=4, reason="not known"), None).text
    assert "not told" in outcome_cell(GROWN, None).text
    tried = ArmTrial(arm=arm, epochs=0.5, trial=contested(0.02), epoch=3)
    out = ArmTrial(arm=arm, epochs=0.5, trial=None, epoch=3, why_not="G1: it has no parameters")
    won, lost = (describe(event) for event in synthetic_job.numbered([ArmTried(epoch=3, tried=found) for found in (tried, out)]))
    assert "conv at s1 brought +0.0200 [+0.0190, +0.0210] over growing nothing, after 0.5 epochs" in won
    assert "conv at s1 did not compete: G1: it has no parameters" in lost


def test_what_an_older_esperd_logged_is_explained_as_far_as_it_is_known(daemon, capsys):
    daemon.decisions = {2: msgspec.structs.replace(POINT, request=None)}
    assert ran(daemon, "explain", ID, "2") == 0
    assert "was not kept" in capsys.readouterr().out


def test_explanations_are_read_by_programs_too(daemon, capsys):
    assert ran(daemon, "explain", ID, "--json") == 0
    assert [point["point"] for point in msgspec.json.decode(capsys.readouterr().out)["points"]] == [0, 1, 2, 3]
    assert ran(daemon, "explain", ID, "2", "--json") == 0
    document = msgspec.json.decode(capsys.readouterr().out)
    assert document["request"]["observation"]["gate_loss"] == 0.6
    assert [outcome["applied"] for outcome in document["outcomes"]] == [False, True]
    assert document["outcomes"][1]["seed"] == NEW


def test_a_replay_says_which_points_differ_and_fails_when_one_does(daemon, capsys):
    daemon.replayed = tuple(ReplayedPoint(point=number, same=True) for number in (1, 2, 3))
    assert ran(daemon, "explain", ID, "--replay") == 0
    assert capsys.readouterr().out == "3 of 3 decision points come out the same, byte for byte\n"
    daemon.replayed = (*daemon.replayed, ReplayedPoint(point=4, same=False, difference="decision 1 was 'wait'"))
    assert ran(daemon, "explain", ID, "--replay") == 1
    out = capsys.readouterr().out
    assert "differs  decision 1 was 'wait'" in out
    assert "3 of 4 decision points" in out
    assert ran(daemon, "explain", ID, "--replay", "--json") == 1
    assert [found["same"] for found in msgspec.json.decode(capsys.readouterr().out)["points"]] == [True, True, True, False]
