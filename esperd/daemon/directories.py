"""Where a daemon keeps what is no database, under its state directory."""

from __future__ import annotations

from pathlib import Path


def blob_directory(state_directory: Path) -> Path:
    """Where a daemon keeps artifacts and kernels."""
    return state_directory / "blobs"


def checkpoint_directory(state_directory: Path) -> Path:
    """Where a daemon keeps the checkpoints of unfinished jobs."""
    return state_directory / "checkpoints"
