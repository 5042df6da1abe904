from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
import zmq
import zmq.asyncio

from esperd.actors import shared
from esperd.actors.actor import Actor, handles
from esperd.actors.codec import OUT_OF_BAND_BYTES, UNKNOWN_ID, Codec, Kind
from esperd.actors.dead_letters import Reason
from esperd.actors.hub import Hub
from esperd.actors.incarnation import Incarnation
from esperd.actors.link import Link
from esperd.actors.spec import ChildSpec, ProcessSpec
from esperd.actors.supervisor import RestartLimits
from esperd.actors.system import ActorSystem
from esperd.errors import (
    ActorUnavailable,
    ConfigError,
    Conflict,
    DaemonUnreachable,
    HandlerFailed,
    JobNotFound,
    ProtocolMismatch,
    WorkerFailed,
)
from esperd.messages import PROTOCOL_VERSION, ErrorReply, Message, Reply
from esperd.messages.control import (
    ActorList,
    ActorState,
    ActorStatus,
    Heartbeat,
    ListActors,
    ListPlugins,
    Terminated,
)
from esperd.messages.jobs import ArtifactChunk, GetJob
from esperd.messages.leases import StopJob
from esperd.testing import until

PROGRAM = Path(__file__).with_name("process_program.py")
NO_ACTORS = ActorList(actors=(), dead_letters={})


