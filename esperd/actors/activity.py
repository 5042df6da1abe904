"""Whether a process does anything, as far as the kernel can tell from outside."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STOPPED = "T"
"""State of a process that SIGSTOP stopped; one that a debugger holds is ``t``."""
RUNS = "R"
TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Activity:
    """What a process and its descendants have done so far; equal to a later one when they did nothing between.

    Args:
        work: processor time in clock ticks, and page faults; of processes that ended, only as their parents took it over.
        stopped: whether all of them are stopped.
        runs: whether one of them runs, or waits for nothing but its turn: on a busy machine that may take seconds.
        cpu_s: the processor time alone, in seconds.
    """

    work: int
    stopped: bool
    runs: bool
    cpu_s: float


def activity(pid: int) -> Activity | None:
    """What a process and its descendants have done so far; None where the kernel does not say, or the process is gone."""
    found = [status for member in _family(pid) if (status := _status(member)) is not None]
    if not found:
        return None
    states = [state for _, _, state in found]
    ticks = sum(ticks for ticks, _, _ in found)
    work = ticks + sum(faults for _, faults, _ in found)
    return Activity(work, all(state == STOPPED for state in states), RUNS in states, ticks * TICK_S)


def belongs_to(pid: int, ancestor: int) -> bool:
    """Whether a process is this one or a descendant of it, as far as the kernel lists them."""
    return pid in _family(ancestor)


def _family(pid: int) -> list[int]:
    """A process and its descendants, as far as the kernel lists them."""
    family = [pid]
    for member in family:  # grows meanwhile
        try:
            threads = list((PROC / str(member) / "task").iterdir())
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
        for thread in threads:
            try:
                listed = (thread / "children").read_text(encoding="ascii")
            except OSError:
                continue  # the thread ended meanwhile
            family += map(int, listed.split())
    return family


def _status(pid: int) -> tuple[int, int, str] | None:
    """Clock ticks, page faults and state."""
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # a program's name may hold blanks and parentheses
    minor, children_minor, major, children_major, user, system, children_user, children_system = map(int, fields[6:14])
    return user + system + children_user + children_system, minor + children_minor + major + children_major, state
