"""What the machine has for jobs: memory and cores as far as this process may use them, and the GPUs that a driver tells of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from esperd.daemon.cards import Card, ask_driver, looked_again
from esperd.host_memory import host_headroom

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What jobs may use together. None: not known, so nothing is refused for it."""

    memory_bytes: int | None
    cores: float
    cards: tuple[Card, ...] = ()
    """Each for itself. Empty: no driver tells of any."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What the machine has left now, whoever holds the rest. None: not known, so nothing waits for it."""

    free_bytes: int | None = None
    """Host memory."""
    load: float | None = None
    """Processes that run or wait for a disk, the average of the last minute."""


def moment() -> Moment:
    """Look at the machine as it is now."""
    headroom = host_headroom()
    return Moment(free_bytes=None if headroom is None else headroom.free_bytes, load=os.getloadavg()[0])


def measure(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> Machine:
    """Look at this machine. Limits of control groups (containers, systemd units) count, of ours and of every one above it.

    Args:
        root: where control groups are mounted; version 2 only, on version 1 the whole machine is told.
        own: names the group of this process.
        meminfo: names the memory of the machine.
    """
    groups = _groups(root, own)
    memory = [limit for group in groups if (limit := _number(group / "memory.max")) is not None]
    total = _total(meminfo)
    cores = [quota for group in groups if (quota := _quota(group / "cpu.max")) is not None]
    return Machine(
        memory_bytes=min([*memory, *([] if total is None else [total])], default=None),
        cores=min([float(len(os.sched_getaffinity(0))), *cores]),
        cards=looked_again((), ask_driver(), ()),
    )


def oom_kills(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Processes of this process's control group that the kernel killed for memory so far; None: it does not tell."""
    for group in _groups(root, own)[:1]:
        try:
            lines = (group / "memory.events").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
    return None


def _groups(root: Path, own: Path) -> list[Path]:
    """The control group of this process, and those above it."""
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = root / line.removeprefix("0::").lstrip("/")
    above = [parent for parent in group.parents if parent.is_relative_to(root)]
    return [path for path in (group, *above) if path.is_dir()]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max": no limit


def _quota(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() else None


def _total(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")), None)
