"""An ask whose answer takes long keeps nobody waiting where its handler says so, inside the daemon and in a process."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from test_process_actors import Recorder, open_system, program

from esperd.actors.actor import Actor, handles
from esperd.actors.spec import ChildSpec
from esperd.actors.supervisor import RestartLimits
from esperd.actors.system import ActorSystem
from esperd.errors import ActorUnavailable, Busy, HandlerFailed
from esperd.messages import Done, Message
from esperd.messages.control import ActorState, Heartbeat, ListActors, Stop
from esperd.messages.jobs import GetJob, ListJobs

LIMIT = 2


class Slow(Actor):
    """Holds asks for jobs until it is told to let go; answers everything else at once."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.heard: list[str] = []
        self.release = anyio.Event()
        self.stopped = False

    async def on_stop(self) -> None:
        self.stopped = True

    @handles(GetJob, concurrent=LIMIT)
    async def hold(self, message: GetJob) -> None:
        self.begun.append(message.id)
        if message.id != "quick":
            await self.release.wait()
        if message.id == "bug":
            raise ValueError("a bug")

    @handles(ListActors)
    async def answer(self, message: ListActors) -> None:
        self.heard.append("asked")

    @handles(Heartbeat)
    async def keep(self, message: Heartbeat) -> None:
        self.heard.append(message.actor)
        if message.actor == "crash":
            raise ValueError("told to crash")


class Asker:
    """Asks and keeps what came of it."""

    def __init__(self, system: ActorSystem) -> None:
        self._system = system
        self.answers: dict[str, object] = {}

    async def __call__(self, name: str) -> None:
        try:
            self.answers[name] = await self._system.ask("a", GetJob(id=name))
        except (ActorUnavailable, HandlerFailed, Busy) as error:
            self.answers[name] = type(error)


@pytest.mark.asyncio
async def test_what_comes_behind_a_slow_ask_does_not_wait_for_it() -> None:
    slow = Slow()
    async with ActorSystem() as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("a", lambda: slow))
        asker = Asker(system)
        tasks.start_soon(asker, "slow")
        await anyio.wait_all_tasks_blocked()
        assert await system.ask("a", GetJob(id="quick")) == Done()
        assert await system.ask("a", ListActors()) == Done()
        await system.tell("a", Heartbeat(actor="told", generation=1))
        await anyio.wait_all_tasks_blocked()
        assert slow.heard == ["asked", "told"]
        assert asker.answers == {}
        slow.release.set()
    assert asker.answers == {"slow": Done()}
    assert slow.begun == ["slow", "quick"]


@pytest.mark.asyncio
async def test_more_than_its_limit_are_refused_as_busy_and_a_place_is_free_again_after_an_answer_or_an_error() -> None:
    slow = Slow()
    async with ActorSystem() as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("a", lambda: slow))
        asker = Asker(system)
        for name in ("bug", "slow"):
            tasks.start_soon(asker, name)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="a answers 2 GetJob already") as refused:
            await system.ask("a", GetJob(id="third"))
        assert refused.value.fields["retry_after_s"] == 0.1
        slow.release.set()
        await anyio.wait_all_tasks_blocked()
        assert asker.answers == {"bug": HandlerFailed, "slow": Done()}
        assert [await system.ask("a", GetJob(id="quick")) for _ in range(3)] == [Done()] * 3
        assert system.status()[0].generation == 1
    assert "third" not in slow.begun


@pytest.mark.asyncio
async def test_a_tell_of_that_kind_still_waits_its_turn() -> None:
    slow = Slow()
    async with ActorSystem() as system:
        await system.start(ChildSpec("a", lambda: slow))
        await system.tell("a", GetJob(id="told"))
        await system.tell("a", Heartbeat(actor="behind", generation=1))
        await anyio.wait_all_tasks_blocked()
        assert (slow.begun, slow.heard) == (["told"], [])
        slow.release.set()


@pytest.mark.asyncio
async def test_a_stop_waits_for_what_is_being_answered() -> None:
    slow = Slow()
    async with ActorSystem() as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("a", lambda: slow))
        asker = Asker(system)
        tasks.start_soon(asker, "slow")
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(system.stop, "a")
        await anyio.wait_all_tasks_blocked()
        assert not slow.stopped
        slow.release.set()
        await system.wait_for("a", ActorState.STOPPED)
    assert asker.answers == {"slow": Done()}
    assert slow.stopped


@pytest.mark.asyncio
async def test_when_the_incarnation_ends_whoever_still_waits_is_told() -> None:
    async with ActorSystem(limits=RestartLimits(backoff_s=0.0)) as system, anyio.create_task_group() as tasks:
        await system.start(ChildSpec("a", Slow))
        asker = Asker(system)
        tasks.start_soon(asker, "slow")
        await anyio.wait_all_tasks_blocked()
        await system.tell("a", Heartbeat(actor="crash", generation=1))
    assert asker.answers == {"slow": ActorUnavailable}


def test_a_limit_is_inherited_and_may_be_replaced() -> None:
    class Same(Slow):
        pass

    class OneByOne(Slow):
        @handles(GetJob)
        async def hold(self, message: GetJob) -> None:
            return None

    message: Message = GetJob(id="x")
    assert [kind().concurrency(message) for kind in (Slow, Same, OneByOne)] == [LIMIT, LIMIT, 1]
    assert Slow().concurrency(Stop()) == 1


@pytest.mark.asyncio
async def test_an_actor_in_a_process_does_the_same(tmp_path: Path) -> None:
    recorder = Recorder()
    answered: list[object] = []

    async def ask(system: ActorSystem) -> None:
        answered.append(await system.ask("worker", ListJobs(limit=1)))

    async with open_system(tmp_path) as system:
        await system.start(ChildSpec("recorder", lambda: recorder))
        await system.start(program("serve"))
        async with anyio.create_task_group() as tasks:
            for count in (1, 2):
                tasks.start_soon(ask, system)
                while recorder.said().count("holding") < count:
                    await recorder.changed.wait()
            with pytest.raises(Busy, match="worker answers 2 ListJobs already"):
                await system.ask("worker", ListJobs(limit=1))
            await system.ask("worker", ListActors())
            assert answered == []
            await system.tell("worker", Heartbeat(actor="release", generation=1))
    assert answered == [Done(), Done()]
    assert recorder.said()[-1] == "stopped"
