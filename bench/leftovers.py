"""What a daemon left behind: processes, sockets, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def left_behind(runtime: Path, scratch: Path, pids: set[int], before: frozenset[str] = frozenset()) -> list[str]:
    """Whatever outlived the daemon.

    Args:
        runtime: its runtime directory, where its sockets are.
        scratch: folder that its state is under; processes are known by it.
        pids: processes that are no leak.
        before: what :func:`shared` said before the daemon was started.
    """
    found = [str(path) for path in (runtime,) if path.exists()]
    found += sorted(shared() - before) if before else []
    found += [
        str(path) for path in scratch.rglob("*") if path.name.startswith((".tmp", "tmp")) or path.suffix in {".tmp", ".sock"}
    ]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in pids and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                if any(str(place).encode() in command for place in (scratch, runtime)):
                    found.append(f"process {entry.name}")
    return found


def shared() -> frozenset[str]:
    """What is in shared memory, and the folders of daemons among the temporary files."""
    temporary = Path(tempfile.gettempdir())
    return frozenset(map(str, (*SHARED_MEMORY.iterdir(), *temporary.glob("esperd-*"))))


def resident_mib(pid: int) -> float:
    """Memory that a process holds now, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
