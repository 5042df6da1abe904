"""A link for code that has no event loop: a training loop asks and tells blockingly, and polls what it was told."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Coroutine, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio

from esperd.actors.actor import ASK_TIMEOUT_S
from esperd.actors.codec import Codec
from esperd.actors.incarnation import Incarnation
from esperd.actors.link import Breakers, Link, Step, no_breakers
from esperd.actors.sockets import unreachable
from esperd.errors import DaemonUnreachable
from esperd.messages import Done, Message, Reply
from esperd.messages.control import Stop

ResultT = TypeVar("ResultT")


def _no_steps() -> int | None:
    return None


class ThreadLink:
    """Runs a :class:`Link` on an event loop of its own, in a daemon thread. ``with ThreadLink() as link``.

    Every message the process is sent, :class:`Stop` included, lands in ``received``; an ask is answered with ``Done`` as
    soon as it is there. The link keeps beating while the caller computes.

    Args:
        step: read at every heartbeat, from the link's thread.
        breakers: likewise.
        starting: opening it does not say Ready, :meth:`say_ready` does; see :class:`Link`.
        environment: variables a daemon sets; None: ``os.environ``.
        codec: message types and protocol version.
    """

    def __init__(
        self,
        *,
        step: Step = _no_steps,
        breakers: Breakers = no_breakers,
        starting: bool = False,
        environment: Mapping[str, str] | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.incarnation = Incarnation.from_environment(environment)
        self.received: queue.SimpleQueue[Message] = queue.SimpleQueue()
        """What this process was told, oldest first. Poll with ``get_nowait``, or wait with ``get(timeout=...)``."""
        self._codec = codec
        self._step = step
        self._breakers = breakers
        self._starting = starting
        self._daemon_lost = threading.Event()
        self._closed = threading.Event()
        self._opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link: Link | None = None
        self._leave: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"link of {self.incarnation.actor}", daemon=True)

    @property
    def name(self) -> str:
        """The actor's name."""
        return self.incarnation.actor

    @property
    def generation(self) -> int:
        """The supervisor's count of this actor's incarnations."""
        return self.incarnation.generation

    @property
    def daemon_lost(self) -> bool:
        """Whether the daemon is gone: checkpoint and exit."""
        return self._daemon_lost.is_set()

    @property
    def closed(self) -> bool:
        """Whether the link has ended, for whatever reason."""
        return self._closed.is_set()

    def open(self) -> None:
        """Connect and, unless it is starting, say Ready.

        Raises:
            DaemonUnreachable: when nobody listens, or nobody answers within the heartbeat timeout.
            ProtocolMismatch: when the daemon speaks another protocol version.
            Conflict: when this incarnation is not the one the daemon waits for.
        """
        self._thread.start()
        self._opened.result()

    def say_ready(self) -> None:
        """Tell the daemon that messages can be taken from now on; see :meth:`Link.say_ready`.

        Raises:
            EsperError: as :meth:`open` does.
        """
        self._call(self._require_link().say_ready())

    def close(self) -> None:
        """End the link and its thread. Safe to call twice."""
        loop, leave = self._loop, self._leave
        if loop is not None and leave is not None and not self.closed:
            with contextlib.suppress(RuntimeError):  # the loop may end by itself in this moment
                loop.call_soon_threadsafe(leave.set)
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def ask(self, to: str, message: Message, timeout_s: float = ASK_TIMEOUT_S) -> Reply:
        """Send a message to an actor and block until its answer is there.

        Raises:
            AskTimeout: when no answer came in time.
            DaemonUnreachable: when the daemon is lost or the link has ended.
            EsperError: of whatever class the actor answered with.
        """
        return self._call(self._require_link().ask(to, message, timeout_s))

    def tell(self, to: str, message: Message) -> None:
        """Send a message to an actor, at most once; blocks while the connection's queue is full.

        Raises:
            DaemonUnreachable: when the daemon is lost or the link has ended.
        """
        self._call(self._require_link().tell(to, message))

    def _require_link(self) -> Link:
        if self._link is None or self.closed:
            raise self._ended()
        return self._link

    def _call(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        loop = self._loop
        if loop is None:
            work.close()
            raise self._ended()
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError as error:
            work.close()
            raise self._ended() from error
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._ended() from self._failure

    def _ended(self) -> DaemonUnreachable:
        why = "this link has ended" if self._failure is None else f"the link failed: {self._failure}"
        return unreachable(self.incarnation.hub, why)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - handed to whoever opened the link, or to the next caller
            self._failure = error
        finally:
            self._closed.set()
            if not self._opened.done():
                self._opened.set_exception(self._failure or self._ended())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._leave = asyncio.Event()
        opening = Link(
            self.incarnation,
            self._receive,
            step=self._step,
            breakers=self._breakers,
            starting=self._starting,
            codec=self._codec,
        )
        async with opening as link:
            self._link = link
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._pass_on_stop, link)
                tasks.start_soon(self._pass_on_loss, link)
                self._opened.set_result(None)
                await self._leave.wait()
                tasks.cancel_scope.cancel()

    async def _receive(self, message: Message) -> Reply:
        self.received.put(message)
        return Done()

    async def _pass_on_stop(self, link: Link) -> None:
        await link.stop_requested.wait()
        self.received.put(Stop())

    async def _pass_on_loss(self, link: Link) -> None:
        await link.daemon_lost.wait()
        self._daemon_lost.set()
