"""What other programs took of the processor while something was measured: figures of a busy machine are no figures."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")
BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq, steal of /proc/stat; what waits for disks leaves the processor free."""


class Neighbours:
    """Measures, over a ``with`` block, the processor time of everybody but this process and its descendants.

    ``share`` is in processors: 0.5 means that on average others kept half of one busy. Time that the hypervisor gave to other
    machines counts as theirs.
    """

    share: float = 0.0

    def __enter__(self) -> Self:
        self._began, self._busy, self._own = time.monotonic(), _busy_ticks(), _tree_ticks(os.getpid())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        foreign = (_busy_ticks() - self._busy) - (_tree_ticks(os.getpid()) - self._own)
        self.share = max(0.0, foreign / TICKS_PER_SECOND / (time.monotonic() - self._began))


def _busy_ticks() -> int:
    columns = [int(column) for column in (PROC / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return sum(columns[index] for index in BUSY_COLUMNS)


def _tree_ticks(root: int) -> int:
    """Processor time of a process and its descendants, the ended ones included (their parents remember it)."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        fields = text.rpartition(")")[2].split()
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])
    family = {root}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return sum(ticks.get(pid, 0) for pid in family)
