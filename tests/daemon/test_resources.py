"""What jobs may take together: who is refused, who waits and for what, and what becomes of a job whose memory ran out."""

from __future__ import annotations

import msgspec
import pytest
from daemon_jobs import job

from esperd.config import Resources
from esperd.daemon import job_tables, worker_processes
from esperd.daemon.job_store import JobStore
from esperd.daemon.machine import Machine, Moment, measure, moment, oom_kills
from esperd.daemon.placement import allowance, need, never_fits, placed
from esperd.daemon.placing import Placing
from esperd.daemon.usage import Usage
from esperd.errors import NeverFits, OutOfMemory
from esperd.messages.control import Terminated
from esperd.messages.jobs import Job, JobError, JobState, Peak
from esperd.messages.telemetry import JobStateChanged
from esperd.store.database import Database
from esperd.testing import first_event, until

GIB = 1024**3
ROOM = Machine(memory_bytes=4 * GIB, cores=2.0)
STARVED = JobError(code=OutOfMemory.code, message="the worker held more than it may")


def waits_for(wanted, running, room):
    return placed(wanted, running, room).lacks


def asking(memory=0, threads=1, **resources):
    return msgspec.convert(
        {**msgspec.to_builtins(job(1)), "threads": threads, "resources": {"memory_bytes": memory, **resources}}, Job
    )


