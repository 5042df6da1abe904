"""How much of the host's memory is free, as the kernel tells it, never as estimated. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from esperd.messages.policy import Headroom

ROOT = Path("/")

UNLIMITED = 2**60
"""A limit of so many bytes is none: version 1 of control groups says "no limit" with a number near 2⁶³."""


def host_headroom(root: Path = ROOT) -> Headroom | None:
    """Free memory of the host now: what Linux calls available, or, where that is less, what the control groups of this process
    (version 1 or 2) leave: there too, files that are cached and can be dropped count as free.

    Args:
        root: of the file system.

    Returns:
        None where nothing says it: on a system without ``/proc/meminfo``.
    """
    machine = _machine(root)
    if machine is None:
        return None
    return min([machine, *_control_groups(root)], key=lambda found: found.free_bytes)


def _machine(root: Path) -> Headroom | None:
    file = root / "proc/meminfo"
    if not file.is_file():
        return None
    fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in _lines(file))}
    if "MemAvailable" not in fields or "MemTotal" not in fields:
        return None
    return Headroom(where="machine", free_bytes=fields["MemAvailable"], total_bytes=fields["MemTotal"])


def _control_groups(root: Path) -> Iterator[Headroom]:
    """Every group on the way from this process's own up to the outermost that is seen: each limit holds."""
    membership = root / "proc/self/cgroup"
    for line in _lines(membership) if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        steps = [part for part in path.split("/") if part]
        for depth in range(len(steps), -1, -1):
            found = _limit(top.joinpath(*steps[:depth]), *names)
            if found is not None:
                yield found


def _limit(group: Path, limit: str, usage: str, droppable: str) -> Headroom | None:
    """What one group leaves; None when it has no limit, or is not seen from in here."""
    if not (group / limit).is_file() or not (group / usage).is_file():
        return None
    text = (group / limit).read_text(encoding="ascii").strip()
    if text == "max" or int(text) >= UNLIMITED:
        return None
    used = int((group / usage).read_text(encoding="ascii"))
    statistics = group / "memory.stat"
    fields = dict(line.split()[:2] for line in _lines(statistics)) if statistics.is_file() else {}
    used -= min(int(fields.get(droppable, 0)), used)
    return Headroom(where="cgroup", free_bytes=max(int(text) - used, 0), total_bytes=int(text))


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="ascii").splitlines()
