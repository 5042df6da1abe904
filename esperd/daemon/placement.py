"""Whether a job fits on the machine beside those that run: pure; what it does not know it holds against nobody."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from esperd.config import Resources
from esperd.daemon.machine import Machine
from esperd.messages.jobs import Job

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a job takes while it runs. None: not known."""

    memory_bytes: int | None
    cores: int
    gpu_memory_bytes: int | None


NOT_KNOWN = Need(memory_bytes=None, cores=1, gpu_memory_bytes=None)
"""Of a job that nobody has looked at."""


def allowance(machine: Machine, configured: Resources) -> Machine:
    """What jobs may use together: as configured, else all that the machine has."""
    return Machine(
        memory_bytes=configured.memory_bytes or machine.memory_bytes,
        cores=configured.cores or machine.cores,
        gpu_memory_bytes=configured.gpu_memory_bytes or machine.gpu_memory_bytes,
    )


def need(job: Job, peak_memory_bytes: int | None = None, peak_gpu_bytes: int | None = None) -> Need:
    """What a job takes: what it declares, else what such a job was measured to take.

    Args:
        job: as submitted.
        peak_memory_bytes: of an earlier attempt, or of a job like it; None: never measured.
        peak_gpu_bytes: likewise.
    """
    return Need(
        memory_bytes=job.resources.memory_bytes or peak_memory_bytes,
        cores=job.threads,
        gpu_memory_bytes=(job.resources.gpu_memory_bytes or peak_gpu_bytes) if job.device == "cuda" else None,
    )


def never_fits(wanted: Need, room: Machine) -> str:
    """Why a job could not even run alone; empty when it could."""
    return _lacking(wanted, [], room)


def waits_for(wanted: Need, running: Iterable[Need], room: Machine) -> str:
    """What a job waits for beside those that run; empty when it fits. Alone, what was measured does not keep it from a try."""
    held = list(running)
    return _lacking(wanted, held, room) if held else ""


def _lacking(wanted: Need, held: list[Need], room: Machine) -> str:
    cores = sum(each.cores for each in held)
    if wanted.cores + cores > max(room.cores, 1.0):
        return f"cores: it takes {wanted.cores}, {_of(cores, held)} of {room.cores:g}"
    for name, what in (("memory_bytes", "memory"), ("gpu_memory_bytes", "GPU memory")):
        wants, has = getattr(wanted, name), getattr(room, name)
        if wants is None or has is None:
            continue
        taken = sum(getattr(each, name) or 0 for each in held)
        if wants + taken > has:
            return f"{what}: it takes {wants / GIB:.2f} GiB, {_of(f'{taken / GIB:.2f} GiB', held)} of {has / GIB:.2f} GiB"
    return ""


def _of(taken: object, held: list[Need]) -> str:
    return f"{len(held)} running jobs take {taken}" if held else "jobs may use none but that much together:"


def kind_of(job: Job) -> bytes:
    """What decides how much memory a job takes, as far as the daemon can see: alike jobs are expected to take alike."""
    return msgspec.msgpack.encode(
        [job.host, job.host_options, job.data, job.batch_size, job.precision, job.device], order="sorted"
    )
