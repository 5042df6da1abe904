"""How many jobs of one client wait, of those submitted since the daemon started; ``jobs.max_queued`` counts everything."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

from esperd.errors import Busy, JobNotFound
from esperd.messages.jobs import JobInfo, JobState

RETRY_AFTER_S = 5.0
LOOKED_AT_ONCE = 64
"""Jobs that are looked up for one request, oldest first: the queue is served in that order."""


class ClientQueues:
    """Who submitted which of the jobs that wait.

    Args:
        limit: jobs of one client that may wait.
        job: looks a job up.
    """

    def __init__(self, limit: int, job: Callable[[str], Awaitable[JobInfo]]) -> None:
        self._limit = limit
        self._job = job
        self._waiting: dict[bytes, dict[str, None]] = {}
        self._coming: Counter[bytes] = Counter()
        """Submissions that were let in and are not admitted yet."""

    @contextlib.asynccontextmanager
    async def place(self, client: bytes) -> AsyncIterator[None]:
        """Hold a place for one more job of a client while it is admitted.

        Raises:
            Busy: when too many of its jobs wait, those that are being admitted included.
        """
        await self._require_room(client)
        self._coming[client] += 1  # nothing was awaited since the last comparison
        try:
            yield
        finally:
            self._coming[client] -= 1
            if not self._coming[client]:
                del self._coming[client]

    async def _require_room(self, client: bytes) -> None:
        """Look whether a client may submit one more job.

        Raises:
            Busy: when too many of its jobs wait.
        """
        waiting = self._waiting.setdefault(client, {})
        if len(waiting) + self._coming[client] < self._limit:
            return
        for job_id in list(waiting)[:LOOKED_AT_ONCE]:
            waits = await self._still_waits(job_id)
            waiting.pop(job_id, None)
            if waits:
                waiting[job_id] = None  # at the end now: others are looked at next time
        if len(waiting) + self._coming[client] >= self._limit:
            raise Busy(
                f"{len(waiting)} jobs of this client wait, the limit is limits.queued_jobs = {self._limit}; try again in "
                f"{RETRY_AFTER_S:g} s",
                retry_after_s=RETRY_AFTER_S,
                queued=len(waiting),
            )

    def note(self, client: bytes, job_id: str) -> None:
        """A job of this client was admitted."""
        self._waiting.setdefault(client, {})[job_id] = None

    async def _still_waits(self, job_id: str) -> bool:
        try:
            return (await self._job(job_id)).state is JobState.QUEUED
        except JobNotFound:
            return False