class Recorder(Actor):
    """Keeps what it is told and lets a test wait for it."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.changed = anyio.Event()

    @handles(ListActors)
    async def answer(self, message: ListActors) -> Reply:
        return NO_ACTORS

    @handles(GetJob)
    async def done(self, message: GetJob) -> None:
        return None

    @handles(Heartbeat)
    async def keep(self, message: Heartbeat) -> None:
        self._keep(message)

    @handles(Terminated)
    async def keep_end(self, message: Terminated) -> None:
        self._keep(message)

    def _keep(self, message: Message) -> None:
        self.heard.append(message)
        changed, self.changed = self.changed, anyio.Event()
        changed.set()

    def said(self) -> list[str]:
        return [message.actor for message in self.heard if isinstance(message, Heartbeat)]

    async def until_said(self, word: str) -> None:
        while word not in self.said():
            await self.changed.wait()

    async def until_ended(self) -> Terminated:
        while True:
            for message in self.heard:
                if isinstance(message, Terminated):
                    return message
            await self.changed.wait()


def program(mode: str, *arguments: str, name: str = "worker", **options: Any) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, str(PROGRAM), mode, *arguments], **options)


def open_system(directory: Path, **options: Any) -> ActorSystem:
    return ActorSystem(workers_endpoint=f"ipc://{directory}/w.sock", limits=RestartLimits(backoff_s=0.0), **options)


def of(system: ActorSystem, name: str) -> ActorStatus:
    return next(status for status in system.status() if status.name == name)


async def exchange(directory: Path) -> None:
    recorder = Recorder()
    async with open_system(directory) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve", nice=5))
        where = await system.ask("worker", ListPlugins())
        assert isinstance(where, ActorList)
        status = of(system, "worker")
        assert status.pid == where.dead_letters["pid"] != os.getpid()
        assert os.getpriority(os.PRIO_PROCESS, status.pid) >= 5
        assert await system.ask("worker", ListActors()) == NO_ACTORS
        await system.tell("worker", Heartbeat(actor="told", generation=7))
        await recorder.until_said("told")
        with pytest.raises(JobNotFound) as typed:
            await system.ask("worker", GetJob(id="typed"))
        assert typed.value.fields == {"id": "typed"}
        with pytest.raises(HandlerFailed, match="ValueError: a bug"):
            await system.ask("worker", GetJob(id="bug"))
        assert of(system, "worker").generation == 1
    assert recorder.said() == ["told", "stopped"]


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_an_actor_in_a_process_asks_answers_tells_and_stops_like_any_other(tmp_path: Path, *, use_uvloop: bool) -> None:
    anyio.run(exchange, tmp_path, backend_options={"use_uvloop": use_uvloop})


@pytest.mark.asyncio
async def test_a_killed_process_is_noticed_replaced_and_its_askers_are_told(tmp_path: Path) -> None:
    recorder = Recorder()
    failures: list[str] = []

    async def hold(system: ActorSystem) -> None:
        with pytest.raises(ActorUnavailable) as caught:
            await system.ask("worker", GetJob(id="hold"))
        failures.append(caught.value.message)

    async with open_system(tmp_path) as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve"))
        system.watch("worker", "recorder")
        await system.tell("worker", Heartbeat(actor="handled", generation=1))
        await recorder.until_said("handled")
        tasks.start_soon(hold, system)
        await recorder.until_said("holding")
        before = of(system, "worker").handled
        await system.tell("worker", Heartbeat(actor="behind it", generation=1))
        with anyio.fail_after(20):
            while of(system, "worker").handled == before:  # noqa: ASYNC110 - until it has left the daemon, which sets no event
                await anyio.sleep(0.01)
        pid = of(system, "worker").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        ended = await recorder.until_ended()
        assert ended.generation == 1
        assert ended.will_restart
        assert "was killed by SIGKILL" in ended.reason
        await system._until(lambda: of(system, "worker").generation == 2)
        await system.wait_for("worker", ActorState.RUNNING)
        where = await system.ask("worker", ListPlugins())
        assert isinstance(where, ActorList)
        assert where.dead_letters["generation"] == 2
        assert where.dead_letters["pid"] != pid
    assert failures == ["worker stopped before it answered"]
    (letter,) = (letter for letter in system.dead_letters if letter.to == "worker")
    assert (letter.reason, letter.to, letter.message) == (
        Reason.PROCESS_DIED,
        "worker",
        Heartbeat(actor="behind it", generation=1),
    )
    assert "was killed by SIGKILL" in letter.detail


@pytest.mark.asyncio
async def test_what_was_being_sent_to_a_process_when_it_died_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    async def ask(system: ActorSystem) -> None:
        with pytest.raises(ActorUnavailable) as caught:
            await system.ask("worker", GetJob(id="typed"))
        told.append(caught.value.message)

    async with open_system(tmp_path) as system, anyio.create_task_group() as tasks:
        await system.start(program("serve"))
        pid = of(system, "worker").pid
        assert pid is not None
        with monkeypatch.context() as patch:
            tried = anyio.Event()

            def full(*_: object) -> bool:
                tried.set()
                return False

            patch.setattr(Hub, "_send", full)  # the peer's queue is full: the message waits at the socket
            tasks.start_soon(ask, system)
            await tried.wait()
            os.kill(pid, signal.SIGKILL)
            await system._until(lambda: bool(told))
    assert told == ["worker stopped before it answered"]


def shared_segments() -> int:
    """Segments of shared memory that this process holds."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return len({link.stat().st_ino for link in links if "memfd:esperd" in str(link.readlink())})


@pytest.mark.asyncio
async def test_very_large_bytes_go_through_memory_that_no_crash_leaves_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "SHARED_BYTES", OUT_OF_BAND_BYTES)
    before = set(os.listdir("/dev/shm"))  # noqa: PTH208 - where shared memory has names
    large = ArtifactChunk(offset=0, data=os.urandom(5 * OUT_OF_BAND_BYTES + 1), size_bytes=1)
    async with open_system(tmp_path) as system:
        await system.start(program("serve", "share"))
        for generation in (1, 2):
            assert await system.ask("worker", large) == large
            assert system._hub is not None
            (peer,) = system._hub._peers.values()
            assert peer.shared is not None
            assert (peer.shared.placed, peer.shared.taken) == (1, 1)
            if generation == 2:
                break
            assert peer.pid is not None
            os.kill(peer.pid, signal.SIGSTOP)
            await system.tell("worker", large)  # it lies there, and nobody takes it
            os.kill(peer.pid, signal.SIGKILL)
            await system._until(lambda: of(system, "worker").generation == 2)
            await system.wait_for("worker", ActorState.RUNNING)
            assert shared_segments() == 2, "those of the new process"
    assert shared_segments() == 0
    assert set(os.listdir("/dev/shm")) == before  # noqa: PTH208


