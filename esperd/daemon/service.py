"""The daemon as a service: what it tells its manager all the time, and what it does about signals that do not end it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import anyio.abc
import anyio.to_thread
import structlog

from esperd.actors.clock import Clock
from esperd.actors.system import ActorSystem
from esperd.config import Config
from esperd.daemon.dump import dump
from esperd.daemon.notify import Notifier, Standing, feed_watchdog, status_line
from esperd.daemon.reload import compare
from esperd.errors import EsperError, StoreFailed
from esperd.messages.leases import ProveAlive

TELL_S = 1.0
"""How often the status is looked at."""
EXTENSION_S = 10.0
"""What each look asks for in addition while the daemon starts or drains; chosen, not measured."""
STOPS = frozenset({signal.SIGTERM, signal.SIGINT})
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

log = structlog.get_logger()


class Service:
    """The daemon's side of a service manager, and of whoever sends signals.

    Args:
        notifier: speaks to the service manager.
        clock: time.
        standing: what the daemon is at; its note is filled in here.
        read_again: the configuration as it stands in its file and variables now; raises an :class:`EsperError` when a daemon
            could not start with it, or that cannot be read.
        in_force: the configuration that applies.
        apply: puts another one in force, which differs in live keys only.
        is_full: whether the disk refuses what is written for want of room, and for no other reason.
    """

    def __init__(
        self,
        notifier: Notifier,
        clock: Clock,
        standing: Callable[[], Awaitable[Standing]],
        *,
        read_again: Callable[[], Config],
        in_force: Callable[[], Config],
        apply: Callable[[Config], None],
        is_full: Callable[[], bool] = lambda: False,
    ) -> None:
        self._notifier = notifier
        self._clock = clock
        self._standing = standing
        self._read_again = read_again
        self._in_force = in_force
        self._apply = apply
        self._is_full = is_full
        self._note = ""
        self._reloading = anyio.Lock()
        self._on_terminal = sys.stderr.isatty()
        self.stops: asyncio.Queue[signal.Signals] = asyncio.Queue()
        """Signals that end the daemon, in the order they came."""

    async def tell(self) -> None:
        """Keep the status line true, and ask for time while the daemon starts or drains. For ever."""
        told = ""
        while self._notifier.is_heard:
            standing = await self._standing()
            line = status_line(standing._replace(note=self._note))
            if line != told and self._notifier.send(STATUS=line):
                told = line
            if {"starting", "draining"}.intersection(standing.not_ready):
                self._notifier.send(EXTEND_TIMEOUT_USEC=int(EXTENSION_S * 1e6))
            await self._clock.sleep(TELL_S)

    async def feed(self, system: ActorSystem) -> None:
        """Feed the watchdog, where there is one, as long as actors answer and the disk takes what is written. For ever."""

        async def prove() -> None:
            try:
                await system.ask("jobs", ProveAlive())
            except StoreFailed:
                # The writer answers; there is no room. That is told by the status, and no restart mends it. A disk that fails
                # proves nothing.
                if not self._is_full():
                    raise

        if self._notifier.watchdog_s is not None:
            await feed_watchdog(self._notifier, prove, self._clock)

    async def obey(self, signals: AsyncIterator[signal.Signals], system: ActorSystem) -> None:
        """Do what signals say, for ever; those that end the daemon are handed on in :attr:`stops`."""
        async with anyio.create_task_group() as tasks:
            async for received in signals:
                if received in STOPS or (received is signal.SIGHUP and self._lost_terminal()):
                    self.stops.put_nowait(received)
                elif received is signal.SIGHUP:
                    tasks.start_soon(self.reload)  # beside: a slow disk must not hold up the next signal
                else:
                    self.dump(system)

    async def reload(self) -> None:
        """Read the configuration again; what can apply does, and what cannot is said. One that is wrong, or
        cannot be read, changes nothing.
        """
        async with self._reloading:
            await self._notifier.reloading()
            try:
                wanted = await anyio.to_thread.run_sync(self._read_again)
            except EsperError as error:  # wrong, or not to be read now: the file itself, the allow-list, a key
                self._note = f"reload failed, the configuration stays as it was: {error}"
                log.error("reload failed, the configuration stays as it was", error=str(error))  # noqa: TRY400 - typed
            else:
                found = compare(self._in_force(), wanted)
                self._apply(found.config)
                self._note = found.note
                log.info("reloaded", applied=list(found.applied), needs_restart=list(found.needs_restart))
            await self.ready()

    async def ready(self) -> None:
        """Tell the manager that the daemon serves."""
        standing = await self._standing()
        await self._notifier.ready(status_line(standing._replace(note=self._note)))

    async def stopping(self) -> None:
        """Tell the manager that the daemon ends."""
        standing = await self._standing()
        await self._notifier.stopping(status_line(standing._replace(note=self._note)))
        self._notifier.send(EXTEND_TIMEOUT_USEC=int(EXTENSION_S * 1e6))

    def dump(self, system: ActorSystem) -> None:
        """Write down what the daemon is at."""
        dump(system.status(), system.dead_letters.counts, asyncio.all_tasks())

    def _lost_terminal(self) -> bool:
        """Whether the daemon ran in a terminal that was closed; it can write there no more, and ends."""
        if not self._on_terminal or sys.stderr.isatty():
            return False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        self._on_terminal = False
        return True
