"""What the daemon tells a service manager, and what it proves to its watchdog: the protocol of ``sd_notify(3)``.

Everything is one datagram to the socket that ``$NOTIFY_SOCKET`` names; without one nothing is sent and nothing changes.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Literal, NamedTuple, Self

import anyio
import structlog

from esperd.actors.clock import Clock
from esperd.errors import EsperError

SOCKET_VARIABLE = "NOTIFY_SOCKET"
WATCHDOG_VARIABLE = "WATCHDOG_USEC"
WATCHDOG_PID_VARIABLE = "WATCHDOG_PID"

RETRY_S = 0.05
"""After a datagram that found the manager's queue full; chosen, not measured."""
TRIES = 100
"""Of a datagram that must arrive; chosen, not measured."""
FAILED_PROOF_RETRY_S = 1.0
"""After a proof that failed, at most: one that failed for a moment must not cost a whole period; chosen, not measured."""

log = structlog.get_logger()


class Standing(NamedTuple):
    """What the status line tells."""

    not_ready: Sequence[str]
    running: int
    queued: int | None
    """None while the store does not say."""
    note: str = ""
    """What became of the last reload."""


class Notifier:
    """Speaks to the service manager. Never raises: a manager that is gone is no reason to stop.

    Args:
        address: of the socket: a path, or ``@`` and a name in the abstract namespace; None or "": nobody listens.
        watchdog_s: how long the manager waits for a sign of life; None: it does not.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self.watchdog_s = watchdog_s
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self._socket: socket.socket | None = None
        if not address:
            return
        if address[0] not in "/@":
            log.warning("the service manager is not told anything: its socket is of an unknown kind", address=address)
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> Self:
        """As the service manager asked for. Its variables are taken out of the environment: they are not meant for workers.

        Args:
            environment: variables; ``os.environ``.
            pid: of this process. Where ``$WATCHDOG_PID`` names another one, the watchdog does not watch us.
        """
        address = environment.pop(SOCKET_VARIABLE, None)
        watchdog = environment.pop(WATCHDOG_VARIABLE, "")
        watched = environment.pop(WATCHDOG_PID_VARIABLE, "") or str(pid)
        is_ours = watchdog.isdecimal() and int(watchdog) > 0 and watched == str(pid)
        return cls(address, int(watchdog) / 1e6 if is_ours else None)

    @property
    def is_heard(self) -> bool:
        """Whether there is a service manager to tell."""
        return self._socket is not None

    def send(self, **said: str | int) -> bool:
        """One datagram, at once; False when it did not arrive, now or ever.

        Args:
            said: assignments of ``sd_notify(3)``, in order: ``send(READY=1, STATUS="well")``.
        """
        return self._offer(said) == "taken"

    async def assure(self, **said: str | int) -> None:
        """A datagram that must arrive: offered again while the manager's queue is full, for a few seconds."""
        for _ in range(TRIES):
            if self._offer(said) != "full":
                return
            await anyio.sleep(RETRY_S)
        log.warning("the service manager takes nothing", said=" ".join(said))

    def _offer(self, said: Mapping[str, str | int]) -> Literal["taken", "full", "refused"]:
        if self._socket is None or self._address is None:
            return "refused"
        # A line break would begin another assignment.
        lines = [f"{name}={' '.join(str(value).split())}" for name, value in said.items()]
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except BlockingIOError:
            return "full"
        except OSError as error:
            log.warning("the service manager could not be told", said=" ".join(said), error=str(error))
            return "refused"
        return "taken"

    async def ready(self, status: str) -> None:
        """The daemon serves, or serves again after :meth:`reloading`."""
        await self.assure(READY=1, STATUS=status)

    async def reloading(self) -> None:
        """The configuration is being read again. The time stamp is what a manager tells an old answer from a new one by, so both
        must come in one datagram.
        """
        await self.assure(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    async def stopping(self, status: str) -> None:
        """The daemon ends."""
        await self.assure(STOPPING=1, STATUS=status)

    def close(self) -> None:
        """Say nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def status_line(standing: Standing) -> str:
    """One line for ``systemctl status``."""
    queued = "unknown" if standing.queued is None else str(standing.queued)
    parts = [
        "ready" if not standing.not_ready else f"not ready: {', '.join(standing.not_ready)}",
        f"jobs: {standing.running} running, {queued} queued",
        standing.note,
    ]
    return "; ".join(part for part in parts if part)


async def feed_watchdog(notifier: Notifier, prove: Callable[[], Awaitable[None]], clock: Clock) -> None:
    """Tell the watchdog that the daemon is alive, for ever, twice in each of its periods, and only after each proof.

    Runs on the event loop, never on a thread of its own: a loop that is blocked feeds nobody.

    Args:
        notifier: whose ``watchdog_s`` is set.
        prove: returns once the daemon did what it is there for, or raises. It gets half a period.
        clock: time between two proofs.

    Raises:
        ValueError: when nobody watches.
    """
    if notifier.watchdog_s is None:
        raise ValueError("there is no watchdog to feed")
    interval_s = notifier.watchdog_s / 2
    failed = False
    while True:
        began = clock.monotonic()
        try:
            with anyio.fail_after(interval_s):
                await prove()
        except (EsperError, TimeoutError) as error:
            if not failed:
                log.error("the watchdog is not fed", error=str(error) or f"no proof of life within {interval_s:g} s")  # noqa: TRY400 - typed
            failed = True
            await clock.sleep(min(interval_s, FAILED_PROOF_RETRY_S))
            continue
        if failed:
            log.info("the watchdog is fed again")
        failed = False
        notifier.send(WATCHDOG=1)
        await clock.sleep(max(0.0, interval_s - (clock.monotonic() - began)))
