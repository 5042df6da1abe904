"""esperd grows neural networks while they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esperd.client import Client, JobHandle
    from esperd.growth.export import load
    from esperd.hookspecs import hookimpl
    from esperd.messages.jobs import Budget, Job
    from esperd.sync_client import SyncClient

__version__ = "0.1.0"

_PUBLIC = {
    "Budget": "esperd.messages.jobs",
    "Client": "esperd.client",
    "Job": "esperd.messages.jobs",
    "JobHandle": "esperd.client",
    "SyncClient": "esperd.sync_client",
    "hookimpl": "esperd.hookspecs",
    "load": "esperd.growth.export",
}
"""Public names and where they live. Loaded at first use, so that ``import esperd`` stays light."""

__all__ = ["Budget", "Client", "Job", "JobHandle", "SyncClient", "__version__", "hookimpl", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the public name is
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esperd' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
