"""What an attempt at a job runs under: what may have changed when it fails and an earlier one did not."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

import numpy as np
import torch

import esperd
from esperd.messages.jobs import Job

DIGITS = 12
"""Of a hash: enough to see that it differs."""


def circumstances(job: Job, data_fingerprint: str | None, device: torch.device) -> dict[str, str]:
    """Versions, and hashes of the user's code and data.

    Args:
        job: whose modules are imported by now.
        data_fingerprint: of the splits; None: the data has none.
        device: where the network trains.
    """
    found = {
        "esperd": esperd.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    if data_fingerprint is not None:
        found["data"] = data_fingerprint[:DIGITS]
    return found | {f"code of {module}": digest for module, digest in _users_modules(Path(job.workdir)).items()}


def _users_modules(workdir: Path) -> dict[str, str]:
    """Every imported module that lies below ``workdir``, with the hash of its source."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and name != "__main__" and _is_below(Path(file), workdir):
            try:
                found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:DIGITS]
            except OSError:  # deleted since it was imported
                continue
    return found


def _is_below(file: Path, workdir: Path) -> bool:
    return (
        file.is_relative_to(workdir)
        and "site-packages" not in file.parts
        and not file.is_relative_to(Path(esperd.__file__).parent)
    )
