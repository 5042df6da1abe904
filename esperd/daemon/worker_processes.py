"""Trainer workers as processes: what they are called, what their environment is, and what their end says."""

from __future__ import annotations

import signal

import msgspec

from esperd.actors.process_cell import AND_KILLED
from esperd.config import Config
from esperd.daemon.cards import VISIBLE
from esperd.daemon.machine import oom_kills
from esperd.messages.control import Terminated
from esperd.messages.leases import EXIT_OUT_OF_MEMORY

WORKERS = "trainer/"
"""What every worker's name begins with."""


def worker_name(job_id: str, generation: int) -> str:
    """Address of the trainer worker that holds this lease; no two leases share one."""
    return f"{WORKERS}{job_id}.{generation}"


def worker_environment(config: Config, *, threads: int, card: str | None = None) -> dict[str, str]:
    """Variables of a process that imports torch.

    Thread counts must be set before the import: ``torch.set_num_threads`` in one thread does not bind the OpenMP pool of
    another. Plugins that the daemon blocks are blocked in its processes too.

    Args:
        config: the daemon's.
        threads: cores it may use.
        card: UUID of the one GPU that CUDA shows it; None or empty: those that it shows the daemon.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "ESPERD__DAEMON__LOG_LEVEL": config.daemon.log_level,
        **{
            f"ESPERD__BREAKERS__{service.upper()}": f"{{ failures = {limits['failures']}, reset_s = {limits['reset_s']} }}"
            for service, limits in msgspec.to_builtins(config.breakers).items()
        },
        "ESPERD__PLUGINS__BLOCKED": msgspec.json.encode(config.plugins.blocked).decode(),
        "ESPERD__TELEMETRY__OTLP_ENDPOINT": config.telemetry.otlp_endpoint,
        "ESPERD__TELEMETRY__TRACE_STEPS": str(config.telemetry.trace_steps).lower(),
        **({VISIBLE: card} if card else {}),
    }


def out_of_memory(gone: Terminated, killed_before: int | None) -> str:
    """Why a worker's end is one for memory; empty when it is not, or nobody can tell.

    Args:
        gone: how it ended.
        killed_before: processes of this control group that the kernel had killed for memory when the worker started.
    """
    if gone.status == EXIT_OUT_OF_MEMORY:
        return f"the worker held more memory than resources.memory_bytes allows: {gone.reason}"
    if gone.status != -signal.SIGKILL or AND_KILLED in gone.reason:
        return ""
    killed = oom_kills()
    if killed_before is not None and killed is not None and killed > killed_before:
        return f"the kernel killed the worker for memory: {gone.reason}"
    return ""
