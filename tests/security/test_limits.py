"""What one client may ask, and what a job may name."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import anyio
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from esperd.actors.codec import Codec, Kind
from esperd.actors.limits import ClientLimits, TokenBucket, Turnstile
from esperd.actors.requests import RequestClient, RequestServer
from esperd.config import Config, Jobs, Network
from esperd.daemon.allowed import check_allowed
from esperd.daemon.client_queues import ClientQueues
from esperd.daemon.remote import endpoints, seen_from
from esperd.errors import Busy, ConfigError, JobNotFound, MalformedMessage, NotAllowed
from esperd.messages import Message, Reply
from esperd.messages.control import ActorList, ListActors
from esperd.messages.jobs import Budget, Export, GetJob, Job, JobInfo, JobState, Optimizer, Scheduler

NO_ACTORS = ActorList(actors=(), dead_letters={})
LIMITS = ClientLimits(request_bytes=1024, requests_per_s=1e6, burst=1_000_000, open_requests=2)


@given(st.lists(st.floats(0, 2), max_size=200))
def test_a_bucket_gives_no_more_than_its_burst_and_its_rate(pauses: list[float]) -> None:
    bucket, now, taken = TokenBucket(5.0, 10.0, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait_s = bucket.take(now)
        taken += wait_s == 0.0
        assert taken <= 10 + 5 * now + 1e-6
        assert 0.0 <= wait_s <= 0.2


def test_a_client_that_asks_too_often_is_told_when_to_come_back_and_others_are_not_held_up() -> None:
    turnstile = Turnstile(ClientLimits(request_bytes=10, requests_per_s=2.0, burst=1, open_requests=1))
    turnstile.admit("loud", [b"x"], now=0.0)
    with pytest.raises(Busy) as caught:
        turnstile.admit("loud", [b"x"], now=0.0)
    assert caught.value.fields["retry_after_s"] == 0.5
    turnstile.admit("quiet", [b"x"], now=0.0)
    turnstile.admit("loud", [b"x"], now=0.5)


@pytest.mark.asyncio
async def test_a_request_too_large_or_one_too_many_is_refused_with_a_reason(tmp_path: Path) -> None:
    release = anyio.Event()

    async def hold(_client: bytes, _message: Message) -> Reply:
        await release.wait()
        return NO_ACTORS

    endpoint = f"ipc://{tmp_path}/requests.sock"
    async with (
        RequestServer(endpoint, hold, turnstile=Turnstile(LIMITS)),
        RequestClient(endpoint) as client,
        anyio.create_task_group() as tasks,
    ):
        with pytest.raises(MalformedMessage, match="request_bytes = 1024"):
            await client.request(GetJob(id="x" * 2000))
        for _ in range(LIMITS.open_requests):
            tasks.start_soon(client.request, ListActors())
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="open_requests"):
            await client.request(ListActors())
        async with RequestClient(endpoint) as other:
            asyncio.get_running_loop().call_later(0.01, release.set)
            assert await other.request(ListActors()) == NO_ACTORS
        assert await client.request(ListActors()) == NO_ACTORS


@pytest.mark.asyncio
async def test_a_few_thousand_mutated_frames_leave_the_front_door_answering(tmp_path: Path) -> None:
    async def answer(_client: bytes, _message: Message) -> Reply:
        return NO_ACTORS

    endpoint, codec, rng = f"ipc://{tmp_path}/fuzz.sock", Codec(), random.Random(7)
    right = codec.encode(codec.head(Kind.ASK, 1, to="daemon", sender="fuzz"), GetJob(id="j1"))
    async with RequestServer(endpoint, answer) as server:
        dealer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        dealer.connect(endpoint)
        with contextlib.closing(dealer):
            for _ in range(3_000):
                await dealer.send_multipart(mutated(right, rng))
                if rng.random() < 0.5:
                    with contextlib.suppress(zmq.Again):
                        await dealer.recv_multipart(flags=zmq.NOBLOCK)
        async with RequestClient(endpoint) as client:
            assert await client.request(ListActors()) == NO_ACTORS
        assert server.statistics().malformed > 1_000


def mutated(frames: list[bytes], rng: random.Random) -> list[bytes]:
    changed = [bytearray(frame) for frame in frames]
    for _ in range(rng.randint(1, 4)):
        frame = rng.choice(changed)
        match rng.randrange(4):
            case 0 if frame:
                frame[rng.randrange(len(frame))] = rng.randrange(256)
            case 1:
                del frame[rng.randint(0, len(frame)) :]
            case 2:
                frame += rng.randbytes(rng.randint(1, 16))
            case _:
                changed.append(bytearray(rng.randbytes(rng.randint(0, 8))))
    return [bytes(frame) for frame in changed]


def job(**changed: object) -> Job:
    return Job(host="cnn", data="digits", budget=Budget(epochs=1), **changed)  # type: ignore[arg-type]


def test_modules_interpreters_and_directories_outside_of_what_is_allowed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    limits = Jobs(allowed_modules=("mylab",), allowed_pythons=("/opt/envs",), allowed_workdirs=(str(tmp_path / "in"),))
    inside = str(tmp_path / "in")
    check_allowed(job(workdir=inside, loss="mylab.losses:focal", python="/opt/envs/a/bin/python"), limits)
    check_allowed(job(workdir="/anywhere", loss="os:system", python="/bin/sh"), Jobs())
    for refused in (
        {"loss": "mylabel:f"},
        {"metric": "os:system"},
        {"optimizer": Optimizer(name="evil:make")},
        {"scheduler": Scheduler(name="evil:make")},
        {"python": "/opt/envs/../../bin/sh"},
        {"python": "python"},
        {"workdir": f"{inside}/../out"},
        {"workdir": f"{inside}/link"},
    ):
        with pytest.raises(NotAllowed, match=next(iter(refused)).partition(":")[0]):
            check_allowed(job(**{"workdir": inside, **refused}), limits)
    for data in ("../out/x.npz", "/etc/x.npz", "link/x.npz"):
        with pytest.raises(NotAllowed, match="data"):
            check_allowed(Job(host="cnn", data=data, budget=Budget(epochs=1), workdir=inside), limits)
    for outside in (
        {"data": "text", "data_options": {"path": "/etc/passwd"}},
        {"data": "digits", "export": Export(directory="/etc/elsewhere")},
        {"data": "digits", "export": Export(directory="../out")},
    ):
        with pytest.raises(NotAllowed, match=r"data_options\.path|export\.directory"):
            check_allowed(Job(host="cnn", budget=Budget(epochs=1), workdir=inside, **outside), limits)
    with pytest.raises(NotAllowed, match="none but the daemon's own"):
        check_allowed(job(python="/bin/sh"), Jobs(allowed_modules=("mylab",)))


@pytest.mark.parametrize(
    ("listen", "events", "curve"),
    [
        ("tcp://0.0.0.0:7412", "", False),
        ("tcp://example.org:7412", "", False),
        ("tcp://127.0.0.1:7412", "tcp://0.0.0.0:7413", False),
        ("ipc:///tmp/x.sock", "", True),
        ("tcp://*", "", True),
        ("tcp://127.0.0.1:65535", "", True),
        ("tcp://127.0.0.1:99999", "", True),
    ],
)
def test_a_network_without_keys_or_without_a_port_is_refused(listen: str, events: str, curve: bool) -> None:
    with pytest.raises(ConfigError, match="network"):
        endpoints(Network(listen=listen, events=events, curve=curve))


def test_loopback_may_do_without_keys_and_nothing_is_listened_on_by_default() -> None:
    assert Config().network.listen == ""
    assert endpoints(Network(listen="tcp://127.0.0.1:7412", curve=False)) == ("tcp://127.0.0.1:7412", "tcp://127.0.0.1:7413")
    assert endpoints(Network(listen="tcp://[::1]:7412", curve=False))[1] == "tcp://[::1]:7413"
    assert seen_from("tcp://gpu.lab:7412", "tcp://0.0.0.0:7413") == "tcp://gpu.lab:7413"


@pytest.mark.asyncio
async def test_a_client_with_too_many_jobs_that_wait_is_told_to_come_back_and_may_again_when_one_is_gone() -> None:
    gone: set[str] = set()

    async def look(job_id: str) -> JobInfo:
        if job_id in gone:
            raise JobNotFound("gone", id=job_id)
        return JobInfo(id=job_id, name="", state=JobState.QUEUED, attempt=0, submitted_at=0.0, job=job())

    queues = ClientQueues(2, look)
    for job_id in ("a", "b"):
        async with queues.place(b"me"):
            queues.note(b"me", job_id)
    with pytest.raises(Busy, match="queued_jobs = 2"):
        async with queues.place(b"me"):
            pass
    async with queues.place(b"you"), queues.place(b"you"):  # what is being admitted counts
        with pytest.raises(Busy, match="queued_jobs = 2"):
            async with queues.place(b"you"):
                pass
    gone.add("b")
    async with queues.place(b"me"):
        pass
