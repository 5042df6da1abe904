"""The daemon through the worker's link: patient where it is away for a moment, so that no job pays for it."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from esperd.actors.breaker import Breaker, Limits
from esperd.actors.clock import SystemClock
from esperd.actors.threadlink import ThreadLink
from esperd.config import Breakers
from esperd.errors import (
    ActorUnavailable,
    AskTimeout,
    Busy,
    CircuitOpen,
    Conflict,
    DaemonUnreachable,
    EsperError,
    HandlerFailed,
    StoreFailed,
)
from esperd.messages.base import Done, Message, MessageT, Reply
from esperd.messages.control import BreakerStatus, Stop
from esperd.messages.kernels import KernelKey, KernelProvided, ProvideKernel
from esperd.messages.leases import (
    CheckpointWritten,
    Lease,
    StopJob,
)
from esperd.messages.policy import Conclude, Decide, Decided
from esperd.messages.telemetry import Body, BreakerChanged, NewEvent, Record
from esperd.trainer.desk import StopReason

DECIDE_TIMEOUT_S = 30.0
KERNEL_TIMEOUT_S = 600.0
"""A kernel may have to be compiled first, behind others."""

PATIENCE_S = 60.0
"""How long what must be told is told again, while the daemon lives and cannot take it; chosen, not measured."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 2.0
"""A lost daemon is noticed after this long at the latest."""
UNPATIENT_TIMEOUT_S = 5.0
"""For an answer of an event log that was away the last time."""
MOST_UNRECORDED = 1_000
"""Batches of events kept while the event log is away; beyond it the oldest are dropped, and counted."""

PASSING = (ActorUnavailable, AskTimeout, Busy, StoreFailed)
"""What a daemon that will be well again answers with. What is told again is recorded once: batches have keys, the rest is the
same however often it is said."""

DAEMON_TROUBLE = (DaemonUnreachable, ActorUnavailable, AskTimeout, Busy, Conflict, HandlerFailed)
"""The daemon could not record what this worker said, or gave the job to another. The job is not at fault: whoever holds it
next goes on from its last checkpoint."""

log = structlog.get_logger()


