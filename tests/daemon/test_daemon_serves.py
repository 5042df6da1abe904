"""What a running daemon shows and bears: its side port, its plugins, its processes, and whatever is thrown at its sockets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import anyio
import msgspec
import pytest
import zmq
from daemon_jobs import GROWTH, job

import esperd
from esperd import tracing
from esperd.actors.codec import Codec, Head, Kind
from esperd.actors.requests import RequestClient
from esperd.cli.client import esper
from esperd.cli.exit_codes import run
from esperd.errors import InvalidJob, MalformedMessage, ProtocolMismatch
from esperd.messages import PROTOCOL_VERSION, Done, ErrorReply
from esperd.messages.base import Message
from esperd.messages.control import ActorState, Hello, Welcome
from esperd.messages.jobs import (
    JobInfo,
    JobState,
    ListJobs,
)
from esperd.messages.leases import (
    CheckpointWritten,
    JobSucceeded,
)
from esperd.messages.telemetry import GetEvents, JobStateChanged, KernelLoaded
from esperd.testing import children_of, until

FED_ELSEWHERE = {
    "esperd_clients_refused_total",
    "esperd_dead_letters_total",  # once a letter is dead: test_dead_letters_are_a_metric
    # By events that a short job does not have: tests/telemetry/test_metrics.py
    "esperd_screenings_total",
    "esperd_trials_total",
    "esperd_rollbacks_total",
    "esperd_worker_breaker_changes_total",  # the same
    "esperd_retention_deleted_total",  # tests/daemon/test_retention.py
}
MAY_BE_ZERO = {"esperd_mailbox_depth", "esperd_mailbox_bytes", "esperd_breaker_state", "esperd_read_only"}
"""Gauges: it is good news. What counts must have counted."""
TORCH_FREE = (
    "esperd.cli.client",
    "esperd.cli.daemon",
    "esperd.client",
    "esperd.daemon.process",
    "esperd.policy.actor",
    "esperd.cache.actor",
    "esperd.telemetry.actor",
    "esperd.store.database",
    "esperd.actors.system",
    "esperd.testing",
)


def get(daemon, path):
    with urllib.request.urlopen(f"{daemon.http_url}{path}", timeout=10) as answer:
        return answer.status, answer.read().decode()


# --- kernels, a compiler that dies, metrics ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grown(daemon, collector):
    """One job that grows, with the compiler killed before it asks for its kernel; then the same job again."""
    growing = job(12, growth=GROWTH, slots={"patterns": ["second"]}, name="observed")
    with daemon.sync_client() as esper:
        killed = next(actor for actor in esper.actors().actors if actor.name == "compiler")
        os.kill(killed.pid, signal.SIGKILL)
        with tracing.exporting(collector.endpoint if tracing.is_installed() else "", "client"):
            first = esper.submit(growing)
        assert first.wait().state is JobState.SUCCEEDED
        again = esper.submit(growing)
        assert again.wait().state is JobState.SUCCEEDED
        yield killed, first, again


def kernel_sources(handle):
    return [event.body.source for event in handle.events() if isinstance(event.body, KernelLoaded)]


def test_a_killed_compiler_is_replaced_and_the_next_kernel_compiles(daemon, grown):
    killed, first, _ = grown
    with daemon.sync_client() as esper:
        replaced = next(actor for actor in esper.actors().actors if actor.name == "compiler")
    assert (replaced.state, replaced.restarts) == (ActorState.RUNNING, 1)
    assert replaced.pid != killed.pid
    assert kernel_sources(first)[0] == "compiled"


def test_the_second_run_of_a_job_compiles_nothing_and_ends_with_the_same_weights(daemon, grown):
    _, first, again = grown
    assert set(kernel_sources(again)) == {"memory"}
    with daemon.sync_client() as esper:
        listed = esper.kernels()
    assert (len(listed.kernels), listed.misses) == (1, 1)
    assert listed.hits == listed.kernels[0].hits >= 1
    weights = [{artifact.name: artifact.sha256 for artifact in handle.artifacts()} for handle in (first, again)]
    assert weights[0]["model.safetensors"] == weights[1]["model.safetensors"]


def test_every_documented_metric_is_fed(daemon, grown):
    status, text = get(daemon, "/metrics")
    rows = (Path(__file__).parents[2] / "docs/telemetry.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(esperd_\w+)` \|", rows, re.MULTILINE))
    samples = re.findall(r"^(esperd_\w+?)(?:_count)?(?:\{.*\})? (\S+)$", text, re.MULTILINE)
    fed = {name for name, _ in samples}
    moved = {name for name, value in samples if float(value) != 0.0}
    assert status == 200
    assert documented - FED_ELSEWHERE <= fed
    assert documented - FED_ELSEWHERE - moved <= MAY_BE_ZERO
    assert re.search(r'^esperd_messages_total\{actor="policy",kind="Decide",result="answered"\} [1-9]', text, re.MULTILINE)
    assert re.search(r'^esperd_messages_total\{actor="trainer",kind="Lease",result="answered"\} [1-9]', text, re.MULTILINE)
    assert set(re.findall(r'^esperd_commit_seconds_count\{database="(\w+)"\} [1-9]', text, re.MULTILINE)) == {
        "decisions",
        "events",
        "jobs",
        "kernels",
    }
    assert re.search(r'^esperd_jobs\{state="succeeded"\} [1-9]', text, re.MULTILINE)
    assert re.search(r'^esperd_kernels_total\{source="compiled"\} 1\.0$', text, re.MULTILINE)
    assert re.search(r'^esperd_restarts_total\{actor="compiler"\} 1\.0$', text, re.MULTILINE)


def test_events_are_numbered_without_holes_and_tell_every_state_in_order(grown):
    _, first, _ = grown
    events = first.events()
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    states = [event.body.state.value for event in events if isinstance(event.body, JobStateChanged)]
    assert states == ["queued", "leased", "running", "succeeded"]


def test_a_watcher_who_comes_late_reads_the_same_events_and_ends(grown):
    _, first, _ = grown
    assert tuple(first.watch()) == first.events()


def test_a_plugin_that_does_not_import_or_whose_hook_raises_is_listed_with_its_traceback(daemon, grown):
    with daemon.sync_client() as esper:
        records = {record.name: record for record in esper.plugins().plugins}
    assert records["observer"].distribution == "observer 0.1"
    assert "RuntimeError: this observer looks away" in records["observer"].error
    assert "No module named 'no_such_package_anywhere'" in records["unfinished"].error
    assert all(record.error is None for name, record in records.items() if name.startswith("builtins."))


# --- processes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_of_jobs_that_are_over_no_process_is_left_not_even_a_zombie(daemon, grown):
    async def one_is_left():
        return len(children_of(daemon.pid)) == 1

    await until(one_is_left)
    async with daemon.client() as esper:
        (compiler,) = [actor for actor in (await esper.actors()).actors if actor.name == "compiler"]
    assert [child.pid for child in children_of(daemon.pid)] == [compiler.pid]


def test_the_daemon_does_not_load_torch(daemon, grown):
    def maps(pid):
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" not in maps(daemon.pid)
    (compiler,) = children_of(daemon.pid)
    assert "libtorch" in maps(compiler.pid)  # the question is one that can be answered with yes


def test_what_must_stay_light_imports_no_torch():
    program = f"import sys, {', '.join(TORCH_FREE)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- traces and the log -------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_submitted_job_is_one_trace_from_its_client_to_policy_compiler_and_training_steps(grown, collector):
    assert tracing.is_installed(), "install the development group: it has OpenTelemetry"
    wanted = {
        "client SubmitJob": "client",
        "daemon SubmitJob": "esperd",
        "jobs SubmitJob": "esperd",
        "jobs lease": "esperd",
        "trainer attempt": "esperd trainer",
        "trainer epoch": "esperd trainer",
        "trainer step": "esperd trainer",
        "trainer decide": "esperd trainer",
        "policy Decide": "esperd",
        "telemetry Record": "esperd",
        "cache ProvideKernel": "esperd",
        "compiler CompileKernel": "esperd compiler",
    }

    def traced():
        (root,) = [span for span in collector.spans if span.name == "client SubmitJob"]
        return [span for span in collector.spans if span.trace == root.trace]

    def arrived():
        return {span.name: span.service for span in traced()}

    async def all_arrived():
        return wanted.items() <= arrived().items()

    with contextlib.suppress(TimeoutError):
        await until(all_arrived, timeout_s=30.0)
    assert wanted.items() - arrived().items() == set()
    spans = {span.id: span for span in traced()}

    def above(name):
        """Names from the outermost span to the first of this name."""
        span = next(span for span in spans.values() if span.name == name)
        names = [span.name]
        while span.parent:
            span = spans[span.parent]
            names.insert(0, span.name)
        return names

    training = ["client SubmitJob", "daemon SubmitJob", "jobs SubmitJob", "jobs lease", "trainer attempt", "trainer epoch"]
    deciding = [*training, "trainer decide"]
    assert above("policy Decide") == [*deciding, "policy Decide"]
    assert above("compiler CompileKernel") == [*deciding, "cache ProvideKernel", "compiler CompileKernel"]
    assert above("trainer step") == [*training, "trainer train", "trainer step"]


def test_lines_of_the_daemons_log_are_json_and_name_actor_and_job(daemon, grown):
    _, first, _ = grown
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    (compiled,) = [line for line in lines if line.get("event") == "compiled a kernel"]
    assert (compiled["actor"], compiled["level"]) == ("compiler", "info")
    if tracing.is_installed():
        assert len(compiled["trace_id"]) == 32
    started = next(line for line in lines if line.get("actor") == f"trainer/{first.id}.1")
    assert (started["event"], started["generation"]) == ("starting", 1)


def test_events_of_all_jobs_are_found_by_type_and_followed(daemon, grown, tmp_path, capsys):
    _, first, again = grown

    def esper_says(*words):
        assert run(esper, ["events", *words, "--endpoint", daemon.endpoint]) == 0
        return capsys.readouterr().out.splitlines()

    found = [json.loads(line) for line in esper_says("--type", "KernelLoaded", "--type", "TrainingStarted", "--json")]
    assert {event["body"]["type"] for event in found} == {"KernelLoaded", "TrainingStarted"}
    assert {event["job"] for event in found} >= {first.id, again.id}
    assert len(esper_says("--job", first.id)) == len(first.events())
    assert len(esper_says("--job", first.id, "--limit", "3", "--follow")) == 3


# --- the side port ------------------------------------------------------------------------------------------------------------


def test_the_side_port_says_that_the_daemon_lives_and_is_ready(daemon, grown):
    assert get(daemon, "/livez") == (200, '{"status":"alive"}')
    status, text = get(daemon, "/readyz")
    assert (status, json.loads(text)) == (200, {"ready": True, "reasons": []})
    assert daemon.http_url.startswith("http://127.0.0.1:")
    status, text = get(daemon, "/v1/status")
    told = json.loads(text)
    assert (status, told["version"], told["pid"], told["ready"], told["reasons"]) == (
        200,
        esperd.__version__,
        daemon.pid,
        True,
        [],
    )
    assert told["jobs"]["succeeded"] >= 2
    assert told["requests"]["answered"] >= 1
    assert told["loop_lag_s"] >= 0.0
    assert {"jobs", "policy", "compiler", "cache", "telemetry"} <= {actor["name"] for actor in told["actors"]}


# --- hostile peers ------------------------------------------------------------------------------------------------------------

HEAD = msgspec.msgpack.encode(Head(PROTOCOL_VERSION, Kind.ASK, 7, "jobs", "nobody"))


def garbage(rng):
    """Frames that are no message: broken at every level, then at random."""
    yield [b""]
    yield [b"", b"", b""]
    yield [HEAD]
    yield [HEAD, b""]
    yield [HEAD, msgspec.msgpack.encode({"type": "Unheard"})]
    yield [HEAD, msgspec.msgpack.encode({"type": "GetJob", "id": 3})]
    yield [HEAD, msgspec.msgpack.encode({"type": "GetJob", "id": b"\xff\xfe"})]
    yield [HEAD, b"\x91" * 100_000]
    yield [b"\x91" * 100_000, HEAD]
    yield [msgspec.msgpack.encode([PROTOCOL_VERSION, 9, 7, "jobs", "nobody"]), HEAD]
    yield [msgspec.msgpack.encode([PROTOCOL_VERSION, 1, 2**70 % 2**64, "jobs", "nobody"]), HEAD]
    yield [msgspec.msgpack.encode([2**63, 1, 7]), HEAD]
    body = msgspec.msgpack.encode(Hello(protocol=PROTOCOL_VERSION, version="0"))
    for _ in range(300):
        frames = [bytearray(HEAD), bytearray(body)]
        for frame in frames:
            for _ in range(rng.randrange(4)):
                frame[rng.randrange(len(frame))] = rng.randrange(256)
        yield [bytes(frame) for frame in frames]
    for _ in range(100):
        yield [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 5))]


@contextlib.contextmanager
def dealer(endpoint, identity):
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, identity)
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(endpoint)
        yield socket


@pytest.mark.parametrize(("name", "identity"), [("control", b"stranger"), ("workers", b"trainer/j1.1:1:00000000")])
@pytest.mark.asyncio
async def test_frames_that_are_no_messages_leave_the_daemon_answering(daemon, name, identity):
    with dealer(f"ipc://{daemon.runtime_directory}/{name}.sock", identity) as socket:
        for frames in garbage(random.Random(20)):
            socket.send_multipart(frames)
        async with daemon.client() as esper:
            assert {actor.restarts for actor in (await esper.actors()).actors if actor.name != "compiler"} == {0}
            if name == "workers":  # each of them is counted, never silent

                async def counted():
                    return bool((await esper.actors()).dead_letters.get("undecodable"))

                await until(counted)
    assert daemon.process.poll() is None


@pytest.mark.parametrize(
    "message",
    [ListJobs(limit=2**62), GetEvents(job="j1", after=2**63), GetEvents(job="j1", limit=2**63), GetEvents(job="j1", after=-1)],
    ids=repr,
)
@pytest.mark.asyncio
async def test_a_number_that_no_listing_can_be_asked_for_is_refused(daemon, message):
    async with daemon.client() as esper:
        with pytest.raises(MalformedMessage, match="Expected `int`"):
            await esper.ask(message, Done)
        assert {actor.restarts for actor in (await esper.actors()).actors if actor.name in {"jobs", "telemetry"}} == {0}


@pytest.mark.asyncio
async def test_dead_letters_are_a_metric(daemon):
    async def shown():
        return 'esperd_dead_letters_total{reason="undecodable"}' in get(daemon, "/metrics")[1]

    with dealer(f"ipc://{daemon.runtime_directory}/workers.sock", b"trainer/j2.1:1:00000000") as socket:
        socket.send_multipart([b"no head", b"no body"])
        await until(shown)


@pytest.mark.parametrize("kind", [CheckpointWritten, JobSucceeded])
@pytest.mark.asyncio
async def test_a_client_may_not_speak_as_a_worker_does(daemon, grown, kind):
    rest = {"sha256": "0" * 64} if kind is CheckpointWritten else {"artifacts": ()}
    async with daemon.client() as esper:
        before = await esper.job(grown[1].id).info()
        with pytest.raises(MalformedMessage, match=f"clients do not send {kind.__name__}"):
            await esper.ask(kind(job_id=before.id, generation=1, epoch=99, **rest), Done)
        assert await esper.job(before.id).info() == before


def test_a_stranger_at_the_workers_door_is_told_to_leave(daemon):
    codec = Codec()
    with dealer(f"ipc://{daemon.runtime_directory}/workers.sock", b"trainer/j3.1:1:00000000") as socket:
        message = JobSucceeded(job_id="j3", generation=1, epoch=1, artifacts=())
        socket.send_multipart(codec.encode(codec.head(Kind.ASK, 5, to="jobs", sender="trainer/j3.1"), message))
        assert socket.poll(10_000)
        head, answer = codec.decode(socket.recv_multipart())
    assert (head.id, type(answer), answer.code) == (5, ErrorReply, "conflict")


def test_dead_letters_are_listed_shown_delivered_again_and_dropped(daemon, capsys):
    codec = Codec()
    with dealer(f"ipc://{daemon.runtime_directory}/workers.sock", b"trainer/j4.1:1:00000000") as socket:
        message = JobSucceeded(job_id="j4", generation=1, epoch=1, artifacts=())
        socket.send_multipart(codec.encode(codec.head(Kind.ASK, 5, to="jobs", sender="trainer/j4.1"), message))
        assert socket.poll(10_000)

    def told(*words, code=0):
        assert run(esper, [*words, "--json", "--endpoint", daemon.endpoint]) == code
        return json.loads(capsys.readouterr().out or "null")

    letters = told("dead-letters", "list")["letters"]
    letter = next(letter for letter in letters if letter["sender"] == "trainer/j4.1")
    assert (letter["message_type"], letter["to"]) == ("JobSucceeded", "jobs")
    number = str(letter["id"])
    assert '"j4"' in told("dead-letters", "show", number)["body"]
    told("dead-letters", "retry", number, code=4)  # the jobs actor knows no such job, and the letter stays
    assert told("dead-letters", "drop", number)["dropped"] == 1
    told("dead-letters", "show", number, code=4)
    assert told("dead-letters", "drop", "--all")["dropped"] >= len(letters) - 1  # a list shows a hundred at most


class Greeting(Message, frozen=True, kw_only=True):
    """A message of a later protocol."""

    words: str


@pytest.mark.asyncio
async def test_a_client_of_another_protocol_is_told_which_side_to_upgrade(daemon):
    theirs = PROTOCOL_VERSION + 1
    async with RequestClient(daemon.endpoint, codec=Codec([Greeting, Welcome, ErrorReply], protocol=theirs)) as client:
        with pytest.raises(ProtocolMismatch) as refused:
            await client.request(Greeting(words="good morning"))
    assert {refused.value.fields["peer"], refused.value.fields["own"]} == {PROTOCOL_VERSION, theirs}
    assert "upgrade esperd" in refused.value.message
    async with daemon.client() as esper:
        assert (esper.daemon.version, esper.daemon.pid) == (esperd.__version__, daemon.pid)


@pytest.mark.asyncio
async def test_a_client_is_answered_while_the_interpreter_of_anothers_job_is_probed(daemon, tmp_path):
    """The probe of a job's interpreter starts a process; nobody else waits for it."""
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\nread line < "$0.gate"\nexec false\n')
    slow.chmod(0o755)
    os.mkfifo(f"{slow}.gate")
    async with daemon.client() as one, daemon.client() as other:

        async def submit():
            with pytest.raises(InvalidJob, match="cannot import esperd"):
                await one.submit(job(1, python=str(slow)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(submit)
            async with await anyio.open_file(f"{slow}.gate", "w") as gate:  # opens once the probe reads
                assert all(isinstance(info, JobInfo) for info in await other.jobs())
                await gate.write("go\n")


def test_a_daemon_may_open_as_many_files_as_the_hard_limit_allows():
    """With too few, libzmq aborts the process at the next client's connection."""
    code = """
import resource
from esperd.daemon.process import open_as_many_files_as_allowed
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))
open_as_many_files_as_allowed()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
