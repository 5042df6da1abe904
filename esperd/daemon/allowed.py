"""What code a job may run: its ``module:function`` names, its interpreter and its directories, against the lists allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from esperd.config import Jobs
from esperd.errors import NotAllowed
from esperd.messages.jobs import Job


def check_allowed(job: Job, limits: Jobs) -> None:
    """Refuse a job that names what the configuration does not allow. Empty lists allow everything.

    Args:
        job: as submitted.
        limits: ``allowed_modules``, ``allowed_pythons``, ``allowed_workdirs`` are used.

    Raises:
        NotAllowed: names key, value and what is allowed.
    """
    if limits.allowed_modules:
        for key, name in modules_of(job):
            _require(
                is_module_under(name.partition(":")[0], limits.allowed_modules), key, name, "modules", limits.allowed_modules
            )
    if job.python and (limits.allowed_pythons or limits.allowed_modules):
        _require(_interpreter_under(job.python, limits.allowed_pythons), "python", job.python, "pythons", limits.allowed_pythons)
    if limits.allowed_workdirs:
        where = limits.allowed_workdirs
        _require(_is_under(Path(job.workdir), where), "workdir", job.workdir, "workdirs", where)
        for key, path in paths_of(job):
            _require(_is_under(Path(job.workdir) / Path(path).expanduser(), where), key, path, "workdirs", where)


def modules_of(job: Job) -> Iterator[tuple[str, str]]:
    """Every ``module:function`` a job names, with its key."""
    named = {
        "host": job.host,
        "data": job.data,
        "loss": job.loss,
        "metric": job.metric or "",
        "optimizer.name": job.optimizer.name,
        "scheduler.name": job.scheduler.name,
    }
    yield from ((key, name) for key, name in named.items() if ":" in name)


def paths_of(job: Job) -> Iterator[tuple[str, str]]:
    """Every path a job names beside its folder, with its key: what it reads, and where it writes."""
    if ":" not in job.data:
        if job.data.endswith(".npz"):
            yield "data", job.data
        path = job.data_options.get("path")
        if isinstance(path, str):
            yield "data_options.path", path
    if job.export.directory is not None:
        yield "export.directory", job.export.directory


def is_module_under(module: str, prefixes: Sequence[str]) -> bool:
    """True when a module is one of these packages or lies in one; ``mylab`` does not allow ``mylabel``."""
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def _interpreter_under(python: str, allowed: Sequence[str]) -> bool:
    """Whether an interpreter is allowed. Its own link is not followed: a virtual environment's leads to the system's Python, and
    the link is what chooses the environment. The directories on the way to it are.
    """
    path = Path(python)
    if not path.is_absolute():
        return False  # which one it is depends on a search path
    return _is_under(path.parent, allowed) or str(Path(os.path.realpath(path.parent)) / path.name) in allowed


def _is_under(path: Path, directories: Sequence[str]) -> bool:
    """Whether a path lies in one of these directories once every link and ``..`` in it is followed."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(directory)) for directory in directories)


def _require(held: bool, key: str, value: str, what: str, allowed: Sequence[str]) -> None:  # noqa: FBT001 - reads as a sentence
    if not held:
        there = ", ".join(allowed) or "none but the daemon's own"
        raise NotAllowed(f"{key} = {value!r} is not allowed here; jobs.allowed_{what}: {there}", key=key, value=value)
