"""A job that failed says why, and is tried again from its last good checkpoint."""

from __future__ import annotations

import json
import shutil
import sqlite3

import msgspec
import pytest
from daemon_jobs import PROJECT, QUICK, job
from test_checkpoints import kept, running, written
from test_jobs_actor import office

from esperd.cli.client import esper as command
from esperd.cli.exit_codes import run
from esperd.daemon import job_tables
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.failure import analyse
from esperd.daemon.job_store import JobStore
from esperd.daemon.job_tables import MIGRATIONS
from esperd.errors import IllegalTransition, NothingToShow
from esperd.messages.control import Terminated
from esperd.messages.failures import AnalyseFailure, Attempt, RetryJob
from esperd.messages.jobs import (
    Job,
    JobError,
    JobInfo,
    JobState,
)
from esperd.messages.leases import JobBroken
from esperd.store.database import Database
from esperd.testing import running_daemon

JOB = msgspec.structs.replace(msgspec.convert(job(1), Job), workdir="/home/me/project")
STORY = """Traceback (most recent call last):
  File "/opt/esperd/trainer/run.py", line 10, in train
    self.step()
  File "/home/me/project/networks.py", line 7, in forward
    raise ValueError("no")
  File "/home/me/project/.venv/lib/python3.11/site-packages/torch/nn.py", line 9, in call
ValueError: no
"""


def info(error=None, state=JobState.DEAD, **changes):
    return JobInfo(id="j1", name="mine", state=state, attempt=3, submitted_at=1.0, job=JOB, error=error, **changes)


def attempt(number, error=None, ended="lost", **changes):
    return Attempt(number=number, leased_at=100.0 * number, ended_at=100.0 * number + 9, ended=ended, error=error, **changes)


KILLED = JobError(code="worker_failed", message="was killed by SIGKILL")
RAISED = JobError(code="job_failed", message="ValueError: no", traceback=STORY)


def test_a_failure_names_the_line_of_the_users_code_and_what_changed_since_it_worked():
    attempts = [
        attempt(1, ended="stopped", epoch=3, circumstances={"torch": "2.10", "code of networks": "aaa", "python": "3.11"}),
        attempt(2, RAISED, "failed", epoch=3, circumstances={"torch": "2.11", "code of networks": "bbb", "python": "3.11"}),
    ]
    found = analyse(info(RAISED, JobState.FAILED, epoch=3, checkpoint="c" * 64), attempts)
    assert (found.where.file, found.where.line, found.where.code) == ("/home/me/project/networks.py", 7, 'raise ValueError("no")')
    assert [frame.owner for frame in found.frames] == ["library", "yours", "library"]
    assert found.changed == (
        "code of networks: aaa in attempt 1, bbb in attempt 2",
        "torch: 2.10 in attempt 1, 2.11 in attempt 2",
    )
    assert (found.since, found.same_in_a_row, found.retry_from_epoch) == (200.0, 1, 3)
    assert found.advice[0] == "look at what changed: code of networks, torch"
    assert found.advice[-1] == "once that is mended: `esper retry j1` goes on from epoch 3"


def test_attempts_that_end_in_the_same_way_are_counted_and_those_that_ended_through_no_fault_say_nothing():
    attempts = [attempt(1, RAISED, "failed"), attempt(2, KILLED), attempt(3, ended="left"), attempt(4, KILLED)]
    found = analyse(info(KILLED), attempts)
    assert (found.since, found.same_in_a_row, found.where) == (200.0, 2, None)
    assert "ran out of memory" in found.advice[0]
    assert any("ended differently: suspect the machine" in advice for advice in found.advice)
    found = analyse(info(KILLED), attempts[1:])
    assert any("in the same way each time, before its first checkpoint" in advice for advice in found.advice)
    assert found.advice[-1].endswith("begins anew: there is no checkpoint")
    silent = [JobError(code="worker_failed", message=f"was silent for {seconds} s and was killed") for seconds in (20, 31)]
    found = analyse(info(silent[1]), [attempt(1, silent[0]), attempt(2, silent[1])])
    assert found.same_in_a_row == 2, "numbers in a message make no other error of it"


def test_of_a_job_that_did_not_fail_there_is_nothing_to_explain():
    with pytest.raises(NothingToShow, match="no attempt at it failed"):
        analyse(info(state=JobState.RUNNING), [attempt(1, ended=None)])


