from __future__ import annotations

import anyio.from_thread
import msgspec
import pytest
import synthetic_job
from scripted_daemon import ACTORS, EVIDENCE, KERNELS, PLUGINS, ScriptedDaemon

from esperd import client as client_module
from esperd.client import Client, default_endpoint
from esperd.config import load_config
from esperd.errors import (
    Conflict,
    DaemonUnreachable,
    InvalidJob,
    JobNotFound,
    MalformedMessage,
    NothingToShow,
    ProtocolMismatch,
    StoreFailed,
)
from esperd.messages.card import MARK
from esperd.messages.evidence import ListEvidence
from esperd.messages.jobs import Budget, CancelJob, Job, JobState, PauseJob, ResumeJob, SubmitJob
from esperd.messages.telemetry import GetEvents
from esperd.sync_client import SyncClient

JOB = Job(host="cnn", data="digits", budget=Budget(epochs=2))
EVENTS = synthetic_job.events()


@pytest.fixture
def daemon(tmp_path):
    return ScriptedDaemon(tmp_path)


def sequences(events):
    return [event.sequence for event in events]


@pytest.mark.asyncio
async def test_without_a_daemon_the_error_says_how_to_start_one(tmp_path):
    with pytest.raises(DaemonUnreachable, match="esperd run"):
        async with Client(f"ipc://{tmp_path}/control.sock"):
            pass


@pytest.mark.asyncio
async def test_a_daemon_of_another_protocol_is_refused(daemon):
    daemon.protocol = 99
    async with daemon.running():
        with pytest.raises(ProtocolMismatch, match="99"):
            async with Client(daemon.endpoint):
                pass


def test_the_endpoint_comes_from_the_environment_else_from_the_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("ESPERD_ENDPOINT", "ipc:///somewhere/control.sock")
    assert default_endpoint() == "ipc:///somewhere/control.sock"
    monkeypatch.delenv("ESPERD_ENDPOINT")
    monkeypatch.setenv("ESPERD__DAEMON__STATE_DIRECTORY", str(tmp_path))
    assert default_endpoint() == f"ipc://{load_config().runtime_directory}/control.sock"


