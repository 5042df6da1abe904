"""Garbage: artifacts and kernels that no row refers to. Deleted only when that is certain, without asking any writer to wait.

A writer puts a file first and its row later, so a file without a row may be somebody's who has not come to the row yet: a kernel
that is being stored, or the grown network of a job that trains its control now, for days perhaps. Therefore a file is deleted
only when

- it was without a row at two looks, ``storage.collect_every_s`` apart by the monotonic clock, and was not put again in between;
- every job that was unfinished when it was first seen so is finished: it has its rows now, or will never have them (one that
  failed and may be tried again is not);
- nobody is writing at that moment (:meth:`~esperd.store.blobs.Blobs.discard`).

No wall clock is asked: it may jump.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import anyio.to_thread
import structlog

from esperd.daemon import references
from esperd.errors import StoreFailed
from esperd.messages.jobs import JobState
from esperd.store.blobs import Blobs
from esperd.store.database import Database

UNFINISHED = "SELECT id FROM jobs WHERE state NOT IN (?, ?) AND (state NOT IN (?, ?) OR checkpoint IS NOT NULL)"
"""A failed job that kept a checkpoint may be tried again, and go on with what it wrote before."""
FINAL = (JobState.SUCCEEDED.value, JobState.CANCELLED.value, JobState.FAILED.value, JobState.DEAD.value)

log = structlog.get_logger()


@dataclass(frozen=True)
class Suspect:
    """A blob that no row referred to."""

    changed_ns: int
    """When it was last put, as the file system says; only compared for equality."""
    seen_at: float
    """Monotonic seconds of the first look that found it so."""
    writers: frozenset[str]
    """Jobs that were unfinished then: any of them may have written it."""


def look(
    suspects: Mapping[str, Suspect],
    changes: Mapping[str, int],
    referred: Collection[str],
    unfinished: frozenset[str],
    now: float,
    grace_s: float,
) -> tuple[dict[str, Suspect], dict[str, int]]:
    """One look, as a pure function.

    Args:
        suspects: from the look before.
        changes: every blob there is, and when it was last put; read before ``unfinished``.
        referred: names that rows refer to; read after ``unfinished``, so that a job which finished in between has its rows here.
        unfinished: jobs.
        now: monotonic seconds.
        grace_s: how long a blob must have been a suspect.

    Returns:
        The suspects now, and those of them that are garbage: names with what ``changes`` said of them.
    """
    now_suspects = {}
    for sha256, changed_ns in changes.items():
        if sha256 in referred:
            continue
        before = suspects.get(sha256)
        if before is None or before.changed_ns != changed_ns:
            now_suspects[sha256] = Suspect(changed_ns, now, unfinished)
        else:
            now_suspects[sha256] = Suspect(changed_ns, before.seen_at, before.writers & unfinished)
    garbage = {
        sha256: suspect.changed_ns
        for sha256, suspect in now_suspects.items()
        if not suspect.writers and now - suspect.seen_at >= grace_s
    }
    return now_suspects, garbage


class Collector:
    """Looks again and again.

    Args:
        blobs: artifacts and kernels.
        jobs: the jobs' database.
        kernels: the kernels' database.
        grace_s: see :func:`look`.
        monotonic: seconds.
    """

    def __init__(
        self, blobs: Blobs, jobs: Database, kernels: Database, *, grace_s: float, monotonic: Callable[[], float]
    ) -> None:
        self._blobs = blobs
        self._jobs = jobs
        self._kernels = kernels
        self._grace_s = grace_s
        self._monotonic = monotonic
        self._suspects: dict[str, Suspect] = {}

    async def collect(self) -> tuple[str, ...]:
        """One look; returns the names of what was deleted. What cannot be listed is said, and holds up nothing else.

        Raises:
            StoreFailed: when a database or the disk refuses; whatever the disk did not refuse is deleted.
        """
        changes = await anyio.to_thread.run_sync(self._blobs.changes, _unlisted)
        unfinished = frozenset(row["id"] for row in await self._jobs.read(UNFINISHED, FINAL))
        named = references.of_rows(await self._jobs.read(references.ARTIFACTS))
        named += references.of_kernels(await self._kernels.read(references.KERNELS))
        referred = {reference.sha256 for reference in named}
        self._suspects, garbage = look(self._suspects, changes, referred, unfinished, self._monotonic(), self._grace_s)
        deleted = await anyio.to_thread.run_sync(self._blobs.discard, garbage) if garbage else ()
        for sha256 in deleted:
            del self._suspects[sha256]
        if deleted:
            log.info("garbage was collected", blobs=len(deleted), suspects=len(self._suspects))
        return deleted

    async def run(self, every_s: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Look for ever. A store that fails is said; the next look tries again."""
        while True:
            try:
                await self.collect()
            except StoreFailed as error:
                log.warning("garbage could not be collected", error=str(error))
            await sleep(every_s)


def _unlisted(error: StoreFailed) -> None:
    log.warning("garbage may be where nothing can be listed", error=str(error))
