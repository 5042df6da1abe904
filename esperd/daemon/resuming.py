"""The checkpoint that an attempt goes on from: the newest that can be read and verifies."""

from __future__ import annotations

import anyio.to_thread
import structlog

from esperd.daemon.checkpoint_rows import newest_first
from esperd.daemon.checkpoints import Checkpoints
from esperd.daemon.job_store import JobStore, LeasedJob
from esperd.errors import StoreFailed

log = structlog.get_logger()


class Unread(Exception):
    """None of a job's checkpoints can be read; says why not the newest."""


async def last_good(store: JobStore, checkpoints: Checkpoints, leased: LeasedJob) -> str | None:
    """The checkpoint to go on from; None: the job begins anew, because it has none, or none that is whole.

    A damaged one is set aside, and the row forgets it. One that cannot be read may be as good as ever: it is passed over this
    time, and kept until a newer one is written. With none but such the job neither begins anew nor spends an attempt.

    Raises:
        Unread: when there are checkpoints, and none of them can be read.
        StoreFailed: when the database refuses.
        Conflict: when the lease has ended.
    """
    info = leased.info
    unread: dict[str, StoreFailed | OSError] = {}
    while candidates := [sha256 for sha256 in newest_first(info) if sha256 not in unread]:
        sha256 = candidates[0]
        try:
            good = await anyio.to_thread.run_sync(checkpoints.is_good, info.id, sha256)
        except (StoreFailed, OSError) as error:
            log.warning("a checkpoint cannot be read", job=info.id, sha256=sha256, error=str(error))
            unread[sha256] = error
            continue
        if good:
            if sha256 != info.checkpoint:
                because = (
                    f"checkpoint {info.checkpoint} of epoch {info.epoch} could not be read"
                    if info.checkpoint in unread
                    else f"checkpoint {sha256} of epoch {info.previous_epoch} can be read again"
                )
                await store.prefer_checkpoint(info.id, leased.generation, sha256, because)
            return sha256
        info = await store.drop_checkpoint(info.id, leased.generation, sha256)
        log.warning("a checkpoint did not verify", job=info.id, sha256=sha256, goes_on_from=info.epoch)
    if unread:
        raise Unread(f"none of the job's checkpoints can be read: {next(iter(unread.values()))}")
    return None
