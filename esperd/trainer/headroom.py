"""How much memory is free where the network trains, as measured, never as estimated."""

from __future__ import annotations

from pathlib import Path

import torch

from esperd.host_memory import ROOT, host_headroom
from esperd.messages.policy import Headroom


def headroom(device: torch.device, root: Path = ROOT) -> Headroom | None:
    """Free memory now: on CUDA, what the device has left and what this process holds in torch's cache without using it; on a CPU
    that of the host.

    Args:
        device: where the network trains.
        root: of the file system.

    Returns:
        None where nothing says it; see :func:`esperd.host_memory.host_headroom`.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Headroom(where="cuda", free_bytes=free + unused, total_bytes=total)
    return host_headroom(root)