@pytest.mark.asyncio
async def test_a_dead_job_is_retried_with_all_its_attempts_from_the_last_checkpoint_that_verifies(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    async with office(tmp_path) as here:
        job_id = await running(here)
        first = await written(here, checkpoints, job_id, b"one", epoch=1)
        second = await written(here, checkpoints, job_id, b"two", epoch=2)
        for number in range(1, QUICK.jobs.max_attempts + 1):
            worker = f"trainer/{job_id}.{number}"
            assert (await here.leased(job_id, number)).told[0].checkpoint == (None if number == 1 else second)
            await here.system.tell(
                "jobs", Terminated(actor=worker, generation=1, reason="was killed", will_restart=False, status=-9)
            )
        await here.becomes(job_id, JobState.DEAD)
        assert kept(checkpoints, job_id) == sorted([first, second])
        checkpoints.of(job_id).path(second).write_bytes(b"tow")
        assert (await here.ask(RetryJob(id=job_id))).state is JobState.QUEUED
        worker = await here.leased(job_id, QUICK.jobs.max_attempts + 1)
        assert worker.told[0].checkpoint == first
        with pytest.raises(IllegalTransition, match="cannot retry a job that is leased"):
            await here.ask(RetryJob(id=job_id))
        found = await here.ask(AnalyseFailure(id=job_id))
        assert (found.same_in_a_row, len(found.attempts)) == (QUICK.jobs.max_attempts, QUICK.jobs.max_attempts + 1)
        assert f"checkpoint {second} of epoch 2 did not verify: the job goes on from epoch 1" in found.attempts[-1].note
        checkpoints.of(job_id).path(first).unlink()
        last = QUICK.jobs.max_attempts + 1
        broken = JobError(code="error", message="no")
        await here.ask(JobBroken(job_id=job_id, generation=last, error=broken))
        await here.ask(RetryJob(id=job_id))
        await here.system.tell("jobs", Terminated(actor=f"trainer/{job_id}.{last}", generation=1, reason="", will_restart=False))
        assert (await here.leased(job_id, last + 1)).told[0].checkpoint is None  # it begins anew rather than not at all


@pytest.mark.asyncio
async def test_jobs_of_an_older_state_directory_are_kept_when_it_is_upgraded(tmp_path):
    payload = msgspec.msgpack.encode(JOB)
    with sqlite3.connect(tmp_path / "jobs.db") as old:
        old.executescript(MIGRATIONS[0])
        old.execute("PRAGMA user_version = 1")
        old.execute(
            "INSERT INTO jobs (id, idempotency_key, payload_sha256, payload, name, state, generation, lost, resumed,"
            " submitted_at, epoch, checkpoint) VALUES ('j1', 'k', 's', ?, 'mine', 'running', 1, 0, 0, 5.0, 4, ?)",
            (payload, "c" * 64),
        )
    old.close()
    async with Database.open(tmp_path / "jobs.db", job_tables.MIGRATIONS) as database:
        store = JobStore(database, lambda: 9.0)
        (recovered,) = await store.recover()
        assert (recovered.job, recovered.checkpoint, recovered.epoch) == (JOB, "c" * 64, 4)
        assert (await store.lease(10.0)).generation == 2
        assert [attempt.number for attempt in await store.attempts("j1")] == [2]


def test_a_job_whose_code_raises_is_explained_mended_and_retried_from_where_it_stood(tmp_path, capsys):
    project = tmp_path / "project"
    shutil.copytree(PROJECT, project)
    mended = (project / "networks.py").read_text()
    (project / "networks.py").write_text(mended + "\n\nraise ValueError('not yet')\n")
    with running_daemon(tmp_path / "state", QUICK) as daemon, daemon.sync_client() as esper:
        handle = esper.submit(job(2, workdir=str(project)))
        assert handle.wait().state is JobState.FAILED
        where = ["--endpoint", daemon.endpoint]
        assert run(command, ["explain-failure", handle.id, *where]) == 0
        told = capsys.readouterr().out
        assert "not yet" in told
        assert f"where: {project}/networks.py:" in told
        (project / "networks.py").write_text(mended)
        assert run(command, ["retry", handle.id, *where]) == 0
        assert handle.wait().state is JobState.SUCCEEDED
        assert run(command, ["explain-failure", handle.id, "--json", *where]) == 0
        attempts = json.loads(capsys.readouterr().out.splitlines()[-1])["attempts"]
        assert [attempt["ended"] for attempt in attempts] == ["failed", "succeeded"]
        assert "code of networks" in attempts[-1]["circumstances"]
        assert run(command, ["retry", handle.id, *where]) == 5
