"""The memory of a worker: how much it took at most, and its end when it takes more than its job may."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from esperd.errors import OutOfMemory
from esperd.messages.jobs import Peak
from esperd.messages.leases import EXIT_OUT_OF_MEMORY

LOOK_S = 0.1
"""How often it is looked at; what is taken and given back between two looks is not seen. Chosen, not measured."""

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Memory this process holds; None where the system does not tell."""
    try:
        return int(STATM.read_text().split()[1]) * PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def peak() -> Peak:
    """The most memory this process held so far, and the most its tensors held of the GPU."""
    gpu = torch.cuda.max_memory_reserved() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]  # torch does not annotate it
    return Peak(memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, gpu_bytes=gpu)


def limit_gpu(limit_bytes: int) -> None:
    """Have torch refuse what goes beyond a job's share of the GPU."""
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(limit_bytes / total, 1.0))


def watch(limit_bytes: int, leave: Callable[[int], object] = os._exit) -> threading.Event:
    """End this process when it holds more than it may: at once, for a step that allocates cannot be interrupted in words. The
    exit status says why; its job goes on from its last checkpoint or fails with it, as the daemon decides.

    Args:
        limit_bytes: what it may hold.
        leave: ends the process with a status.

    Returns:
        Set it to end the watch.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            held = resident_bytes()
            if held is not None and held > limit_bytes:
                os.write(2, f"the worker holds {held} bytes, resources.memory_bytes is {limit_bytes}\n".encode())
                leave(EXIT_OUT_OF_MEMORY)
                return

    threading.Thread(target=look, name="memory", daemon=True).start()
    return over


def as_out_of_memory(error: BaseException) -> OutOfMemory | None:
    """The typed error of what torch or Python raise when there is no memory left; None: it was something else."""
    seen: BaseException | None = error
    while seen is not None:
        # torch's CPU allocator raises a plain RuntimeError that says so
        if isinstance(seen, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(seen):
            return OutOfMemory(f"memory ran out: {type(seen).__name__}: {seen}; {ADVICE}")
        seen = seen.__cause__
    return None


ADVICE = "lower batch_size, or set resources.smaller_retry = true, which trains each batch in pieces"
