"""``esperd demo``: grow a network on handwritten digits, with a daemon of its own, and say whether it paid."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import anyio
import click
import msgspec

from esperd.cli.listings import kernels_line
from esperd.cli.live import follow, require_success
from esperd.cli.output import Output
from esperd.cli.own_daemon import own_daemon
from esperd.client import Client, JobHandle
from esperd.errors import ConfigError, IllegalTransition, MissingExtra
from esperd.jobfile import parse_job
from esperd.messages.jobs import FINAL_JOB_STATES, Job
from esperd.messages.kernels import KernelList
from esperd.messages.reports import Report
from esperd.report.html import write_html
from esperd.report.tables import report_grids
from esperd.report.verdict import judge

JOB_FILE = "demo.toml"
LEFTOVERS_LIMIT = 1_000
"""Newest jobs that are looked at for what a killed demo left."""
NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


@dataclass(frozen=True)
class Outcome:
    """What a demonstration leaves behind."""

    report: Report
    page: Path
    model: Path
    kernels: KernelList


def run_demo(
    output: Output, directory: Path, state_directory: Path, *, rng_seed: int | None = None, epochs: int | None = None
) -> None:
    """Run the demonstration and show it.

    Args:
        output: where to show it.
        directory: gets ``report.html`` and ``model/``.
        state_directory: of the demo's daemon; kept, so that the next run finds its kernels.
        rng_seed: of the job; None: as in the packaged job file.
        epochs: to train; None: as in the packaged job file.

    Raises:
        MissingExtra: when scikit-learn or matplotlib is not installed.
        JobFailed: when the job does not succeed.
        ConfigError: when the state directory holds unfinished jobs that no demo submitted.
        StateDirectoryLocked: when another daemon, perhaps of another demo, owns the state directory.
    """
    _require_extras()
    directory.mkdir(parents=True, exist_ok=True)
    job = demo_job(directory.absolute(), rng_seed=rng_seed, epochs=epochs)
    try:
        outcome = anyio.run(_demonstrate, output, job, directory, state_directory)
    except asyncio.CancelledError:  # SIGTERM; Ctrl-C arrives as KeyboardInterrupt
        raise click.Abort from None
    _show(output, outcome)


def demo_job(directory: Path, *, rng_seed: int | None = None, epochs: int | None = None) -> Job:
    """The packaged job, with what the command line changes.

    Args:
        directory: the job's ``workdir``.
        rng_seed: None keeps the file's.
        epochs: None keeps the file's.
    """
    text = resources.files("esperd.cli").joinpath(JOB_FILE).read_text(encoding="utf-8")
    job = parse_job(text, directory, origin=JOB_FILE)
    if rng_seed is not None:
        job = msgspec.structs.replace(job, rng_seed=rng_seed)
    if epochs is not None:
        job = msgspec.structs.replace(job, budget=msgspec.structs.replace(job.budget, epochs=epochs))
    return job


def _require_extras() -> None:
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtra(f'the demo needs {" and ".join(missing)}: pip install "esperd[demo]"', extra="demo", packages=missing)


async def _demonstrate(output: Output, job: Job, directory: Path, state_directory: Path) -> Outcome:
    this = asyncio.current_task()
    if this is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    _say(output, f"starting a daemon on {state_directory}")
    async with own_daemon(state_directory) as esper:
        await _cancel_leftovers(esper, job, state_directory)
        handle = await esper.submit(job)
        try:
            await follow(handle, output)
            info = await handle.info()
        except BaseException:
            with anyio.CancelScope(shield=True):  # a job left behind would go on in the next demo's daemon
                await _cancel(handle)
            raise
        require_success(info)
        report = await handle.report()
        await anyio.to_thread.run_sync(write_html, directory / "report.html", report, await handle.events(), info.job)
        await handle.export(directory / "model")
        kernels = await esper.kernels()
    return Outcome(report=report, page=directory / "report.html", model=directory / "model", kernels=kernels)


async def _cancel_leftovers(esper: Client, job: Job, state_directory: Path) -> None:
    """Cancel what a killed demo left unfinished: this one has the machine to itself. Another's jobs are not touched.

    Raises:
        ConfigError: when there are such jobs; the daemon stops in order, and they go on with the next one.
    """
    unfinished = [info for info in await esper.jobs(LEFTOVERS_LIMIT) if info.state not in FINAL_JOB_STATES]
    others = [info.id for info in unfinished if not is_demo(info.job, job)]
    if others:
        raise ConfigError(
            f"{state_directory} holds unfinished jobs that no demo submitted ({', '.join(others)}): give the demo a"
            " --state-dir of its own",
            key="--state-dir",
            jobs=others,
        )
    for info in unfinished:
        await _cancel(esper.job(info.id))


def is_demo(job: Job, demo: Job) -> bool:
    """Whether a job is a demo's: the packaged job, but for what ``esperd demo`` lets one choose."""
    chosen = msgspec.structs.replace(demo.budget, epochs=job.budget.epochs)
    return job == msgspec.structs.replace(demo, rng_seed=job.rng_seed, workdir=job.workdir, budget=chosen)


async def _cancel(handle: JobHandle) -> None:
    try:
        await handle.cancel()
    except IllegalTransition:
        return  # it ended in the meantime, which is as good


def _show(output: Output, outcome: Outcome) -> None:
    verdict = judge(outcome.report)
    if output.as_json:
        output.json(
            {
                "report": outcome.report,
                "verdict": {"paid": str(verdict.paid), "because": verdict.because, "price": verdict.price},
                "html": str(outcome.page),
                "model": str(outcome.model),
                "kernels": {"compiled": outcome.kernels.misses, "from_cache": outcome.kernels.hits},
            }
        )
        return
    output.line("")
    for grid in report_grids(outcome.report):
        output.grid(grid)
        output.line("")
    output.line(f"report   {outcome.page}")
    output.line(f"model    {outcome.model}, rebuilt anywhere by esperd.load({str(outcome.model)!r})")
    output.line(f"kernels  {kernels_line(outcome.kernels)}")
    output.line(str(verdict), style="bold")


def _say(output: Output, text: str) -> None:
    if not output.as_json:
        output.line(text, style="dim")
