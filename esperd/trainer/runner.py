"""What runs a job's training passes, as its ``compile`` says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from esperd.growth.compiled import Compilation, Compiled, Fallback
from esperd.growth.runner import Plain, Runner
from esperd.messages.jobs import Job
from esperd.messages.telemetry import Body, NetworkCompiled, NetworkNotCompiled


def runner_of(job: Job, device: torch.device, emit: Callable[[Body], None], epoch: Callable[[], int]) -> Runner:
    """A runner for one network.

    Args:
        job: with ``compile`` or without.
        device: where the network lives.
        emit: is told what was compiled, and what was not, as it happens.
        epoch: epochs completed now.

    Raises:
        CompileUnavailable: the job wants compiled passes, and this machine cannot compile.
    """
    if not job.compile:
        return Plain()

    def tell(news: Compilation | Fallback) -> None:
        match news:
            case Compilation(structure, graphs, seconds):
                emit(NetworkCompiled(epoch=epoch(), structure=structure, graphs=graphs, seconds=seconds))
            case Fallback(structure, reason):
                emit(NetworkNotCompiled(epoch=epoch(), structure=structure, reason=reason))

    return Compiled(device=device, tell=tell)
