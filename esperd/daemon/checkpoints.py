"""The checkpoints of unfinished jobs: a directory for each, so that what a job leaves is removed without asking whose it is.

Only the row of a job refers to its checkpoints: to the last one, and to the one before, which the job goes back to should the
last one not verify. What no row refers to is deleted: older ones as soon as a newer one is durable, the last ones when the job is
done, and whatever a killed daemon left when the next one starts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from esperd.errors import StoreFailed
from esperd.store.blobs import Blobs
from esperd.store.filesystem import Filesystem, RealFilesystem


class Checkpoints:
    """Checkpoint files by job. Synchronous; one call at a time.

    Args:
        directory: made by the first worker that writes.
        filesystem: the disk; tests pass one that fails.
    """

    def __init__(self, directory: Path, filesystem: Filesystem | None = None) -> None:
        self.directory = directory
        self._filesystem: Filesystem = filesystem or RealFilesystem()

    def of(self, job_id: str) -> Blobs:
        """Where a job's worker puts its checkpoints."""
        return Blobs(self.directory / job_id, self._filesystem)

    def keep_only(self, job_id: str, *wanted: str | None) -> None:
        """Delete every checkpoint of a job but these, which are durable in the job's row; None stands for none.

        Raises:
            StoreFailed: when the disk refuses.
        """
        self.of(job_id).sweep({sha256 for sha256 in wanted if sha256 is not None})

    def is_good(self, job_id: str, sha256: str) -> bool:
        """Whether a checkpoint is there, whole. A damaged one is moved to its quarantine.

        Raises:
            StoreFailed: when the disk refuses.
        """
        return self.of(job_id).is_good(sha256)

    def forget(self, job_id: str) -> None:
        """Delete everything a job has here: it is finished.

        Raises:
            StoreFailed: when the disk refuses.
        """
        self.of(job_id).remove()

    def sweep(self, unfinished: Mapping[str, Collection[str | None]]) -> None:
        """Delete what no row refers to.

        Args:
            unfinished: the checkpoints of every job that may go on, by id, whether or not its row can be understood.

        Raises:
            StoreFailed: when the disk refuses; of the other jobs everything is deleted that can be.
        """
        try:
            jobs = self._filesystem.names(self.directory)
        except OSError as error:
            raise StoreFailed(f"cannot list {self.directory}: {error}", path=str(self.directory)) from error
        refused: list[StoreFailed] = []
        for job_id in jobs:
            try:
                if job_id in unfinished:
                    self.keep_only(job_id, *unfinished[job_id])
                else:
                    self.forget(job_id)
            except StoreFailed as error:
                refused.append(error)
        if refused:
            raise refused[0]
