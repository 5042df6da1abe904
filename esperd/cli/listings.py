"""What the daemon holds, as tables: jobs, actors, kernels, plugins."""

from __future__ import annotations

import time
from collections.abc import Sequence

from esperd.messages.control import ActorList, ActorState, BreakerState, BreakerStatus, PluginList
from esperd.messages.evidence import EvidenceList, EvidenceRow
from esperd.messages.jobs import JobInfo, JobState
from esperd.messages.kernels import KernelList
from esperd.report import numbers
from esperd.report.grid import Cell, Column, Grid

JOB_STYLES: dict[JobState, str] = {
    JobState.RUNNING: "cyan",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.DEAD: "bold red",
    JobState.CANCELLED: "dim",
    JobState.PAUSED: "yellow",
}
ACTOR_STYLES: dict[ActorState, str] = {
    ActorState.RUNNING: "green",
    ActorState.WAITING: "yellow",
    ActorState.FAILED: "bold red",
    ActorState.STOPPED: "dim",
}


def jobs_grid(jobs: Sequence[JobInfo]) -> Grid:
    """Jobs, newest first."""
    return Grid(
        "",
        (
            Column("id", style="bold"),
            Column("name"),
            Column("state"),
            Column("attempt", "right"),
            Column("epoch", "right"),
            Column("submitted"),
            Column("took", "right"),
            Column("memory", "right"),
            Column("host"),
            Column("data"),
            Column("error, wait or GPU", widest=50),
        ),
        [
            (
                job.id,
                job.name,
                Cell(str(job.state), JOB_STYLES.get(job.state, "")),
                str(job.attempt),
                numbers.count(job.epoch),
                _when(job.submitted_at),
                _took(job),
                numbers.size(job.peak.memory_bytes),
                job.job.host,
                job.job.data,
                job.error.message if job.error else job.waits_for or job.card,
            )
            for job in jobs
        ],
        empty="no jobs",
    )


def actors_grid(listed: ActorList) -> Grid:
    """Actors and where they stand."""
    return Grid(
        "",
        (
            Column("actor", style="bold"),
            Column("state"),
            Column("pid", "right"),
            Column("generation", "right"),
            Column("restarts", "right"),
            Column("mailbox", "right"),
            Column("handled", "right"),
            Column("step", "right"),
            Column("last error", widest=50),
        ),
        [
            (
                actor.name,
                Cell(str(actor.state), ACTOR_STYLES.get(actor.state, "")),
                str(actor.pid) if actor.pid is not None else numbers.UNKNOWN,
                str(actor.generation),
                str(actor.restarts),
                f"{actor.mailbox_depth} / {numbers.size(actor.mailbox_bytes)}",
                numbers.count(actor.handled),
                numbers.count(actor.step),
                actor.last_error or "",
            )
            for actor in listed.actors
        ],
        empty="no actors",
    )


def breakers_line(listed: ActorList) -> str:
    """Circuit breakers and where they stand: every one of the daemon, and those of workers that leave a service alone."""
    theirs = [
        f"{actor.name}: {_breaker(found)}"
        for actor in listed.actors
        for found in actor.breakers
        if found.state is not BreakerState.CLOSED
    ]
    return f"breakers: {', '.join([*map(_breaker, listed.breakers), *theirs]) or 'none'}"


def _breaker(found: BreakerStatus) -> str:
    wait = f", asked again in {found.retry_after_s:.0f} s" if found.retry_after_s is not None else ""
    last = f", last: {found.last_error}" if found.last_error and found.state is not BreakerState.CLOSED else ""
    return f"{found.service} {found.state}{wait}{last}"


def dead_letters_line(listed: ActorList) -> str:
    """Undeliverable messages by reason."""
    told = ", ".join(f"{count} {reason}" for reason, count in sorted(listed.dead_letters.items()))
    return f"dead letters: {told or 'none'}"