@pytest.mark.asyncio
async def test_a_stalled_process_is_killed_after_its_silence(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve", restart="temporary", heartbeat_interval_s=0.05, heartbeat_timeout_s=0.4))
        system.watch("worker", "recorder")

        async def stall() -> None:
            with pytest.raises(ActorUnavailable):
                await system.ask("worker", GetJob(id="stall"))

        tasks.start_soon(stall)
        with anyio.fail_after(20):
            ended = await recorder.until_ended()
        assert "was silent for 0.4 s" in ended.reason
        assert not ended.will_restart


@pytest.mark.asyncio
async def test_a_process_that_computes_is_not_taken_for_dead_even_where_that_holds_up_its_heartbeats(
    tmp_path: Path,
) -> None:
    async with open_system(tmp_path) as system:
        await system.start(program("serve", heartbeat_interval_s=0.05, heartbeat_timeout_s=0.6))
        await system.ask("worker", GetJob(id="thread"))
        await system.ask("worker", GetJob(id="computes"))
        assert of(system, "worker").generation == 1


STILL_S = 1.5
"""Of beating and nothing else, after which a process is hung."""


@pytest.mark.asyncio
async def test_a_process_that_beats_and_does_nothing_else_is_killed_and_says_where_it_stood(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve", restart="temporary", heartbeat_interval_s=0.2, stall_timeout_s=STILL_S))
        system.watch("worker", "recorder")
        with anyio.fail_after(60):
            ended = await recorder.until_ended()
        assert f"hung and was killed: it stood before its first step for {STILL_S:g} s" in ended.reason


@pytest.mark.asyncio
async def test_a_process_that_waits_for_an_answer_of_ours_is_not_taken_for_hung(tmp_path: Path) -> None:
    class Slow(Recorder):
        @handles(ListActors)
        async def answer(self, message: ListActors) -> Reply:
            await anyio.sleep(3 * STILL_S)
            return NO_ACTORS

    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", Slow))
        await system.start(program("serve", heartbeat_interval_s=0.2, stall_timeout_s=STILL_S))
        assert await system.ask("worker", ListActors(), timeout_s=60.0) == NO_ACTORS
        assert of(system, "worker").generation == 1


@pytest.mark.asyncio
async def test_the_end_of_a_dead_process_output_is_told(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve", restart="temporary"))
        system.watch("worker", "recorder")
        with pytest.raises(ActorUnavailable):
            await system.ask("worker", GetJob(id="exit"))
        ended = await recorder.until_ended()
    assert "exited with status 3" in ended.reason
    assert "these were my last words" in ended.reason


@pytest.mark.parametrize(("told", "said"), [("crash", "ValueError: told to crash"), ("busy", "Busy: told to be busy")])
@pytest.mark.asyncio
async def test_a_failing_tell_ends_the_process_with_its_traceback(tmp_path: Path, told: str, said: str) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve", restart="temporary"))
        system.watch("worker", "recorder")
        await system.tell("worker", ActorList(actors=(), dead_letters={}))
        await system.tell("worker", Heartbeat(actor=told, generation=1))
        ended = await recorder.until_ended()
    assert said in ended.reason
    unknown, poison = system.dead_letters
    assert (unknown.reason, unknown.message) == (Reason.NOT_HANDLED, NO_ACTORS)
    assert poison.message == Heartbeat(actor=told, generation=1)
    # Its process's last word may come too late to be heard.
    assert poison.reason in (Reason.HANDLER_FAILED, Reason.PROCESS_DIED)
    assert of(system, "worker").state is ActorState.FAILED


@pytest.mark.asyncio
async def test_a_process_may_watch_others(tmp_path: Path) -> None:
    second = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", Recorder, restart="temporary"))
        await system.start(ChildSpec("second", lambda: second))
        await system.start(program("serve", "watch"))
        await system.ask("worker", ListPlugins())
        await system.stop("recorder")
        with anyio.fail_after(10):
            await second.until_said("recorder")


@pytest.mark.asyncio
async def test_a_training_loop_asks_tells_and_is_told_over_a_thread_link(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("train", restart="temporary", heartbeat_interval_s=0.05))
        system.watch("worker", "recorder")
        await recorder.until_said("actor_unavailable")
        await system.ask("worker", StopJob(why="pause"))
        await recorder.until_said("stop pause")
        step = next(message.step for message in recorder.heard if isinstance(message, Heartbeat) and message.step)
        assert step > 0

        async def told() -> bool:
            [worker] = [actor for actor in system.status() if actor.name == "worker"]
            return worker.step is not None and [(found.service, found.state) for found in worker.breakers] == [("policy", "open")]

        await until(told)
        await system.stop("worker")
        await recorder.until_ended()
    assert recorder.said() == ["before", "actor_unavailable", "stop pause"]
    assert recorder.heard[-1] == Terminated(actor="worker", generation=1, reason="stopped", will_restart=False, status=0)


@pytest.mark.asyncio
async def test_a_process_whose_daemon_dies_notices_and_exits(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("train", restart="temporary", heartbeat_interval_s=0.05, heartbeat_timeout_s=0.5))
        system.watch("worker", "recorder")
        await recorder.until_said("actor_unavailable")
        assert system._hub is not None
        deaf, system._hub._peers = system._hub._peers, {}
        assert deaf
        with anyio.fail_after(20):
            ended = await recorder.until_ended()
    assert ended.reason == "finished"


@pytest.mark.asyncio
async def test_a_process_that_is_not_ready_in_time_is_killed_and_the_caller_told(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        with pytest.raises(WorkerFailed, match=r"was not ready within 4 s") as caught:
            await system.start(program("stay-away", start_timeout_s=4.0))
        assert caught.value.fields["output"] == "importing something slow"
        assert caught.value.fields["status"] == -signal.SIGKILL


@pytest.mark.asyncio
async def test_a_process_that_stands_still_while_it_starts_is_noticed_as_a_running_one_and_slow_imports_are_not_mistaken_for_it(
    tmp_path: Path,
) -> None:
    beats = {"heartbeat_interval_s": 0.05, "heartbeat_timeout_s": 0.4, "start_timeout_s": 600.0}
    async with open_system(tmp_path) as system, anyio.create_task_group() as tasks:

        async def stop_before_its_first_word() -> None:
            while not (spawned := [status.pid for status in system.status() if status.name == "early" and status.pid]):  # noqa: ASYNC110
                await anyio.sleep(0.01)  # a spawned process is announced to nobody before it is ready
            os.kill(spawned[0], signal.SIGSTOP)

        tasks.start_soon(stop_before_its_first_word)
        for name, arguments in (("early", ["stay-away"]), ("late", ["serve", "stop-at-start"])):
            with pytest.raises(WorkerFailed, match=r"stood still for 0\.4 s before it was ready") as caught, anyio.fail_after(30):
                await system.start(program(*arguments, name=name, **beats))
            assert caught.value.fields["status"] == -signal.SIGKILL
        await system.start(program("serve", "slow-start", **beats))
        assert of(system, "worker").generation == 1


async def start_in_vain(directory: Path, mode: str) -> None:
    async with open_system(directory) as system:
        with pytest.raises(WorkerFailed, match="was not ready within"):
            await system.start(program(mode, start_timeout_s=4.0))


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("mode", ["chatter", "fall-silent"])
def test_a_process_that_prints_without_end_or_closes_its_output_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, *, use_uvloop: bool
) -> None:
    with Path(os.devnull).open("wb") as nowhere:  # a fast machine prints gigabytes, more than a captured output may hold
        monkeypatch.setattr("esperd.actors.process.STDERR", nowhere.fileno())
        anyio.run(start_in_vain, tmp_path, mode, backend_options={"use_uvloop": use_uvloop})


@pytest.mark.asyncio
async def test_a_process_that_ends_before_it_is_ready_failed_to_start(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        with pytest.raises(WorkerFailed, match="exited before it was ready; its output ended with:\nnothing to do"):
            await system.start(program("exit"))


@pytest.mark.asyncio
async def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        with pytest.raises(WorkerFailed, match="/no/such/python: No such file"):
            await system.start(ProcessSpec("worker", ["/no/such/python"]))


@pytest.mark.asyncio
async def test_a_niceness_that_is_inherited_and_may_not_be_lowered_stops_nobody(tmp_path: Path, monkeypatch) -> None:
    def refused(*_arguments: int) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")  # to lower it takes CAP_SYS_NICE

    monkeypatch.setattr(os, "setpriority", refused)
    async with open_system(tmp_path) as system:
        await system.start(program("serve", nice=10))
        assert of(system, "worker").state is ActorState.RUNNING


@pytest.mark.asyncio
async def test_a_process_that_gets_no_descriptors_fails_to_start_and_the_system_lives(tmp_path: Path, monkeypatch) -> None:
    def none_left() -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    async with open_system(tmp_path) as system:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pipe", none_left)
            with pytest.raises(WorkerFailed, match=r"could not be started: .*: Too many open files"):
                await system.start(program("serve"))
        await system.start(program("serve"))


@pytest.mark.asyncio
async def test_without_an_endpoint_no_process_is_started() -> None:
    async with ActorSystem() as system:
        with pytest.raises(ConfigError, match="workers_endpoint"):
            await system.start(program("serve"))


@pytest.mark.asyncio
async def test_a_process_that_ignores_stop_is_terminated_after_its_grace(tmp_path: Path) -> None:
    recorder = Recorder()
    async with open_system(tmp_path) as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve"))

        async def hold() -> None:
            with pytest.raises(ActorUnavailable):
                await system.ask("worker", GetJob(id="hold"))

        tasks.start_soon(hold)
        await recorder.until_said("holding")
        pid = of(system, "worker").pid
        assert pid is not None
        await system.stop("worker", grace_s=0.05)
        assert of(system, "worker").state is ActorState.STOPPED
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- the hub against peers that are not ours -----------------------------------------------------------------------------


@contextlib.contextmanager
def raw_peer(system: ActorSystem, identity: bytes) -> Iterator[zmq.asyncio.Socket]:
    assert system._hub is not None
    dealer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity)
    dealer.connect(system._hub.endpoint)
    with contextlib.closing(dealer):
        yield dealer


def incarnation(system: ActorSystem, generation: int = 1, **changes: Any) -> Incarnation:
    assert system._hub is not None
    values = {
        "hub": system._hub.endpoint,
        "actor": "worker",
        "generation": generation,
        "token": system._token,
        "heartbeat_interval_s": 0.02,
        "heartbeat_timeout_s": 0.3,
    }
    return Incarnation(**{**values, **changes})


async def ignore(message: Message) -> Reply | None:
    return None


@pytest.mark.asyncio
async def test_a_stale_incarnation_is_refused_when_it_says_ready(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        with pytest.raises(Conflict, match="worker@0"):
            async with Link(incarnation(system, generation=0), ignore):
                pass
        assert system.dead_letters.counts == {"stale_generation": 1}


@pytest.mark.asyncio
async def test_a_worker_of_an_earlier_daemon_is_told_to_give_up_at_its_next_heartbeat(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        old = incarnation(system, token="earlier", heartbeat_timeout_s=60.0)
        assert system._hub is not None
        peer = system._hub.expect(old)
        async with Link(old, ignore) as link:
            system._hub.forget(peer)
            with anyio.fail_after(5):
                await link.daemon_lost.wait()
            with pytest.raises(DaemonUnreachable):
                await link.ask("anybody", ListActors())
            with pytest.raises(DaemonUnreachable):
                await link.tell("anybody", ListActors())
        assert link.closed.is_set()


@pytest.mark.asyncio
async def test_a_link_notices_a_daemon_that_fell_silent_and_fails_what_is_open(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/mute.sock"
    codec = Codec()
    router = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    router.bind(endpoint)
    me = Incarnation(hub=endpoint, actor="w", generation=1, token="t", heartbeat_interval_s=0.02, heartbeat_timeout_s=0.2)

    async def say_yes_once() -> None:
        identity, *frames = await router.recv_multipart()
        head, _ = codec.decode(frames)
        reply = codec.encode(codec.head(Kind.REPLY, head.id, to="w", sender="supervisor"), NO_ACTORS)
        await router.send_multipart([identity, *reply])

    with contextlib.closing(router):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(say_yes_once)
            async with Link(me, ignore) as link:
                with pytest.raises(DaemonUnreachable, match=r"silent for 0\.2 s"):
                    await link.ask("anybody", ListActors())
                assert link.daemon_lost.is_set()


@pytest.mark.asyncio
async def test_a_link_to_nobody_says_so(tmp_path: Path) -> None:
    me = Incarnation(
        hub=f"ipc://{tmp_path}/none.sock",
        actor="w",
        generation=1,
        token="t",
        heartbeat_interval_s=1.0,
        heartbeat_timeout_s=1.0,
    )
    with pytest.raises(DaemonUnreachable):
        async with Link(me, ignore):
            pass


@pytest.mark.asyncio
async def test_a_worker_of_another_protocol_is_refused_naming_both(tmp_path: Path) -> None:
    async with open_system(tmp_path) as system:
        newer = Codec(protocol=PROTOCOL_VERSION + 1)
        with pytest.raises(ProtocolMismatch):
            async with Link(incarnation(system), ignore, codec=newer):
                pass


@pytest.mark.asyncio
async def test_malformed_frames_are_counted_answered_and_the_hub_lives(tmp_path: Path) -> None:
    recorder = Recorder()
    codec = Codec()
    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        with raw_peer(system, b"worker@1:garbage") as peer, anyio.fail_after(5):
            head, _ = codec.encode(codec.head(Kind.ASK, 5, to="recorder", sender="w"), ListActors())
            await peer.send_multipart([b"\xc1", b"\xc1"])
            await peer.send_multipart([b""])
            await peer.send_multipart([head, b"\xff"])
            answered, reply = codec.decode(await peer.recv_multipart())
            assert answered.id == 5
            assert isinstance(reply, ErrorReply)
            assert reply.code == "malformed_message"
            await peer.send_multipart(codec.encode(codec.head(Kind.TELL, 0, to="recorder", sender="w"), ListActors()))
            refused, reply = codec.decode(await peer.recv_multipart())
            assert refused.id == UNKNOWN_ID
            assert isinstance(reply, ErrorReply)
            assert reply.code == "conflict"
        assert system.dead_letters.counts == {"undecodable": 3, "stale_generation": 1}
        assert await system.ask("recorder", ListActors()) == NO_ACTORS


def test_a_program_that_no_daemon_started_says_which_variables_it_misses() -> None:
    with pytest.raises(ConfigError, match="ESPERD_HUB, ESPERD_ACTOR"):
        Incarnation.from_environment({})
    with pytest.raises(ConfigError, match="no number"):
        Incarnation.from_environment(
            {
                **Incarnation(
                    hub="ipc://x", actor="a", generation=1, token="t", heartbeat_interval_s=1.0, heartbeat_timeout_s=1.0
                ).to_environment(),
                "ESPERD_GENERATION": "one",
            }
        )


def test_an_incarnation_survives_the_environment() -> None:
    original = Incarnation(
        hub="ipc:///tmp/x", actor="a", generation=3, token="t", heartbeat_interval_s=0.1, heartbeat_timeout_s=20.0
    )
    assert Incarnation.from_environment(original.to_environment()) == original
    assert original.identity == b"a@3:t"
