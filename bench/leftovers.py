"""What a daemon left behind: processes, sockets, shared memory, temporary files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
TEMPORARY = "temporary"
CACHES = ("torchinductor_",)
"""Folders among the temporary files that torch keeps for the next process, by what their names begin with."""


def own_temporary_folder(scratch: Path) -> Mapping[str, str]:
    """Variables under which a daemon and its workers put their temporary files where :func:`left_behind` looks."""
    folder = scratch / TEMPORARY
    folder.mkdir(exist_ok=True)
    return {"TMPDIR": str(folder)}


def left_behind(runtime: Path, scratch: Path, pids: set[int], before: frozenset[str] = frozenset()) -> list[str]:
    """Whatever outlived the daemon.

    Args:
        runtime: its runtime directory, where its sockets are.
        scratch: folder that its state is under; processes are known by it.
        pids: processes that are no leak.
        before: what :func:`shared` said before the daemon was started.
    """
    found = [str(runtime)] if runtime.exists() else []
    found += sorted(_unused(shared() - before))
    unfinished = (
        path for path in scratch.rglob("*") if path.name.startswith((".tmp", "tmp")) or path.suffix in {".tmp", ".sock"}
    )
    found += map(str, unfinished)
    if (scratch / TEMPORARY).is_dir():
        found += [str(path) for path in (scratch / TEMPORARY).iterdir() if not path.name.startswith(CACHES)]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in pids and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                if any(str(place).encode() in command for place in (scratch, runtime)):
                    found.append(f"process {entry.name}")
    return found


def shared() -> frozenset[str]:
    """What is in shared memory."""
    return frozenset(map(str, SHARED_MEMORY.iterdir()))


def _unused(files: frozenset[str]) -> set[str]:
    """Shared memory that no process has mapped: somebody else's daemons may run here, too."""
    mapped = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and files:
            with contextlib.suppress(OSError):
                mapped.update(line.split(maxsplit=5)[-1] for line in (entry / "maps").read_text(encoding="utf-8").splitlines())
    return {file for file in files if file not in mapped and Path(file).exists()}


def resident_mib(pid: int) -> float:
    """Memory that a process holds now, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