def kernels_grid(listed: KernelList) -> Grid:
    """Kernels in the cache."""
    return Grid(
        "",
        (
            Column("kernel", style="bold"),
            Column("blueprint"),
            Column("shape"),
            Column("dtype"),
            Column("device"),
            Column("parameters", "right"),
            Column("per sample", "right"),
            Column("size", "right"),
            Column("hits", "right"),
            Column("forward / backward", "right"),
        ),
        [
            (
                row.manifest_id[:12],
                row.key.blueprint,
                " × ".join(str(size) for size in row.key.shape),  # noqa: RUF001 - a product
                row.key.dtype,
                row.key.device,
                numbers.count(row.parameters),
                numbers.flops(row.flops_per_sample),
                numbers.size(row.size_bytes),
                numbers.count(row.hits),
                f"{row.profile.forward_us:.0f} / {row.profile.backward_us:.0f} µs at {row.profile.batch}",
            )
            for row in listed.kernels
        ],
        empty="no kernels yet: they are compiled when a job first wants them",
    )


def kernels_line(listed: KernelList) -> str:
    """The cache's counters."""
    quarantined = f", {listed.quarantined} quarantined" if listed.quarantined else ""
    return f"since the daemon started: {listed.hits} from the cache, {listed.misses} compiled{quarantined}"


def evidence_grid(listed: EvidenceList) -> Grid:
    """What tries of seeds came to; how long they take where a job measured it."""
    timed = any(row.seconds_share is not None for row in listed.rows)
    return Grid(
        "",
        (
            Column("blueprint", style="bold"),
            Column("topology"),
            Column("depth"),
            Column("tries", "right"),
            Column("kept", "right"),
            Column("refused", "right"),
            Column("jobs", "right"),
            Column("contribution", "right"),
            Column("gain / loss", "right"),
            Column("reward", "right"),
            Column("parameters", "right"),
            Column("per sample", "right"),
            *((Column("time / host", "right"),) if timed else ()),
            Column("newest"),
        ),
        [_evidence_row(row, timed=timed) for row in listed.rows],
        empty="no such try is known: one is recorded when a seed of a job ends",
    )


def _evidence_row(row: EvidenceRow, *, timed: bool) -> tuple[str, ...]:
    time = numbers.UNKNOWN if row.seconds_share is None else f"{row.seconds_share:.1%}"
    return (
        row.blueprint,
        row.topology or numbers.UNKNOWN,
        numbers.UNKNOWN if row.third is None else f"{row.third} of 3",
        numbers.count(row.tries),
        numbers.count(row.kept),
        numbers.count(row.refused),
        numbers.count(row.jobs),
        numbers.interval(row.contribution, row.lower, row.upper),
        numbers.UNKNOWN if row.gain is None else f"{row.gain:.2%}",
        numbers.signed(row.reward),
        _range([numbers.count(value) for value in row.parameters]),
        _range([numbers.flops(value) for value in row.flops_per_sample]),
        *((time,) if timed else ()),
        _when(row.newest),
    )


def _range(ends: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def plugins_grid(listed: PluginList) -> Grid:
    """Plugins and what each registered, or that it failed."""
    rows: list[tuple[str | Cell, ...]] = []
    for plugin in listed.plugins:
        status = Cell("failed", "bold red") if plugin.error else Cell("ok", "green")
        names = "\n".join(f"{kind.replace('_', ' ')}: {', '.join(found)}" for kind, found in plugin.registered.items())
        rows.append((plugin.name, plugin.distribution or "built in", status, names))
    columns = (Column("plugin", style="bold"), Column("from"), Column("status"), Column("registered", widest=70))
    return Grid("", columns, rows, empty="no plugins")


def plugin_errors(listed: PluginList) -> list[str]:
    """Tracebacks of what failed, each under its plugin's name."""
    return [f"{plugin.name}:\n{plugin.error.rstrip()}" for plugin in listed.plugins if plugin.error]


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _took(job: JobInfo) -> str:
    if job.started_at is None or job.finished_at is None:
        return numbers.UNKNOWN
    return numbers.duration(job.finished_at - job.started_at)
