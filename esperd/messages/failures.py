"""Why a job failed or died: what is known of it, put together for whoever has to mend it; and asking for another try."""

from __future__ import annotations

from typing import Literal

from esperd.messages.base import Message, Reply, Value
from esperd.messages.jobs import JobError, JobState

Ended = Literal["succeeded", "failed", "lost", "left", "stopped", "daemon_restarted"]
"""How an attempt ended: ``left``: its worker gave up through no fault of the job, or there was none because its
checkpoints cannot be read; ``stopped``: as it was told to."""


class Frame(Value, frozen=True, kw_only=True):
    """One line of a traceback."""

    file: str
    line: int
    function: str
    code: str = ""
    owner: Literal["yours", "esperd", "library"]
    """``yours``: below the job's ``workdir``."""


class Attempt(Value, frozen=True, kw_only=True):
    """One lease of a job."""

    number: int
    leased_at: float
    """Seconds since the epoch."""
    started_at: float | None = None
    """None: training never began."""
    ended_at: float | None = None
    ended: Ended | None = None
    """None: it has not ended."""
    error: JobError | None = None
    from_epoch: int | None = None
    """Epoch of the checkpoint it went on from; None: it began anew."""
    epoch: int | None = None
    """Epochs completed when it ended, as of its last checkpoint."""
    circumstances: dict[str, str] = {}
    """Versions, and hashes of configuration, code and data."""
    note: str = ""
    """What else happened: a checkpoint that did not verify, or could not be read."""


class FailureAnalysis(Reply, frozen=True, kw_only=True):
    """Answer to :class:`AnalyseFailure`."""

    job: str
    name: str
    state: JobState
    error: JobError
    frames: tuple[Frame, ...] = ()
    """The last lines of the traceback, innermost last; empty when there was none."""
    where: Frame | None = None
    """The innermost line of the user's code, else the innermost of all; None: no traceback."""
    since: float
    """When the first of the attempts began that ended with this error, without another end in between."""
    same_in_a_row: int
    """Attempts that ended so, the last one included."""
    attempts: tuple[Attempt, ...]
    changed: tuple[str, ...] = ()
    """What differs between the last attempt that did not end so and the first that did: versions, configuration, code, data."""
    retry_from_epoch: int | None = None
    """Epoch that another try would go on from; None: it would begin anew."""
    advice: tuple[str, ...]
    """What to try, the likeliest first."""


class AnalyseFailure(Message, frozen=True, kw_only=True):
    """Say why a job failed."""

    id: str


class RetryJob(Message, frozen=True, kw_only=True):
    """Queue a failed or dead job again, from its last good checkpoint; answered by its ``JobInfo``."""

    id: str
