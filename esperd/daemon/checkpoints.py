"""The checkpoints of unfinished jobs: a directory for each, so that what a job leaves is removed without asking whose it is.

Only the row of a job refers to its checkpoint. What no row refers to is deleted: the older ones as soon as a newer one is
durable, the last one when the job is finished, and whatever a killed daemon left when the next one starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from esperd.store.blobs import Blobs


class Checkpoints:
    """Checkpoint files by job. Synchronous; one call at a time.

    Args:
        directory: made by the first worker that writes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def of(self, job_id: str) -> Blobs:
        """Where a job's worker puts its checkpoints."""
        return Blobs(self.directory / job_id)

    def keep_only(self, job_id: str, sha256: str | None) -> None:
        """Delete every checkpoint of a job but this one, which is durable in the job's row; None: every one.

        Raises:
            StoreFailed: when the disk refuses.
        """
        self.of(job_id).sweep({sha256} if sha256 is not None else frozenset())

    def forget(self, job_id: str) -> None:
        """Delete everything a job has here: it is finished.

        Raises:
            StoreFailed: when the disk refuses.
        """
        self.of(job_id).remove()

    def sweep(self, unfinished: Mapping[str, str | None]) -> None:
        """Delete what no row refers to.

        Args:
            unfinished: the checkpoint of every unfinished job, by id.

        Raises:
            StoreFailed: when the disk refuses.
        """
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.name in unfinished:
                self.keep_only(path.name, unfinished[path.name])
            else:
                self.forget(path.name)