def test_limits_of_every_control_group_above_count(tmp_path):
    root = tmp_path / "cgroup"
    (root / "box" / "daemon").mkdir(parents=True)
    (root / "box" / "memory.max").write_text("1073741824\n")
    (root / "box" / "daemon" / "memory.max").write_text("max\n")
    (root / "box" / "daemon" / "cpu.max").write_text("50000 100000\n")
    (root / "box" / "daemon" / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    own, meminfo = tmp_path / "own", tmp_path / "meminfo"
    own.write_text("0::/box/daemon\n")
    meminfo.write_text("MemTotal:        8388608 kB\n")
    found = measure(root, own, meminfo)
    assert (found.memory_bytes, found.cores) == (GIB, 0.5)
    assert oom_kills(root, own) == 1
    assert measure(root, tmp_path / "none", meminfo).memory_bytes == 8 * GIB
    assert measure(root, tmp_path / "none", tmp_path / "none").memory_bytes is None
    assert oom_kills(root, tmp_path / "none") is None


def test_what_is_configured_counts_instead_of_what_was_measured():
    assert allowance(ROOM, Resources(memory_bytes=GIB)) == Machine(memory_bytes=GIB, cores=2.0)


def test_a_job_that_could_not_even_run_alone_is_told_of_what_it_takes_too_much():
    assert never_fits(need(asking(memory=3 * GIB, threads=2)), ROOM) == ""
    assert never_fits(need(asking(memory=5 * GIB)), ROOM).startswith("memory: it takes 5.00 GiB")
    assert never_fits(need(asking(threads=3)), ROOM).startswith("cores: it takes 3")


def test_a_job_waits_for_what_those_that_run_take_by_declaration_or_measurement():
    running = [need(asking(memory=3 * GIB))]
    assert waits_for(need(asking(memory=2 * GIB)), running, ROOM) == (
        "memory: it takes 2.00 GiB, 1 running jobs take 3.00 GiB of 4.00 GiB"
    )
    assert waits_for(need(asking(), peak_memory_bytes=2 * GIB), running, ROOM)
    assert waits_for(need(asking(threads=2)), running, ROOM).startswith("cores")
    assert waits_for(need(asking()), running, ROOM) == "", "what is not known is held against nobody"
    assert waits_for(need(asking(), peak_memory_bytes=9 * GIB), [], ROOM) == "", "alone it may try"


def test_beside_others_a_job_waits_for_memory_that_any_program_holds_and_for_load_where_that_is_looked_at():
    running, wanted = [need(asking(memory=GIB))], need(asking(memory=2 * GIB))
    short, busy = Moment(free_bytes=GIB), Moment(free_bytes=9 * GIB, load=3.5)
    assert placed(wanted, running, ROOM, short).lacks == (
        "memory: it takes 2.00 GiB, 1.00 GiB are free now, whoever holds the rest"
    )
    assert placed(need(asking()), running, ROOM, short).lacks == "", "what is not known is held against nobody"
    assert placed(wanted, [], ROOM, short).lacks == "", "alone it may try"
    assert placed(wanted, running, ROOM, busy).lacks == ""
    assert placed(wanted, running, ROOM, busy, max_load=3.5).lacks == "load: 3.50, and resources.max_load is 3.5"
    assert placed(wanted, running, ROOM, busy, max_load=4.0).lacks == ""
    assert placed(wanted, [], ROOM, busy, max_load=3.5).lacks == ""


def test_a_placing_looks_at_the_machine_each_time_and_the_machine_tells():
    moments = iter([Moment(free_bytes=GIB), Moment(free_bytes=3 * GIB)])
    placing = Placing(ROOM, lambda: 0.0, moment=lambda: next(moments))
    running = [need(asking(memory=GIB))]
    told = [placing.lacking("a", asking(memory=2 * GIB), Usage(), running, Resources()) for _ in range(2)]
    assert [bool(lacks) for lacks in told] == [True, False]
    now = moment()
    assert now.free_bytes is not None
    assert now.free_bytes > 0
    assert now.load is not None


def test_a_worker_that_the_daemon_killed_for_its_silence_was_not_out_of_memory(monkeypatch):
    def ended(reason, killed_before, killed):
        monkeypatch.setattr(worker_processes, "oom_kills", lambda: killed)
        gone = Terminated(actor="trainer/j1.1", generation=1, reason=reason, will_restart=False, status=-9)
        return worker_processes.out_of_memory(gone, killed_before)

    assert "the kernel killed" in ended("was killed by SIGKILL", 3, 4)
    assert ended("was killed by SIGKILL", 4, 4) == ""
    assert ended("was killed by SIGKILL", None, 4) == ""
    assert ended("was silent for 20 s and was killed", 3, 4) == ""


@pytest.mark.asyncio
async def test_a_job_out_of_memory_is_tried_in_smaller_pieces_where_it_allows_that_and_fails_where_it_does_not(tmp_path):
    async with Database.open(tmp_path / "jobs.db", job_tables.MIGRATIONS) as database:
        store = JobStore(database, lambda: 100.0)
        for key, allows in (("a", True), ("b", False)):
            submitted = await store.submit(asking(smaller_retry=allows), key)
            leased = await store.lease(1e6)
            assert leased.info.id == submitted.info.id
            info = await store.out_of_memory(leased.info.id, leased.generation, STARVED, Peak(memory_bytes=7 * GIB))
            assert info.peak == Peak(memory_bytes=7 * GIB)
            assert (info.state, info.pieces) == ((JobState.QUEUED, 2) if allows else (JobState.FAILED, 1))
            assert info.error == STARVED
            if allows:
                assert (await store.lease(1e6)).info.pieces == 2
        like = await store.submit(asking(), "c")
        expected = []
        assert await store.lease(1e6, lacking=lambda *asked: expected.append(asked) or "memory") is None
        assert expected[0][0] == like.info.id
        assert expected[0][2].peak_memory_bytes == 7 * GIB, "as a job like it took"


@pytest.mark.asyncio
async def test_a_job_over_its_limit_fails_by_name_one_that_does_not_fit_waits_and_one_that_never_will_is_refused(daemon):
    async with daemon.client() as esper:
        with pytest.raises(NeverFits, match="memory: it takes"):
            await esper.submit(job(resources={"memory_bytes": 2**60}))
        over = await esper.submit(job(resources={"memory_bytes": 10**8}))
        await first_event(over, JobStateChanged, lambda event: event.body.state is JobState.LEASED)
        waits = await esper.submit(job(resources={"memory_bytes": measure().memory_bytes - 10**7}))

        async def does_not_fit():
            return (await waits.info()).waits_for != ""

        await until(does_not_fit)
        (listed,) = [info for info in await esper.jobs() if info.id == waits.id]
        assert listed.state is JobState.QUEUED
        assert "1 running jobs take" in listed.waits_for
        await waits.cancel()
        failed = await over.wait()
        assert (failed.state, failed.error.code, failed.attempt) == (JobState.FAILED, OutOfMemory.code, 1)
