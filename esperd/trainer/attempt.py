"""One attempt at a job: what a lease says is trained, and the job's end told as a message."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path

from esperd.config import load_config
from esperd.errors import EsperError, OutOfMemory, StoreFailed
from esperd.messages.jobs import JobError
from esperd.messages.leases import (
    JobBroken,
    JobStarted,
    JobStopped,
    JobSucceeded,
    Lease,
)
from esperd.plugins import load_plugins
from esperd.store.blobs import Blobs
from esperd.store.refusal import ERRNOS
from esperd.trainer import memory
from esperd.trainer.circumstances import circumstances
from esperd.trainer.link_desk import DAEMON_TROUBLE, LinkDesk
from esperd.trainer.passes import Stopped
from esperd.trainer.session import Session

DISK_REFUSES = frozenset(errno.errorcode[number] for number in ERRNOS)
"""The state directory cannot be written: the machine's trouble, not the job's."""


def train(desk: LinkDesk, lease: Lease) -> JobSucceeded | JobStopped | JobBroken:
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