class LinkDesk:
    """The daemon through the worker's link.

    Args:
        link: open.
        lease: what this worker holds.
        breakers: by service (``policy``, ``cache``, ``telemetry``): when one that does not answer is no longer waited for. Errors
            that come at once cost nothing and count for nothing.
        clock: seconds, monotonic.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        link: ThreadLink,
        lease: Lease,
        *,
        breakers: Breakers | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._changes: list[Body] = []
        settings = breakers or Breakers()
        self._breakers = {
            service: Breaker(
                service, Limits(failures=found.failures, reset_s=found.reset_s), clock, (AskTimeout,), self._breaker_changed
            )
            for service, found in (("policy", settings.policy), ("cache", settings.cache), ("telemetry", settings.telemetry))
        }
        self._link = link
        self._lease = lease
        self._clock = clock
        self._sleep = sleep
        self._records = 0
        self._unrecorded: deque[Record] = deque()
        self._log_is_away = False
        self._stop: StopReason | None = None
        self.dropped = 0
        """Events that the event log never took."""
        self.step = 0

    @property
    def job_id(self) -> str:
        """The job, as the daemon knows it."""
        return self._lease.job_id

    def decide(self, request: Decide) -> Decided:
        """Ask the policy actor.

        Raises:
            CircuitOpen: while it is left alone, because it kept this worker waiting.
            EsperError: whatever it answered with.
        """
        with self._breakers["policy"].attempt():
            return self._ask("policy", request, Decided, DECIDE_TIMEOUT_S)

    def conclude(self, ending: Conclude) -> None:
        """Tell the policy actor. Always tried: it is said once, and what is not said is not known to later jobs."""
        self._ask("policy", ending, Done, DECIDE_TIMEOUT_S)

    def kernel(self, key: KernelKey) -> KernelProvided:
        """Ask the cache actor."""
        with self._breakers["cache"].attempt():
            return self._ask("cache", ProvideKernel(key=key, job=self.job_id), KernelProvided, KERNEL_TIMEOUT_S)

    def record(self, bodies: Sequence[Body]) -> None:
        """Send events to the telemetry actor and wait until they are logged: order and completeness matter more than speed.

        An event log that stays away is waited for once. From then on what happens is kept, tried again with every new batch
        and dropped, oldest first, when it becomes too much: a job never ends over its events.

        Raises:
            DaemonUnreachable: when the daemon is lost.
        """
        self._records += 1
        now = SystemClock().wall()
        events = tuple(NewEvent(at=now, body=body) for body in (*self._changes, *bodies))
        self._changes.clear()
        self._unrecorded.append(Record(job=self.job_id, key=f"{self._lease.generation}-{self._records}", events=events))
        if len(self._unrecorded) > MOST_UNRECORDED:
            self._drop("too many events wait")
        self._hand_in(patiently=not self._log_is_away)

    def record_rest(self) -> None:
        """Try once more, patiently, to have everything logged; before the job's end is told.

        Raises:
            DaemonUnreachable: when the daemon is lost.
        """
        self._hand_in(patiently=True)
        while self._unrecorded:
            self._drop("the event log stayed away")
        if self.dropped:
            log.warning("events were lost", job=self.job_id, events=self.dropped)

    def checkpoint_written(self, sha256: str, epoch: int) -> None:
        """Have the checkpoint recorded; durable on return.

        Raises:
            ActorUnavailable: when the daemon lives and cannot record it; the one before it stays the one to resume from.
            DaemonUnreachable: when the daemon is lost.
            Conflict: when the lease has ended.
        """
        self.report(CheckpointWritten(job_id=self.job_id, generation=self._lease.generation, sha256=sha256, epoch=epoch))

    def report(self, message: Message) -> None:
        """Tell the jobs actor; recorded on return.

        Raises:
            ActorUnavailable: when the daemon lives and cannot record it for a minute.
            DaemonUnreachable: when the daemon is lost.
            Conflict: when the lease has ended.
        """
        self._ask_patiently("jobs", message)

    def stop_requested(self) -> StopReason | None:
        """Whether the daemon, a signal or the daemon's death asks the session to stop."""
        while self._stop is None:
            try:
                message = self._link.received.get_nowait()
            except queue.Empty:
                break
            self._note(message)
        if self._stop is None and self._link.daemon_lost:
            self._stop = "drain"
        return self._stop

    def drain(self) -> None:
        """Stop after the current step, to be resumed later."""
        self._stop = self._stop or "drain"

    def progressed(self, step: int) -> None:
        """Remember the step for the next heartbeat."""
        self.step = step

    def breakers(self) -> tuple[BreakerStatus, ...]:
        """Where the breakers of this worker stand. Safe to ask from any thread."""
        return tuple(breaker.status() for breaker in self._breakers.values())

    def _breaker_changed(self, status: BreakerStatus) -> None:
        log.warning("a service is left alone or tried again", job=self.job_id, service=status.service, state=str(status.state))
        self._changes.append(BreakerChanged(breaker=status))

    def _note(self, message: Message) -> None:
        if isinstance(message, StopJob):
            self._stop = message.why
        elif isinstance(message, Stop):
            self._stop = "drain"

    def _hand_in(self, *, patiently: bool) -> None:
        """Have the batches that wait logged, oldest first, as far as the log takes them."""
        while self._unrecorded:
            try:
                if patiently:
                    self._ask_patiently("telemetry", self._unrecorded[0])
                else:
                    with self._breakers["telemetry"].attempt():
                        self._link.ask("telemetry", self._unrecorded[0], UNPATIENT_TIMEOUT_S)
            except DaemonUnreachable:
                raise
            except (*PASSING, CircuitOpen) as error:
                if not self._log_is_away:
                    log.warning("events are kept until the event log is back", job=self.job_id, error=str(error))
                self._log_is_away = True
                return
            except EsperError as error:
                self._drop(f"{error.code}: {error}")
                continue
            self._unrecorded.popleft()
            self._log_is_away = False

    def _drop(self, why: str) -> None:
        """Give up the oldest batch."""
        batch = self._unrecorded.popleft()
        self.dropped += len(batch.events)
        log.warning("events dropped", job=self.job_id, batch=batch.key, events=len(batch.events), dropped=self.dropped, why=why)

    def _ask_patiently(self, to: str, message: Message) -> Reply:
        """Ask until it is answered, while the daemon lives and for :data:`PATIENCE_S` at most.

        Raises:
            ActorUnavailable: when it was not; says what stood in the way the last time.
            EsperError: that another try would meet again, :class:`DaemonUnreachable` among them.
        """
        give_up_at = self._clock() + PATIENCE_S
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return self._link.ask(to, message)
            except PASSING as error:
                if self._clock() + wait_s > give_up_at:
                    raise ActorUnavailable(
                        f"{to} could not take {type(message).__name__} for {PATIENCE_S:g} s: {error}", actor=to, code=error.code
                    ) from error
                log.warning("asking again", job=self.job_id, to=to, message_type=type(message).__name__, error=str(error))
            self._sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _ask(self, to: str, message: Message, answer: type[MessageT], timeout_s: float) -> MessageT:
        reply = self._link.ask(to, message, timeout_s)
        if not isinstance(reply, answer):
            raise EsperError(f"{to} answered {type(message).__name__} with {type(reply).__name__}")
        return reply
