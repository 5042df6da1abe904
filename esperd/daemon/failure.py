"""Why a job failed, as a pure function of what was recorded: where, since when, what is different, what to try."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import esperd
from esperd.daemon.job_lifecycle import UNREAD_TRIES
from esperd.errors import NothingToShow
from esperd.messages.failures import Attempt, FailureAnalysis, Frame
from esperd.messages.jobs import JobError, JobInfo, JobState

FRAMES = 5
"""Lines of a traceback that are shown; chosen, not measured."""

_FRAME = re.compile(
    r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?:\s{4,}(?P<code>\S.*)\n?)?', re.MULTILINE
)
_PACKAGE = Path(esperd.__file__).parent

_TO_TRY: Mapping[str, str] = MappingProxyType(
    {
        "import_failed": "mend what the traceback names; is the module in the job's workdir, and installed for its `python`?",
        "invalid_data": "correct the data at the place that the error names",
        "invalid_model": "correct the model, or name another loss or metric that fits its output",
        "invalid_job": "correct the key that the error names, and submit the job anew",
        "invalid_optimizer": "use sgd, adam or adamw, or mend what the error names of your own optimiser",
        "training_diverged": "lower optimizer.learning_rate, set optimizer.max_gradient_norm, or look at the data of that step",
        "checkpoint_rejected": "the checkpoint is of another esperd or another job: submit the job anew",
        "store_failed": "look at the disk: `esperd db check` says what is damaged or cannot be read, `df` how much room there is",
        "blueprint_rejected": "`esper plugins check NAME` proves the blueprint's contract; leave it out with growth.blueprints",
        "compile_unavailable": "install the compiler that the error names, or train with compile = false",
        "job_failed": "your code raised: mend the line that is named, then try again",
    }
)
_SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"none of the job's checkpoints can be read",
        (
            "the disk, or a permission, keeps them from being read: look at the file that is named, and at `dmesg`; until the job"
            f" is dead it tries again by itself, up to {UNREAD_TRIES} times, and spends no attempt"
        ),
    ),
    (
        r"hung and was killed",
        "it did nothing: the message ends with where it was; if it only waits for slow data, raise workers.stall_timeout_s",
    ),
    (
        r"did not stop within",
        "it hung, or its steps take longer than daemon.drain_timeout_s; `esper events --job ID` says when the last epoch ended",
    ),
    (
        r"SIGKILL|signal 9|out of memory|OutOfMemory|MemoryError",
        "it was killed or ran out of memory: `dmesg` tells whether the kernel did it; a smaller batch_size or host needs less",
    ),
    (
        r"SIGSEGV|SIGABRT|SIGBUS|signal (11|6|7)\b",
        "a library crashed the process: suspect a binary package, or the machine's memory",
    ),
    (
        r"silent|heartbeat",
        "it was not heard of in time: was the machine suspended or overloaded? workers.heartbeat_timeout_s is the limit",
    ),
    (
        r"could not start|not ready",
        "the worker did not start: run its interpreter (the job's `python`) with `-c 'import esperd, torch'`",
    ),
)
"""Words in what is said of a lost worker, and what they point to."""


def analyse(info: JobInfo, attempts: Sequence[Attempt]) -> FailureAnalysis:
    """Put together what is known.

    Args:
        info: the job.
        attempts: oldest first; may be empty for a job of an older esperd.

    Raises:
        NothingToShow: when no attempt at the job failed.
    """
    failed = [attempt for attempt in attempts if attempt.error is not None]
    error = info.error or (failed[-1].error if failed else None)
    if error is None:
        raise NothingToShow(f"job {info.id} is {info.state}; no attempt at it failed", id=info.id, state=info.state)
    run = _same_in_a_row(attempts, error)
    frames = tuple(_frames(error.traceback, Path(info.job.workdir)))
    changed = _changed(attempts, run)
    return FailureAnalysis(
        job=info.id,
        name=info.name,
        state=info.state,
        error=error,
        frames=frames[-FRAMES:],
        where=next((frame for frame in reversed(frames) if frame.owner == "yours"), frames[-1] if frames else None),
        since=run[0].leased_at if run else info.started_at or info.submitted_at,
        same_in_a_row=max(1, len(run)),
        attempts=tuple(attempts),
        changed=changed,
        retry_from_epoch=info.epoch if info.checkpoint is not None else None,
        advice=tuple(_advice(info, error, failed, run, changed)),
    )


def _same_in_a_row(attempts: Sequence[Attempt], error: JobError) -> list[Attempt]:
    """The last attempts that ended with this error. Those that ended through nobody's fault say nothing."""
    run: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.error is None and attempt.ended in ("stopped", "left", "daemon_restarted", None):
            continue
        if attempt.error is None or _kind(attempt.error) != _kind(error):
            break
        run.insert(0, attempt)
    return run


def _kind(error: JobError) -> tuple[str, str]:
    """What makes two errors the same: the code, and the message without its numbers."""
    return error.code, re.sub(r"\d+", "#", error.message.splitlines()[0] if error.message else "")


def _frames(traceback: str, workdir: Path) -> list[Frame]:
    return [
        Frame(
            file=found["file"],
            line=int(found["line"]),
            function=found["function"],
            code=(found["code"] or "").strip(),
            owner=_owner(Path(found["file"]), workdir),
        )
        for found in _FRAME.finditer(traceback)
    ]


def _owner(file: Path, workdir: Path) -> Literal["yours", "esperd", "library"]:
    if file.is_relative_to(_PACKAGE):
        return "esperd"
    if "site-packages" in file.parts or not file.is_relative_to(workdir):
        return "library"
    return "yours"


def _changed(attempts: Sequence[Attempt], run: Sequence[Attempt]) -> tuple[str, ...]:
    """What differs between the attempt before the first of these and that one; where they are all, between the first and the
    last of them.
    """
    if not run:
        return ()
    earlier = [attempt for attempt in attempts if attempt.number < run[0].number and attempt.circumstances]
    before, after = (earlier[-1], run[0]) if earlier else (run[0], run[-1])
    names = sorted(before.circumstances.keys() & after.circumstances.keys())
    return tuple(
        f"{name}: {before.circumstances[name]} in attempt {before.number}, {after.circumstances[name]} in attempt {after.number}"
        for name in names
        if before.circumstances[name] != after.circumstances[name]
    )


def _advice(
    info: JobInfo, error: JobError, failed: Sequence[Attempt], run: Sequence[Attempt], changed: Sequence[str]
) -> list[str]:
    advice = []
    if changed:
        advice.append(f"look at what changed: {', '.join(change.partition(':')[0] for change in changed)}")
    advice += [told for pattern, told in _SIGNS if re.search(pattern, error.message)][:1]
    if error.code in _TO_TRY:
        advice.append(_TO_TRY[error.code])
    if len({_kind(attempt.error) for attempt in failed if attempt.error is not None}) > 1:
        advice.append("the attempts ended differently: suspect the machine (memory, disk, GPU) rather than the job")
    elif len(run) > 1 and len({attempt.epoch for attempt in run}) == 1:
        reached = "before its first checkpoint" if run[-1].epoch is None else f"after epoch {run[-1].epoch}"
        advice.append(f"it ends in the same way each time, {reached}: another try alone will not help")
    if info.state in (JobState.FAILED, JobState.DEAD):
        start = f"goes on from epoch {info.epoch}" if info.checkpoint is not None else "begins anew: there is no checkpoint"
        advice.append(f"once that is mended: `esper retry {info.id}` {start}")
    return advice