@pytest.mark.asyncio
async def test_a_submitted_job_carries_an_absolute_workdir_and_a_fresh_key(daemon, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with daemon.running(), Client(daemon.endpoint) as esper:
        handle = await esper.submit(JOB)
        await esper.submit(JOB)
    assert handle.id == synthetic_job.JOB_ID
    sent = [message for message in daemon.asked if isinstance(message, SubmitJob)]
    assert sent[0].job.workdir == str(tmp_path)
    assert sent[0].idempotency_key != sent[1].idempotency_key


@pytest.mark.asyncio
async def test_the_same_key_finds_the_first_job_and_refuses_another(daemon):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        await esper.submit(JOB, idempotency_key="k")
        assert (await esper.submit(JOB, idempotency_key="k")).duplicate
        with pytest.raises(Conflict):
            await esper.submit(msgspec.structs.replace(JOB, rng_seed=7), idempotency_key="k")


@pytest.mark.asyncio
async def test_a_job_is_submitted_from_a_file_or_from_plain_tables(daemon, tmp_path):
    file = tmp_path / "job.toml"
    file.write_text('host = "cnn"\ndata = "digits"\n[budget]\nepochs = 2\n')
    async with daemon.running(), Client(daemon.endpoint) as esper:
        await esper.submit(file)
        await esper.submit({"host": "cnn", "data": "digits", "budget": {"epochs": 2}})
    from_file, from_tables = (message.job for message in daemon.asked if isinstance(message, SubmitJob))
    assert from_file.workdir == str(tmp_path)
    assert msgspec.structs.replace(from_tables, workdir="x") == msgspec.structs.replace(from_file, workdir="x")


@pytest.mark.asyncio
async def test_a_job_that_cannot_be_is_refused_before_it_is_sent(daemon, tmp_path):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        with pytest.raises(InvalidJob, match="sets no end"):
            await esper.submit(msgspec.structs.replace(JOB, budget=Budget()))
        with pytest.raises(InvalidJob, match="is not a directory"):
            await esper.submit(msgspec.structs.replace(JOB, workdir=str(tmp_path / "absent")))
    assert not any(isinstance(message, SubmitJob) for message in daemon.asked)


@pytest.mark.asyncio
async def test_listings_come_back_as_the_daemon_sent_them(daemon):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        assert await esper.actors() == ACTORS
        assert await esper.kernels() == KERNELS
        assert await esper.plugins() == PLUGINS
        assert await esper.evidence("conv*", synthetic_job.JOB_ID) == EVIDENCE
        assert daemon.asked[-1] == ListEvidence(blueprint="conv*", job=synthetic_job.JOB_ID)
        assert await esper.forget_evidence("conv*") == 9
        assert await esper.jobs() == (daemon.info(),)


@pytest.mark.asyncio
async def test_pause_resume_and_cancel_reach_the_daemon(daemon):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        await job.pause()
        await job.resume()
        await job.cancel()
    assert [type(message) for message in daemon.asked[-3:]] == [PauseJob, ResumeJob, CancelJob]


@pytest.mark.asyncio
async def test_a_job_that_does_not_exist_is_an_error_in_every_method(daemon):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        with pytest.raises(JobNotFound):
            await esper.job("absent").info()
        with pytest.raises(JobNotFound):
            await anext(esper.job("absent").watch())


@pytest.mark.asyncio
async def test_watching_a_finished_job_reads_its_whole_log_in_order(daemon):
    daemon.log = EVENTS
    daemon.state = JobState.SUCCEEDED
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        assert [event async for event in job.watch()] == EVENTS
        assert sequences([event async for event in job.watch(after=len(EVENTS) - 2)]) == sequences(EVENTS[-2:])
        assert await job.events(after=len(EVENTS) - 1) == tuple(EVENTS[-1:])


@pytest.mark.asyncio
async def test_what_is_published_while_history_is_read_is_seen_exactly_once(daemon):
    daemon.log = EVENTS[:30]
    async with daemon.running(), Client(daemon.endpoint) as esper:
        events = esper.job(synthetic_job.JOB_ID).watch()
        seen = [await anext(events)]
        daemon.log = EVENTS
        await daemon.publish(EVENTS[25:])
        seen += [event async for event in events]
    assert seen == EVENTS


@pytest.mark.asyncio
async def test_a_hole_in_what_is_published_is_filled_from_the_log(daemon):
    daemon.log = EVENTS[:10]
    async with daemon.running(), Client(daemon.endpoint) as esper:
        events = esper.job(synthetic_job.JOB_ID).watch()
        seen = [await anext(events) for _ in range(10)]
        daemon.log = EVENTS
        await daemon.publish(EVENTS[20:21])
        seen += [event async for event in events]
    assert seen == EVENTS


@pytest.mark.asyncio
async def test_a_lost_final_event_does_not_hang_the_watcher(daemon, monkeypatch):
    monkeypatch.setattr(client_module, "POLL_INTERVAL_S", 0.05)
    daemon.log = EVENTS[:-1]
    async with daemon.running(), Client(daemon.endpoint) as esper:
        events = esper.job(synthetic_job.JOB_ID).watch()
        seen = [await anext(events) for _ in EVENTS[:-1]]
        daemon.state = JobState.SUCCEEDED
        seen += [event async for event in events]
    assert seen == EVENTS[:-1]


@pytest.mark.asyncio
async def test_a_final_event_that_was_logged_but_never_published_ends_the_watch(daemon, monkeypatch):
    monkeypatch.setattr(client_module, "POLL_INTERVAL_S", 0.05)
    daemon.log = EVENTS[:5]
    async with daemon.running(), Client(daemon.endpoint) as esper:
        events = esper.job(synthetic_job.JOB_ID).watch()
        seen = [await anext(events) for _ in range(5)]
        daemon.log = EVENTS
        seen += [event async for event in events]
    assert seen == EVENTS


@pytest.mark.asyncio
async def test_a_watcher_that_stops_early_leaves_a_working_client(daemon):
    daemon.log = EVENTS
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        async for event in job.watch():
            if event.sequence == 3:
                break
        assert (await job.info()).id == synthetic_job.JOB_ID


@pytest.mark.asyncio
async def test_a_publication_that_is_no_event_is_a_typed_error(daemon):
    daemon.log = EVENTS[:1]
    async with daemon.running(), Client(daemon.endpoint) as esper:
        events = esper.job(synthetic_job.JOB_ID).watch()
        await anext(events)
        await daemon.publisher.publish(f"job/{synthetic_job.JOB_ID}", b"\xc1")
        with pytest.raises(MalformedMessage, match="is not an event"):
            await anext(events)


@pytest.mark.asyncio
async def test_wait_returns_the_job_once_it_is_over(daemon):
    daemon.log = EVENTS
    daemon.state = JobState.SUCCEEDED
    async with daemon.running(), Client(daemon.endpoint) as esper:
        assert (await esper.job(synthetic_job.JOB_ID).wait()).state is JobState.SUCCEEDED
    assert any(isinstance(message, GetEvents) for message in daemon.asked)


@pytest.mark.asyncio
async def test_artifacts_are_fetched_in_chunks_and_exported_whole(daemon, tmp_path):
    daemon.artifacts = {
        "model.safetensors": bytes(range(256)) * 11,
        "growth.json": b"{}",
        "report.json": msgspec.json.encode(synthetic_job.REPORT),
    }
    target = tmp_path / "new" / "model"
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        assert await job.fetch("model.safetensors") == daemon.artifacts["model.safetensors"]
        assert await job.report() == synthetic_job.REPORT
        written = await job.export(target)
        with pytest.raises(NothingToShow, match=r"left no absent\.bin; there are: model\.safetensors"):
            await job.fetch("absent.bin")
    assert sorted(path.name for path in target.iterdir()) == sorted(daemon.artifacts)
    assert {path.name: path.read_bytes() for path in written} == daemon.artifacts


@pytest.mark.asyncio
async def test_a_card_replaces_a_card_and_no_readme_of_the_users(daemon, tmp_path):
    daemon.artifacts = {"growth.json": b"{}", "README.md": f"{MARK}\n# new".encode()}
    yours, ours = tmp_path / "yours", tmp_path / "ours"
    for directory, before in ((yours, "# My project"), (ours, f"{MARK}\n# old")):
        directory.mkdir()
        (directory / "README.md").write_text(before)
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        assert [path.name for path in await job.export(yours)] == ["growth.json"]
        assert [path.name for path in await job.export(ours)] == ["growth.json", "README.md"]
    assert (yours / "README.md").read_text() == "# My project"
    assert (ours / "README.md").read_bytes() == daemon.artifacts["README.md"]


@pytest.mark.asyncio
async def test_an_artifact_that_arrives_damaged_is_refused(daemon, tmp_path):
    daemon.artifacts = {"model.safetensors": b"x" * 2500}
    daemon.corrupt = True
    async with daemon.running(), Client(daemon.endpoint) as esper:
        with pytest.raises(StoreFailed, match="arrived damaged"):
            await esper.job(synthetic_job.JOB_ID).export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.asyncio
async def test_an_artifact_may_not_lead_out_of_the_directory(daemon, tmp_path):
    daemon.artifacts = {"../escaped": b"x"}
    async with daemon.running(), Client(daemon.endpoint) as esper:
        with pytest.raises(StoreFailed, match="not a file name"):
            await esper.job(synthetic_job.JOB_ID).export(tmp_path / "out")
    assert not (tmp_path / "escaped").exists()


@pytest.mark.asyncio
async def test_a_job_without_artifacts_says_what_it_waits_for(daemon, tmp_path):
    async with daemon.running(), Client(daemon.endpoint) as esper:
        job = esper.job(synthetic_job.JOB_ID)
        assert await job.artifacts() == ()
        with pytest.raises(NothingToShow, match=r"is running; it has no report\.json before it has succeeded"):
            await job.report()
        with pytest.raises(NothingToShow, match=r"model\.safetensors"):
            await job.export(tmp_path)


def test_the_blocking_client_does_the_same(daemon, tmp_path):
    daemon.log = EVENTS
    daemon.state = JobState.SUCCEEDED
    daemon.artifacts = {"report.json": msgspec.json.encode(synthetic_job.REPORT)}
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(daemon.running()),
        SyncClient(daemon.endpoint) as esper,
    ):
        job = esper.submit(JOB)
        assert job.id == synthetic_job.JOB_ID
        assert not job.duplicate
        assert list(job.watch()) == EVENTS
        assert next(job.watch()).sequence == 1
        assert job.wait().state is JobState.SUCCEEDED
        assert job.events(after=3) == tuple(EVENTS[3:])
        assert job.report() == synthetic_job.REPORT
        assert job.artifacts()[0].name == "report.json"
        assert job.fetch("report.json") == daemon.artifacts["report.json"]
        assert [path.name for path in job.export(tmp_path / "out")] == ["report.json"]
        for change in (job.pause, job.resume, job.cancel, job.info):
            assert change().id == job.id
        assert esper.jobs() == (daemon.info(),)
        assert (esper.actors(), esper.kernels(), esper.plugins()) == (ACTORS, KERNELS, PLUGINS)
        assert (esper.evidence(), esper.forget_evidence("*")) == (EVIDENCE, 9)
        assert esper.daemon.events_endpoint == daemon.publisher.endpoint
        with pytest.raises(JobNotFound):
            esper.job("absent").info()


def test_a_closed_client_says_how_to_open_it(tmp_path):
    with pytest.raises(RuntimeError, match="async with"):
        _ = Client(f"ipc://{tmp_path}/control.sock").daemon
