"""Changes of a job's state, on their way into the event log: in order, and again until the log takes them."""

from __future__ import annotations

import time
from collections import deque

import anyio
import structlog

from esperd.actors.actor import Context
from esperd.errors import ActorUnavailable, AskTimeout, Busy, EsperError, StoreFailed
from esperd.messages.jobs import JobInfo
from esperd.messages.telemetry import JobStateChanged, NewEvent, Record

RETRY_S = 0.5
PASSING = (ActorUnavailable, AskTimeout, Busy, StoreFailed)
"""What an event log that is away for a while answers with."""

log = structlog.get_logger()


class Announcer:
    """Asks the telemetry actor rather than telling it: a log that cannot be written must neither end that actor nor hold up
    the one that leases jobs.

    Args:
        context: of the actor that announces.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        # Bounded by the changes of state that happen while the log is away.
        self._waiting: deque[Record] = deque()
        self._something_waits = anyio.Event()
        self._nothing_waits = anyio.Event()
        self._nothing_waits.set()

    def announce(self, info: JobInfo) -> None:
        """Have a job's state logged and published, after those announced before."""
        body = JobStateChanged(state=info.state, attempt=info.attempt, error=info.error)
        key = f"state:{info.attempt}:{info.state}:{time.time_ns()}"
        self._waiting.append(Record(job=info.id, key=key, events=(NewEvent(at=self._context.clock.wall(), body=body),)))
        if self._nothing_waits.is_set():
            self._nothing_waits = anyio.Event()
        self._something_waits.set()

    async def run(self) -> None:
        """Hand over what was announced, for ever."""
        while True:
            await self._something_waits.wait()
            while self._waiting:
                await self._hand_over(self._waiting[0])
            self._something_waits = anyio.Event()
            self._nothing_waits.set()

    async def emptied(self) -> None:
        """Return once everything announced was handed over."""
        await self._nothing_waits.wait()

    async def _hand_over(self, record: Record) -> None:
        try:
            await self._context.ask("telemetry", record)
        except PASSING as error:
            log.warning("a job's state is not logged yet", job=record.job, waiting=len(self._waiting), error=str(error))
            await self._context.clock.sleep(RETRY_S)
            return
        except EsperError as error:
            log.error("a job's state cannot be logged", job=record.job, key=record.key, code=error.code, error=str(error))  # noqa: TRY400 - a typed error needs no traceback
        self._waiting.popleft()
