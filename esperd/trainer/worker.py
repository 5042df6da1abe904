"""The trainer's process: takes one lease, trains it, says how it ended. ``python -m esperd.trainer.worker``, by the daemon.

The training loop runs in the main thread and never awaits; the link to the daemon beats in a thread of its own, so a long
step is not mistaken for a dead worker.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import structlog

from esperd.actors.clock import SystemClock
from esperd.actors.leaving import leave
from esperd.actors.threadlink import ThreadLink
from esperd.config import load_config
from esperd.errors import ActorUnavailable, AskTimeout, Busy, Conflict, DaemonUnreachable, EsperError, HandlerFailed
from esperd.logs import configure_logging
from esperd.messages.base import Message, MessageT
from esperd.messages.control import Stop
from esperd.messages.jobs import (
    CheckpointWritten,
    JobBroken,
    JobError,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
    StopJob,
)
from esperd.messages.kernels import KernelKey, KernelProvided, ProvideKernel
from esperd.messages.policy import Decide, Decided
from esperd.messages.telemetry import Body, NewEvent, Record
from esperd.plugins import load_plugins
from esperd.store.blobs import Blobs
from esperd.trainer.desk import StopReason
from esperd.trainer.run import Stopped
from esperd.trainer.session import Session

LOOK_S = 0.5
"""How often a worker without a lease looks whether its daemon is still there."""
DECIDE_TIMEOUT_S = 30.0
KERNEL_TIMEOUT_S = 600.0
"""A kernel may have to be compiled first, behind others."""

EXIT_LOST_DAEMON = 75
"""EX_TEMPFAIL: the job is not at fault and goes on with the next daemon."""

DAEMON_TROUBLE = (DaemonUnreachable, ActorUnavailable, AskTimeout, Busy, Conflict, HandlerFailed)
"""The daemon could not record what this worker said, or gave the job to another. The job is not at fault: whoever holds it
next goes on from its last checkpoint."""

log = structlog.get_logger()


class LinkDesk:
    """The daemon through the worker's link."""

    def __init__(self, link: ThreadLink, lease: Lease) -> None:
        self._link = link
        self._lease = lease
        self._records = 0
        self._stop: StopReason | None = None
        self.step = 0

    @property
    def job_id(self) -> str:
        """The job, as the daemon knows it."""
        return self._lease.job_id

    def decide(self, request: Decide) -> Decided:
        """Ask the policy actor."""
        return self._ask("policy", request, Decided, DECIDE_TIMEOUT_S)

    def kernel(self, key: KernelKey) -> KernelProvided:
        """Ask the cache actor."""
        return self._ask("cache", ProvideKernel(key=key, job=self.job_id), KernelProvided, KERNEL_TIMEOUT_S)

    def record(self, bodies: Sequence[Body]) -> None:
        """Send events to the telemetry actor and wait until they are logged: order and completeness matter more than speed."""
        self._records += 1
        now = SystemClock().wall()
        events = tuple(NewEvent(at=now, body=body) for body in bodies)
        key = f"{self._lease.generation}-{self._records}"
        self._link.ask("telemetry", Record(job=self.job_id, key=key, events=events))

    def checkpoint_written(self, sha256: str, epoch: int) -> None:
        """Have the checkpoint recorded; durable on return."""
        self._link.ask(
            "jobs",
            CheckpointWritten(job_id=self.job_id, generation=self._lease.generation, sha256=sha256, epoch=epoch),
        )

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

    def _note(self, message: Message) -> None:
        if isinstance(message, StopJob):
            self._stop = message.why
        elif isinstance(message, Stop):
            self._stop = "drain"

    def _ask(self, to: str, message: Message, answer: type[MessageT], timeout_s: float) -> MessageT:
        reply = self._link.ask(to, message, timeout_s)
        if not isinstance(reply, answer):
            raise EsperError(f"{to} answered {type(message).__name__} with {type(reply).__name__}")
        return reply


def main() -> int:
    """Train one lease.

    Returns:
        0 when the job's end was reported, or no lease came; 75 when the daemon was lost or could not be told.
    """
    config = load_config()
    configure_logging(config.daemon.log_level)
    desks: list[LinkDesk] = []
    link = ThreadLink(step=lambda: desks[0].step if desks else None)
    with link:
        lease = _await_lease(link)
        if lease is None:
            return 0
        desk = LinkDesk(link, lease)
        desks.append(desk)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: desk.drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            link.ask("jobs", _train(desk, lease, link))
        except DAEMON_TROUBLE as error:
            log.warning("the daemon could not be told", job=lease.job_id, code=error.code, error=str(error))
            return EXIT_LOST_DAEMON
    return 0


def _await_lease(link: ThreadLink) -> Lease | None:
    """The lease; None when the daemon wants this process to end, or is gone, before it gave one."""
    while not link.daemon_lost:
        try:
            message = link.received.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        return message if isinstance(message, Lease) else None
    return None


def _train(desk: LinkDesk, lease: Lease, link: ThreadLink) -> JobSucceeded | JobStopped | JobBroken:
    """The job's end, as a message to the jobs actor."""
    os.chdir(lease.job.workdir)
    sys.path.insert(0, lease.job.workdir)
    job_id, generation = lease.job_id, lease.generation
    plugins = load_plugins(load_config().plugins.blocked)
    try:
        session = Session(lease.job, plugins, desk, Blobs(Path(lease.blob_directory)), resumed=lease.resumed)
        link.ask("jobs", JobStarted(job_id=job_id, generation=generation))
        outcome = session.train(lease.checkpoint)
    except Stopped as stopped:
        return JobStopped(job_id=job_id, generation=generation, why=stopped.why)
    except DAEMON_TROUBLE:
        raise
    except EsperError as error:
        broken = JobError(code=error.code, message=str(error), traceback=_story(error))
        return JobBroken(job_id=job_id, generation=generation, error=broken)
    except MemoryError:
        raise  # the process is beyond repair: the daemon starts another, from the last checkpoint
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's code raises ends the job, with its traceback
        message = f"{type(error).__name__}: {error}"
        broken = JobError(code="job_failed", message=message, traceback=traceback.format_exc())
        return JobBroken(job_id=job_id, generation=generation, error=broken)
    return JobSucceeded(job_id=job_id, generation=generation, epoch=outcome.epoch, artifacts=outcome.artifacts)


def _story(error: EsperError) -> str:
    """The traceback of the user's code where the error carries one; our own checks speak for themselves."""
    carried = error.fields.get("traceback")
    return carried if isinstance(carried, str) else ""


if __name__ == "__main__":
    leave(main())
