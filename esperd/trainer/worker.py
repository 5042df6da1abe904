"""The trainer's process: takes one lease, trains it, says how it ended. ``python -m esperd.trainer.worker``, by the daemon.

The training loop runs in the main thread and never awaits; the link to the daemon beats in a thread of its own, so a long
step is not mistaken for a dead worker.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import structlog

from esperd import tracing
from esperd.actors.leaving import leave
from esperd.actors.threadlink import ThreadLink
from esperd.config import Telemetry, load_config
from esperd.errors import ConfigError, EsperError, OutOfMemory, StoreFailed
from esperd.logs import configure_logging
from esperd.messages.jobs import JobError
from esperd.messages.leases import (
    EXIT_NO_FAULT,
    JobBroken,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
)
from esperd.plugins import load_plugins
from esperd.store.blobs import Blobs
from esperd.trainer import memory
from esperd.trainer.circumstances import circumstances
from esperd.trainer.link_desk import DAEMON_TROUBLE, LinkDesk
from esperd.trainer.passes import Stopped
from esperd.trainer.session import Session

LOOK_S = 0.5
"""How often a worker without a lease looks whether its daemon is still there."""
LEASE_TIMEOUT_S = 60.0
"""How long it waits for one. Whoever started it hands it over at once, so after this nobody knows of this worker."""

DISK_REFUSES = frozenset({"ENOSPC", "EDQUOT", "EROFS", "EIO"})
"""The state directory cannot be written: the machine's trouble, not the job's."""

log = structlog.get_logger()


def main() -> int:
    """Train one lease.

    Returns:
        0 when the job's end was reported, or no lease came; 75 when the daemon was lost or could not be told, or the disk
        would not take the artifacts.
    """
    config = load_config()
    configure_logging(config.daemon.log_level)
    desks: list[LinkDesk] = []
    link = ThreadLink(step=lambda: desks[0].step if desks else None, breakers=lambda: desks[0].breakers() if desks else ())
    with link:
        lease = _await_lease(link)
        if lease is None:
            return 0
        desk = LinkDesk(link, lease, breakers=config.breakers)
        desks.append(desk)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: desk.drain())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        structlog.contextvars.bind_contextvars(
            actor=link.name, generation=link.generation, job=lease.job_id, attempt=lease.generation
        )
        try:
            with _traced(config.telemetry, lease):
                with tracing.span("trainer attempt", parent=lease.trace, job=lease.job_id, attempt=lease.generation):
                    ended = _train(desk, lease)
                desk.record_rest()
                desk.report(ended)  # before the last spans are sent: the job is over, wherever its collector is
        except (*DAEMON_TROUBLE, StoreFailed) as error:
            log.warning("left through no fault of the job", job=lease.job_id, code=error.code, error=str(error))
            return EXIT_NO_FAULT
    return 0


def _traced(settings: Telemetry, lease: Lease) -> AbstractContextManager[None]:
    """Send spans, where somebody traces the job. A job's own ``python`` may lack what its daemon has: it trains untraced."""
    if not settings.otlp_endpoint or not tracing.is_sampled(lease.trace):
        return contextlib.nullcontext()
    try:
        tracing.require_collector(settings.otlp_endpoint)
    except ConfigError as error:
        log.warning("not traced", error=str(error))
        return contextlib.nullcontext()
    return tracing.exporting(settings.otlp_endpoint, "esperd trainer", every_step=settings.trace_steps)


def _await_lease(link: ThreadLink, clock: Callable[[], float] = time.monotonic) -> Lease | None:
    """The lease; None when the daemon wants this process to end, is gone, or has forgotten it, before it gave one."""
    give_up_at = clock() + LEASE_TIMEOUT_S
    while not link.daemon_lost and clock() < give_up_at:
        try:
            message = link.received.get(timeout=LOOK_S)
        except queue.Empty:
            continue
        return message if isinstance(message, Lease) else None
    return None


def _train(desk: LinkDesk, lease: Lease) -> JobSucceeded | JobStopped | JobBroken:
    """The job's end, as a message to the jobs actor.

    Raises:
        StoreFailed: when the disk would not take what the job found.
        EsperError: when the daemon could not be told, see :data:`DAEMON_TROUBLE`.
    """
    os.chdir(lease.job.workdir)
    sys.path.insert(0, lease.job.workdir)
    job_id, generation = lease.job_id, lease.generation
    plugins = load_plugins(load_config().plugins.blocked)
    try:
        blobs, checkpoints = Blobs(Path(lease.blob_directory)), Blobs(Path(lease.checkpoint_directory))
        limits = lease.job.resources
        if limits.memory_bytes:
            memory.watch(limits.memory_bytes)
        if limits.gpu_memory_bytes and lease.job.device == "cuda":
            memory.limit_gpu(limits.gpu_memory_bytes)
        session = Session(lease.job, plugins, desk, blobs, checkpoints=checkpoints, resumed=lease.resumed, pieces=lease.pieces)
        found = circumstances(lease.job, session.splits.fingerprint, session.device)
        desk.report(JobStarted(job_id=job_id, generation=generation, circumstances=found))
        outcome = session.train(lease.checkpoint)
    except Stopped as stopped:
        return JobStopped(job_id=job_id, generation=generation, why=stopped.why, peak=memory.peak())
    except DAEMON_TROUBLE:
        raise
    except EsperError as error:
        if isinstance(error, StoreFailed) and error.fields.get("errno") in DISK_REFUSES:
            raise
        if full := memory.as_out_of_memory(error):
            return _starved(full, lease)
        broken = JobError(code=error.code, message=str(error), traceback=_story(error))
        return JobBroken(job_id=job_id, generation=generation, error=broken, peak=memory.peak())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever the user's code raises ends the job, with its traceback
        if full := memory.as_out_of_memory(error):
            return _starved(full, lease)
        message = f"{type(error).__name__}: {error}"
        broken = JobError(code="job_failed", message=message, traceback=traceback.format_exc())
        return JobBroken(job_id=job_id, generation=generation, error=broken, peak=memory.peak())
    return JobSucceeded(
        job_id=job_id, generation=generation, epoch=outcome.epoch, artifacts=outcome.artifacts, peak=memory.peak()
    )


def _starved(error: OutOfMemory, lease: Lease) -> JobBroken:
    """Memory ran out: the daemon decides whether a smaller attempt follows."""
    told = JobError(code=error.code, message=str(error), traceback=traceback.format_exc())
    return JobBroken(job_id=lease.job_id, generation=lease.generation, error=told, peak=memory.peak())


def _story(error: EsperError) -> str:
    """The traceback of the user's code where the error carries one; our own checks speak for themselves."""
    carried = error.fields.get("traceback")
    return carried if isinstance(carried, str) else ""


if __name__ == "__main__":
    leave(main())
