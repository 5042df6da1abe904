from __future__ import annotations

import random

import anyio
import anyio.lowlevel
import pytest

from esperd.actors.actor import Actor, Context, handles
from esperd.actors.dead_letters import Reason
from esperd.actors.spec import ChildSpec
from esperd.actors.supervisor import RestartLimits
from esperd.actors.system import ActorSystem
from esperd.errors import (
    ActorUnavailable,
    AskTimeout,
    ConfigError,
    Conflict,
    HandlerFailed,
    JobNotFound,
    MalformedMessage,
)
from esperd.messages import Done, Message, Reply
from esperd.messages.control import ActorList, ActorState, Heartbeat, ListActors, ListPlugins, Stop, Terminated
from esperd.messages.jobs import GetJob
from esperd.testing import FakeClock

NO_ACTORS = ActorList(actors=(), dead_letters={})
SOON = RestartLimits(backoff_s=0.0)


class Recorder(Actor):
    """Keeps what it is told, answers what it is asked, crashes on demand."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.life: list[str] = []
        self.entered = anyio.Event()
        self.release = anyio.Event()
        self.context: Context | None = None

    async def on_start(self, context: Context) -> None:
        self.context = context
        self.life.append(f"start {context.name} {context.generation}")

    async def on_stop(self) -> None:
        self.life.append("stop")

    @handles(ListActors)
    async def answer(self, message: ListActors) -> Reply:
        return NO_ACTORS

    @handles(Heartbeat)
    async def keep(self, message: Heartbeat) -> None:
        self.heard.append(message)
        if message.actor == "crash":
            raise ValueError("told to crash")

    @handles(GetJob)
    async def fail(self, message: GetJob) -> Reply | None:
        match message.id:
            case "typed":
                raise JobNotFound("no such job", id="typed")
            case "bug":
                raise ValueError("a bug")
            case "wrong":
                return "text"  # type: ignore[return-value]
            case "hold":
                self.entered.set()
                await self.release.wait()
        return None

    @handles(Terminated)
    async def mourn(self, message: Terminated) -> None:
        self.heard.append(message)
        self.entered.set()


def beat(actor: str = "x", generation: int = 1) -> Heartbeat:
    return Heartbeat(actor=actor, generation=generation)


def always(actor: Actor) -> ChildSpec:
    return ChildSpec("a", lambda: actor)


async def first_life() -> None:
    recorder = Recorder()
    async with ActorSystem() as system:
        await system.start(always(recorder))
        for number in range(3):
            await system.tell("a", beat(generation=number))
        assert await system.ask("a", ListActors()) == NO_ACTORS
        assert await system.ask("a", GetJob(id="fine")) == Done()
        assert [message.generation for message in recorder.heard if isinstance(message, Heartbeat)] == [0, 1, 2]
        [status] = system.status()
        assert (status.name, status.state, status.handled) == ("a", ActorState.RUNNING, 5)
    assert recorder.life == ["start a 1", "stop"]


@pytest.mark.parametrize("use_uvloop", [False, True], ids=["asyncio", "uvloop"])
def test_an_actor_starts_handles_its_mail_in_order_and_stops(*, use_uvloop: bool) -> None:
    anyio.run(first_life, backend_options={"use_uvloop": use_uvloop})


@pytest.mark.asyncio
async def test_an_asks_exception_belongs_to_the_asker_and_the_actor_goes_on() -> None:
    async with ActorSystem() as system:
        await system.start(ChildSpec("a", Recorder))
        with pytest.raises(JobNotFound) as typed:
            await system.ask("a", GetJob(id="typed"))
        assert typed.value.fields == {"id": "typed"}
        with pytest.raises(HandlerFailed, match="ValueError: a bug") as bug:
            await system.ask("a", GetJob(id="bug"))
        assert "Traceback" in str(bug.value.fields["traceback"])
        with pytest.raises(HandlerFailed, match="not a Reply"):
            await system.ask("a", GetJob(id="wrong"))
        assert system.status()[0].generation == 1


@pytest.mark.asyncio
async def test_a_failing_tell_ends_the_incarnation_and_the_next_one_reads_the_same_mailbox() -> None:
    lives: list[Recorder] = []

    def make() -> Recorder:
        lives.append(Recorder())
        return lives[-1]

    async with ActorSystem(limits=SOON) as system:
        await system.start(ChildSpec("a", make))
        await system.tell("a", beat("crash"))
        await system.tell("a", beat("after"))
        with anyio.fail_after(5):
            await system._until(lambda: len(lives) == 2 and bool(lives[1].heard))
        [letter] = system.dead_letters
        assert letter.reason is Reason.HANDLER_FAILED
        assert "told to crash" in letter.detail
        [status] = system.status()
        assert (status.generation, status.restarts, status.last_error) == (2, 1, "ValueError: told to crash")
    assert lives[0].life == ["start a 1"]
    assert lives[1].heard == [beat("after")]


@pytest.mark.asyncio
async def test_between_two_incarnations_an_ask_fails_at_once_and_a_tell_waits_in_the_mailbox() -> None:
    clock = FakeClock()
    recorders: list[Recorder] = []

    def make() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    async with ActorSystem(clock=clock, rng=random.Random(1)) as system:
        await system.start(ChildSpec("a", make))
        await system.tell("a", beat("crash"))
        await system.wait_for("a", ActorState.WAITING)
        with pytest.raises(ActorUnavailable, match="being restarted"):
            await system.ask("a", ListActors())
        await system.tell("a", beat("later"))
        assert system.status()[0].mailbox_depth == 1
        clock.advance(0.1)
        await system.wait_for("a", ActorState.RUNNING)
        assert await system.ask("a", ListActors()) == NO_ACTORS
        assert recorders[1].heard == [beat("later")]


@pytest.mark.asyncio
async def test_an_actor_that_crashes_too_often_ends_the_system_with_its_error() -> None:
    bystander = Recorder()

    async def crash_until_the_end() -> None:
        async with ActorSystem(limits=SOON) as system:
            await system.start(ChildSpec("bystander", lambda: bystander))
            await system.start(ChildSpec("a", Recorder))
            while True:
                await system.tell("a", beat("crash"))
                await anyio.lowlevel.checkpoint()

    with pytest.raises(HandlerFailed, match="a ended 4 times within 30 s, the last time: ValueError: told to crash"):
        await crash_until_the_end()
    assert bystander.life == ["start bystander 1", "stop"]


@pytest.mark.asyncio
async def test_an_error_of_the_block_leaves_it_as_itself_after_everybody_stopped() -> None:
    recorder = Recorder()

    async def fail() -> None:
        async with ActorSystem() as system:
            await system.start(always(recorder))
            raise ConfigError("mine")

    with pytest.raises(ConfigError, match="mine"):
        await fail()
    assert recorder.life == ["start a 1", "stop"]


@pytest.mark.asyncio
async def test_everybody_stops_also_when_the_block_is_cancelled_from_outside() -> None:
    recorder = Recorder()
    with anyio.CancelScope() as scope:
        async with ActorSystem() as system:
            await system.start(always(recorder))
            scope.cancel()
            await anyio.sleep_forever()
    assert recorder.life == ["start a 1", "stop"]


@pytest.mark.asyncio
async def test_actors_stop_in_reverse_order_of_their_start() -> None:
    order: list[str] = []

    class Named(Actor):
        async def on_start(self, context: Context) -> None:
            self.name = context.name

        async def on_stop(self) -> None:
            order.append(self.name)

    async with ActorSystem() as system:
        for name in ("one", "two", "three"):
            await system.start(ChildSpec(name, Named))
    assert order == ["three", "two", "one"]


@pytest.mark.asyncio
async def test_a_start_that_fails_is_the_callers_error_and_leaves_no_actor_behind() -> None:
    class Broken(Actor):
        async def on_start(self, context: Context) -> None:
            raise ValueError("cannot")

    class Misconfigured(Actor):
        async def on_start(self, context: Context) -> None:
            raise ConfigError("typed")

    async with ActorSystem() as system:
        with pytest.raises(HandlerFailed, match="a could not start: ValueError: cannot"):
            await system.start(ChildSpec("a", Broken))
        with pytest.raises(ConfigError, match="typed"):
            await system.start(ChildSpec("a", Misconfigured))
        await system.start(ChildSpec("a", Recorder))
        assert system.status()[0].generation == 3


@pytest.mark.asyncio
async def test_a_start_that_nobody_waits_for_is_supervised_like_any_crash() -> None:
    attempts: list[int] = []

    class Hesitant(Actor):
        async def on_start(self, context: Context) -> None:
            attempts.append(context.generation)
            if context.generation < 3:
                raise ValueError("not yet")

    async with ActorSystem(limits=SOON) as system:
        await system.start(ChildSpec("a", Hesitant), wait=False)
        with anyio.fail_after(5):
            await system.wait_for("a", ActorState.RUNNING)
    assert attempts == [1, 2, 3]


@pytest.mark.asyncio
async def test_two_actors_may_not_share_a_name_and_nobody_takes_the_supervisors() -> None:
    async with ActorSystem() as system:
        await system.start(ChildSpec("a", Recorder))
        with pytest.raises(Conflict, match="'a'"):
            await system.start(ChildSpec("a", Recorder))
        with pytest.raises(Conflict, match="supervisor"):
            await system.start(ChildSpec("supervisor", Recorder))


@pytest.mark.asyncio
async def test_who_is_not_there_cannot_be_asked_and_a_tell_to_them_is_a_dead_letter() -> None:
    async with ActorSystem() as system:
        await system.start(ChildSpec("a", Recorder))
        with pytest.raises(ActorUnavailable, match="there are: a"):
            await system.ask("b", ListActors())
        await system.tell("b", beat())
        await system.stop("a")
        with pytest.raises(ActorUnavailable):
            await system.ask("a", ListActors())
        await system.tell("a", beat())
        assert system.dead_letters.counts == {"no_such_actor": 1, "actor_stopped": 1}
        with pytest.raises(ActorUnavailable):
            await system.stop("b")
        await system.stop("a")


@pytest.mark.asyncio
async def test_a_message_without_a_handler_is_answered_or_becomes_a_dead_letter() -> None:
    async with ActorSystem() as system:
        await system.start(ChildSpec("a", Recorder))
        with pytest.raises(HandlerFailed, match="does not handle ListPlugins; it handles: GetJob"):
            await system.ask("a", ListPlugins())
        await system.tell("a", ListPlugins())
        assert await system.ask("a", ListActors()) == NO_ACTORS
        assert system.dead_letters.counts == {"not_handled": 1}


@pytest.mark.asyncio
async def test_an_ask_that_takes_too_long_times_out_and_one_that_waited_too_long_is_never_begun() -> None:
    recorder = Recorder()
    async with ActorSystem() as system, anyio.create_task_group() as tasks:
        await system.start(always(recorder))
        tasks.start_soon(system.ask, "a", GetJob(id="hold"))
        await recorder.entered.wait()
        with pytest.raises(AskTimeout, match="a did not answer ListActors within"):
            await system.ask("a", ListActors(), 0.05)
        recorder.release.set()
        assert await system.ask("a", ListActors()) == NO_ACTORS
        assert system.dead_letters.counts == {"expired": 1}


@pytest.mark.asyncio
async def test_an_actor_that_asks_itself_is_told_so_at_once() -> None:
    class Narcissus(Actor):
        async def on_start(self, context: Context) -> None:
            self.context = context

        @handles(ListActors)
        async def ask_myself(self, message: ListActors) -> Reply:
            return await self.context.ask("a", ListPlugins())

    async with ActorSystem() as system:
        await system.start(ChildSpec("a", Narcissus))
        with pytest.raises(ActorUnavailable, match="asks itself"):
            await system.ask("a", ListActors())


@pytest.mark.asyncio
async def test_handlers_may_ask_others_and_one_actor_handles_one_message_at_a_time() -> None:
    at_once: list[int] = []

    class Forwarder(Actor):
        async def on_start(self, context: Context) -> None:
            self.context = context
            self.inside = 0

        @handles(ListActors)
        async def forward(self, message: ListActors) -> Reply:
            self.inside += 1
            at_once.append(self.inside)
            reply = await self.context.ask("back", message)
            self.inside -= 1
            return reply

    async with ActorSystem() as system:
        await system.start(ChildSpec("back", Recorder))
        await system.start(ChildSpec("front", Forwarder))
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(system.ask, "front", ListActors())
    assert at_once == [1] * 5


@pytest.mark.asyncio
async def test_a_watcher_hears_of_every_end_and_whether_there_is_a_restart() -> None:
    watcher = Recorder()
    async with ActorSystem(limits=SOON) as system:
        await system.start(ChildSpec("watcher", lambda: watcher))
        await system.start(ChildSpec("a", Recorder))
        assert watcher.context is not None
        await watcher.context.watch("a")
        await system.tell("a", beat("crash"))
        await watcher.entered.wait()
        await system._until(lambda: system.status()[1].generation == 2)
        await system.stop("a")
        assert await system.ask("watcher", ListActors()) == NO_ACTORS
        assert watcher.heard == [
            Terminated(actor="a", generation=1, reason="ValueError: told to crash", will_restart=True),
            Terminated(actor="a", generation=2, reason="stopped", will_restart=False),
        ]
        with pytest.raises(ActorUnavailable):
            await watcher.context.watch("a")


@pytest.mark.asyncio
async def test_what_an_actor_said_is_read_before_the_news_of_its_end() -> None:
    watcher = Recorder()

    class Mortal(Actor):
        async def on_start(self, context: Context) -> None:
            self.context = context

        @handles(Heartbeat)
        async def last_words(self, message: Heartbeat) -> None:
            await self.context.tell("watcher", beat("last words"))
            raise ValueError("dead")

    async with ActorSystem() as system:
        await system.start(ChildSpec("watcher", lambda: watcher))
        await system.start(ChildSpec("a", Mortal, restart="temporary"))
        system.watch("a", "watcher")
        await system.tell("a", beat())
        await watcher.entered.wait()
    assert [type(message) for message in watcher.heard] == [Heartbeat, Terminated]


@pytest.mark.asyncio
async def test_an_actor_that_does_not_stop_is_cancelled_after_its_grace_and_its_asker_is_told() -> None:
    clock = FakeClock()
    stubborn = Recorder()
    failures: list[str] = []

    async def ask(system: ActorSystem) -> None:
        with pytest.raises(ActorUnavailable) as caught:
            await system.ask("a", GetJob(id="hold"))
        failures.append(caught.value.message)

    async with ActorSystem(clock=clock) as system, anyio.create_task_group() as tasks:
        await system.start(always(stubborn))
        tasks.start_soon(ask, system)
        await stubborn.entered.wait()
        tasks.start_soon(system.stop, "a", 3.0)
        await anyio.wait_all_tasks_blocked()
        clock.advance(2.9)
        await anyio.wait_all_tasks_blocked()
        assert system.status()[0].state is ActorState.RUNNING
        clock.advance(0.2)
        await system.wait_for("a", ActorState.STOPPED)
    assert failures == ["a stopped before it answered"]
    assert stubborn.life == ["start a 1"]


@pytest.mark.asyncio
async def test_a_stop_overtakes_waiting_mail_whose_askers_are_told() -> None:
    recorder = Recorder()
    async with ActorSystem() as system, anyio.create_task_group() as tasks:
        await system.start(always(recorder))
        tasks.start_soon(system.ask, "a", GetJob(id="hold"))
        await recorder.entered.wait()
        await system.tell("a", beat("never read"))
        tasks.start_soon(system.stop, "a")
        await anyio.wait_all_tasks_blocked()
        recorder.release.set()
        await system.wait_for("a", ActorState.STOPPED)
        assert recorder.heard == []
        assert [letter.reason for letter in system.dead_letters] == [Reason.ACTOR_STOPPED]
    assert recorder.life == ["start a 1", "stop"]


@pytest.mark.asyncio
async def test_what_runs_beside_the_handlers_ends_with_the_incarnation_and_its_failure_is_a_crash() -> None:
    ended = anyio.Event()

    class Busybody(Actor):
        async def on_start(self, context: Context) -> None:
            context.start_soon(self.fail if context.generation == 1 else self.wait)

        async def fail(self) -> None:
            raise ValueError("beside")

        async def wait(self) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

    async with ActorSystem(limits=SOON) as system:
        await system.start(ChildSpec("a", Busybody))
        await system._until(lambda: system.status()[0].generation == 2)
        await system.wait_for("a", ActorState.RUNNING)
        assert system.status()[0].last_error == "ValueError: beside"
    assert ended.is_set()


@pytest.mark.asyncio
async def test_with_wire_check_a_message_that_could_not_leave_the_process_is_found_out() -> None:
    class Private(Message, frozen=True, kw_only=True):
        pass

    async with ActorSystem(wire_check=True) as system:
        await system.start(ChildSpec("a", Recorder))
        assert await system.ask("a", ListActors()) == NO_ACTORS
        with pytest.raises(MalformedMessage, match="Private"):
            await system.ask("a", Private())


@pytest.mark.asyncio
async def test_a_system_that_is_not_open_starts_nobody() -> None:
    system = ActorSystem()
    with pytest.raises(ActorUnavailable, match="not open"):
        await system.start(ChildSpec("a", Recorder))
    async with system:
        pass
    with pytest.raises(ActorUnavailable, match="stopping"):
        await system.start(ChildSpec("a", Recorder))


def test_a_class_may_not_handle_one_message_twice() -> None:
    with pytest.raises(TypeError, match="two handlers of Stop"):

        class Torn(Actor):
            @handles(Stop)
            async def one(self, message: Stop) -> None: ...

            @handles(Stop)
            async def two(self, message: Stop) -> None: ...


def test_handlers_are_inherited_and_may_be_replaced() -> None:
    class Child(Recorder):
        @handles(ListActors)
        async def other_answer(self, message: ListActors) -> Reply:
            return Done()

    assert Child.handlers[ListActors] == "other_answer"
    assert Child.handlers[Heartbeat] == "keep"
    assert Recorder.handlers[ListActors] == "answer"
