"""Main of a process actor: the same Actor class as inside the daemon, behind a link."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from esperd.actors.actor import ASK_TIMEOUT_S, Actor
from esperd.actors.beside import Beside
from esperd.actors.clock import Clock, SystemClock
from esperd.actors.incarnation import SUPERVISOR, Incarnation
from esperd.actors.link import Link
from esperd.actors.tasks import open_task_group
from esperd.messages import Message, Reply
from esperd.messages.control import Watch

ABANDON_S = 5.0
"""How long a thread may go on after the daemon was lost, before the process leaves without it; chosen, not measured."""


class LinkContext:
    """:class:`~esperd.actors.actor.Context` of an actor in a process of its own."""

    def __init__(self, link: Link, tasks: anyio.abc.TaskGroup) -> None:
        self.name = link.name
        self.generation = link.generation
        self.clock: Clock = SystemClock()
        self._link = link
        self._tasks = tasks

    async def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """Ask an actor, wherever it lives."""
        return await self._link.ask(to, message, timeout_s)

    async def tell(self, to: str, message: Message) -> None:
        """Tell an actor, wherever it lives."""
        await self._link.tell(to, message)

    async def watch(self, name: str) -> None:
        """Be told when an actor's incarnations end."""
        await self._link.ask(SUPERVISOR, Watch(actor=name))

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> None:
        """Run something beside the handlers."""
        self._tasks.start_soon(function, *arguments)


def serve_actor(actor_factory: Callable[[], Actor], environment: Mapping[str, str] | None = None) -> None:
    """Serve one actor until the daemon says Stop (or SIGTERM comes), or is lost; the process then exits with status 0.

    A crash is raised, so that its traceback is the end of the process's output and its status is 1. A handler runs on the
    event loop beside the heartbeats: one that computes must do it in a thread (``anyio.to_thread.run_sync``), or the daemon
    takes this process for dead after a while.

    Args:
        actor_factory: makes the actor, in a thread, while the process already says that it lives: import here what is slow
            to import.
        environment: variables a daemon sets; None: ``os.environ``.

    Raises:
        ConfigError: when this process was not started by a daemon.
        Exception: whatever a tell's handler, ``on_start`` or ``on_stop`` raised.
    """
    incarnation = Incarnation.from_environment(environment)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(actor_factory, incarnation))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None  # not available on this platform: asyncio's own loop serves as well
    return uvloop.new_event_loop


async def _serve(actor_factory: Callable[[], Actor], incarnation: Incarnation) -> None:
    structlog.contextvars.bind_contextvars(actor=incarnation.actor, generation=incarnation.generation)
    hand = anyio.Lock()
    """Held while a message is handled, and before the first: the lock is fair, so messages keep their order."""
    await hand.acquire()
    beside = Beside(incarnation.actor)
    made: list[Actor] = []
    """The actor; there before the first message comes, which only a ready process is sent."""

    def accepts(message: Message) -> bool:
        return made[0].can_handle(message)

    def is_beside(message: Message) -> bool:
        return made[0].concurrency(message) > 1

    async def handle(message: Message) -> Reply | None:
        async with hand:
            if not is_beside(message):
                return await made[0].handle(message)
            beside.enter(message, made[0].concurrency(message))
        try:
            return await made[0].handle(message)
        finally:
            beside.leave(message)

    async with (
        Link(incarnation, handle, accepts=accepts, beside=is_beside, starting=True) as link,
        open_task_group() as tasks,
    ):
        tasks.start_soon(_leave_when_lost, link, tasks.cancel_scope)
        actor = await anyio.to_thread.run_sync(actor_factory, abandon_on_cancel=True)
        made.append(actor)
        await link.say_ready()
        tasks.start_soon(_obey_signals, link)  # before, SIGTERM ends the process as it ends any other
        await actor.on_start(LinkContext(link, tasks))
        hand.release()
        await link.stop_requested.wait()
        async with hand:  # what is in hand is finished; what comes after is not begun
            await beside.ended()
            await actor.on_stop()
            tasks.cancel_scope.cancel()


async def _obey_signals(link: Link) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            link.stop_requested.set()


async def _leave_when_lost(link: Link, scope: anyio.CancelScope) -> None:
    await link.daemon_lost.wait()
    # A thread cannot be cancelled; whatever it computes, nobody is left to take it.
    asyncio.get_running_loop().call_later(ABANDON_S, os._exit, 0)
    scope.cancel()
