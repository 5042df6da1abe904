"""``esper evidence``: what is known of tries, and how it is forgotten."""

from __future__ import annotations

import contextlib
import io
import sys

import anyio.from_thread
import msgspec
import pytest
import synthetic_job
from scripted_daemon import EVIDENCE, ScriptedDaemon

from esperd.cli.client import esper
from esperd.cli.exit_codes import BAD_INPUT, run
from esperd.cli.lines import describe
from esperd.cli.listings import evidence_grid
from esperd.messages.evidence import EvidenceForgotten, EvidenceList, EvidenceSnapshot, ForgetEvidence, ListEvidence
from esperd.messages.telemetry import EvidenceGiven


@pytest.fixture
def daemon(tmp_path):
    return ScriptedDaemon(tmp_path)


def ran(daemon, *words):
    with contextlib.ExitStack() as stack:
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        stack.enter_context(portal.wrap_async_context_manager(daemon.running()))
        return run(esper, ["evidence", *words, "--endpoint", daemon.endpoint])


def sent(daemon, kind):
    return [message for message in daemon.asked if isinstance(message, kind)]


def answering(monkeypatch, said):
    """A terminal at which somebody sits."""
    terminal = io.StringIO(said)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)


def test_the_listing_tells_tries_contribution_and_price_and_what_is_unknown_is_no_zero(daemon, capsys):
    assert ran(daemon) == 0
    head, known, refused = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["blueprint", "topology", "depth", "tries"]
    for told in (
        "conv_residual",
        "cnn",
        "2 of 3",
        "+0.0312 [+0.0201, +0.0423]",
        "2.71%",
        "592 to 2,368",
        "73.7 kFLOP to 295 kFLOP",
    ):
        assert told in known
    assert refused.split()[1:3] == ["–", "–"]  # noqa: RUF001 - a dash, as tables write it


def test_the_time_of_seeds_is_told_where_a_job_measured_it():
    assert "time / host" not in evidence_grid(EVIDENCE).plain()
    known, refused = EVIDENCE.rows
    listed = EvidenceList(rows=(msgspec.structs.replace(known, seconds_share=0.125), refused))
    head, timed, untimed = evidence_grid(listed).plain().splitlines()
    assert "time / host" in head
    assert "12.5%" in timed
    assert "12.5%" not in untimed


def test_it_is_narrowed_by_blueprint_and_job_and_told_as_json(daemon, capsys):
    assert ran(daemon, "--blueprint", "conv*", "--job", synthetic_job.JOB_ID, "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=EvidenceList) == EVIDENCE
    assert sent(daemon, ListEvidence) == [ListEvidence(blueprint="conv*", job=synthetic_job.JOB_ID)]


@pytest.mark.parametrize(("words", "pattern"), [(["--forget"], "*"), (["--forget", "conv*"], "conv*")])
def test_with_yes_it_is_forgotten_without_a_question(daemon, capsys, words, pattern):
    assert ran(daemon, *words, "--yes", "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=EvidenceForgotten).tries == 9
    assert sent(daemon, ForgetEvidence) == [ForgetEvidence(blueprint=pattern)]


def test_where_nobody_can_be_asked_nothing_is_forgotten(daemon, capsys):
    assert ran(daemon, "--forget") == BAD_INPUT
    assert "9 tries of all blueprints would be forgotten for good; add --yes" in capsys.readouterr().err
    assert sent(daemon, ForgetEvidence) == []


def test_a_terminal_is_not_asked_where_a_program_reads_the_answer(daemon, monkeypatch, capsys):
    answering(monkeypatch, "y\n")
    assert ran(daemon, "--forget", "--json") == BAD_INPUT
    assert "--yes" in capsys.readouterr().err
    assert sent(daemon, ForgetEvidence) == []


@pytest.mark.parametrize(("said", "told", "asked"), [("y\n", "forgotten: 9 tries", 1), ("n\n", "nothing was forgotten", 0)])
def test_a_terminal_is_asked_and_obeyed(daemon, monkeypatch, capsys, said, told, asked):
    answering(monkeypatch, said)
    assert ran(daemon, "--forget", "conv*") == 0
    out, err = capsys.readouterr()
    assert out == f"{told}\n"
    assert "forget 9 tries of blueprints like 'conv*' for good?" in err
    assert len(sent(daemon, ForgetEvidence)) == asked


@pytest.mark.parametrize("words", [["--forget", "x", "--job", "j1"], ["--forget", "x", "--blueprint", "y"], ["--yes"]])
def test_options_that_do_not_go_together_are_refused_before_the_daemon_is_asked(daemon, capsys, words):
    assert ran(daemon, *words) == BAD_INPUT
    assert daemon.asked == []
    assert capsys.readouterr().err


def test_watching_a_job_tells_what_it_was_given(tmp_path):
    given = EvidenceSnapshot(sha256="ab" * 32, precedents=6, tries=40, jobs=3)
    (event,) = synthetic_job.numbered([EvidenceGiven(epoch=2, evidence=given)])
    assert describe(event) == "policy     decides with 40 tries of 3 other jobs, as 6 precedents (sha256 abababababab)"
