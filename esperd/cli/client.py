"""``esper``: submit jobs and look at what a daemon does. Commands import what they need when they run."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from esperd.cli.dead_letters import dead_letters
from esperd.cli.events import events
from esperd.cli.exit_codes import FAILED, run
from esperd.cli.keys import keys
from esperd.cli.options import Options, client_options, output_options

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.client import Client, JobHandle
    from esperd.messages.jobs import JobInfo
    from esperd.messages.overruling import ReplayedPoint

ResultT = TypeVar("ResultT")
JOB_FILE = click.Path(dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)

FORMATS = ("safetensors", "pt2", "onnx")
"""Forms of a model: the first is always written, the others are made from it."""

_options = click.make_pass_decorator(Options)


def _formats(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Forms to make besides the first, each once, in the order given."""
    named = [name.strip() for value in values for name in value.split(",")]
    for name in named:
        if name not in FORMATS:
            raise click.BadParameter(f"{name!r} is not a format; there are: {', '.join(FORMATS)}")
    return tuple(name for name in dict.fromkeys(named) if name != FORMATS[0])


@click.group(name="esper", context_settings={"help_option_names": ["-h", "--help"]})
@client_options
@click.version_option(package_name="esperd", message="%(prog)s %(version)s")
def esper() -> None:
    """Grow neural networks: hand jobs to an esperd daemon and see what it does with them."""


@esper.command()
@click.argument("job_file", type=JOB_FILE)
@click.option("--watch", "watched", is_flag=True, help="Show the job until it is over; fails when the job does.")
@click.option("--key", metavar="KEY", help="Idempotency key: the same job under the same key is submitted once.")
@click.option("--approve", is_flag=True, help="Change the network only as people approve (policy.approve = true).")
@client_options
@_options
def submit(options: Options, job_file: Path, key: str | None, *, watched: bool, approve: bool) -> None:
    """Submit a job file."""
    from esperd.cli.live import follow, require_success
    from esperd.cli.overruled import with_approval
    from esperd.jobfile import load_job
    from esperd.messages.jobs import JobSubmitted

    job = load_job(job_file)  # before connecting: a wrong file needs no daemon to be found wrong
    if approve:
        job = with_approval(job)

    async def work(esper: Client, output: Output) -> None:
        handle = await esper.submit(job, idempotency_key=key)
        if output.as_json:
            output.json(JobSubmitted(id=handle.id, duplicate=handle.duplicate))
        else:
            output.line(f"{'already submitted' if handle.duplicate else 'submitted'} {handle.id}")
        if watched:
            await follow(handle, output)
            require_success(await handle.info())

    with_daemon(options, work)


@esper.command()
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="Show at most this many.")
@client_options
@_options
def jobs(options: Options, limit: int) -> None:
    """List jobs, newest first."""
    from esperd.cli.listings import jobs_grid
    from esperd.messages.jobs import JobList

    async def work(esper: Client, output: Output) -> None:
        listed = await esper.jobs(limit)
        if output.as_json:
            output.json(JobList(jobs=listed))
        else:
            output.grid(jobs_grid(listed))

    with_daemon(options, work)


@esper.command()
@click.argument("job_id", metavar="ID")
@click.option("--after", type=click.IntRange(0, 2**63 - 1), default=0, help="Skip events up to this sequence.")
@client_options
@_options
def watch(options: Options, job_id: str, after: int) -> None:
    """Show a job until it is over. Fails when the job does; stopping to watch does not stop the job."""
    from esperd.cli.live import follow, require_success

    async def work(esper: Client, output: Output) -> None:
        handle = esper.job(job_id)
        await follow(handle, output, after)
        require_success(await handle.info())

    with_daemon(options, work)


def _change_command(name: str, description: str) -> None:
    """Add ``esper pause|resume|cancel ID``."""

    @esper.command(name=name, help=description)
    @click.argument("job_id", metavar="ID")
    @client_options
    @_options
    def change(options: Options, job_id: str) -> None:
        async def work(esper: Client, output: Output) -> None:
            handle = esper.job(job_id)
            info: JobInfo = await getattr(handle, name)()
            if output.as_json:
                output.json(info)
            else:
                output.line(f"{name} of {info.id} recorded; it is {info.state}")

        with_daemon(options, work)


_change_command("pause", "Checkpoint a job and stop it, to be resumed later.")
_change_command("resume", "Queue a paused job again.")
_change_command("cancel", "Stop a job for good.")
_change_command("retry", "Queue a failed or dead job again, from its last good checkpoint.")


@esper.command(name="explain-failure")
@click.argument("job_id", metavar="ID")
@client_options
@_options
def explain_failure(options: Options, job_id: str) -> None:
    """Show why a job failed: what, where, since when, what changed between its attempts, and what to try."""
    from esperd.cli.failing import attempts_grid, lines

    async def work(esper: Client, output: Output) -> None:
        found = await esper.job(job_id).failure()
        if output.as_json:
            output.json(found)
            return
        for line, style in lines(found):
            output.line(line, style=style)
        output.line("")
        output.grid(attempts_grid(found.attempts))

    with_daemon(options, work)


@esper.command()
@click.argument("job_id", metavar="ID")
@click.argument("words", nargs=-1, metavar="[grow SLOT BLUEPRINT | keep SEED | cull SEED | wait | approve [N]]")
@click.option("--reason", metavar="TEXT", default="", help="Why, for whoever reads the decisions later.")
@client_options
@_options
def decide(options: Options, job_id: str, words: tuple[str, ...], reason: str) -> None:
    """Say what is decided at a job's next decision point; without more words, list what awaits approval.

    Whatever was said goes before the strategy's decision about the same thing. Gates still have their word.
    """
    from esperd.cli.overruled import proposals_grid, said_grid, wish_of
    from esperd.report.decisions import say_decision

    wish = wish_of(words)
    if wish is None and reason:
        raise click.UsageError("--reason belongs to grow, keep, cull, wait or approve")

    async def show(handle: JobHandle, output: Output) -> None:
        listed = await handle.proposals()
        if output.as_json:
            output.json(listed)
            return
        output.grid(proposals_grid(listed, (await handle.info()).job))
        if listed.said:
            output.line("")
            output.grid(said_grid(listed))

    async def work(esper: Client, output: Output) -> None:
        handle = esper.job(job_id)
        if wish is None:
            await show(handle, output)
            return
        overruled = await handle.overrule(**wish, reason=reason)
        if output.as_json:
            output.json(overruled)
            return
        for decision in overruled.decisions:
            output.line(f"at the next decision point of {job_id}: {say_decision(decision)}")
        if overruled.note:
            output.line(f"note: {overruled.note}", style="yellow")

    with_daemon(options, work)


@esper.command()
@click.argument("job_id", metavar="ID")
@click.argument("point", type=click.IntRange(min=1), required=False)
@click.option("--replay", "replayed", is_flag=True, help="Compute every decision again from the log; fails when one differs.")
@client_options
@_options
def explain(options: Options, job_id: str, point: int | None, *, replayed: bool) -> int | None:
    """List a job's decision points, or show why one was decided as it was."""
    if replayed and point is not None:
        raise click.UsageError("--replay computes every point; leave POINT out")
    from esperd.cli.explained import Explained, points_grid, points_of
    from esperd.cli.overruled import replay_grid, replay_line
    from esperd.messages.telemetry import PolicyUnavailable

    async def replay(handle: JobHandle, output: Output) -> int | None:
        points = await handle.replay()
        if output.as_json:
            output.json({"points": points})
            return _differs(points)
        differing = replay_grid(points)
        if differing.rows:
            output.grid(differing)
        output.line(replay_line(points))
        return _differs(points)

    async def work(esper: Client, output: Output) -> int | None:
        handle = esper.job(job_id)
        if replayed:
            return await replay(handle, output)
        info, events = await handle.info(), await handle.events()
        if point is None:
            points = points_of(events)
            if output.as_json:
                output.json({"points": points})
            else:
                silent = [event.body for event in events if isinstance(event.body, PolicyUnavailable)]
                output.grid(points_grid(points, info.job.policy.strategy, silent))
            return None
        explained = Explained(info, await handle.decision(point), events)
        if output.as_json:
            output.json(explained.document())
            return None
        for line in explained.lines():
            output.line(line)
        for grid in explained.grids():
            output.line("")
            output.grid(grid)
        return None

    return with_daemon(options, work)


def _differs(points: Sequence[ReplayedPoint]) -> int | None:
    """The exit status of a replay."""
    return FAILED if any(found.same is False for found in points) else None


@esper.command()
@click.argument("job_id", metavar="ID")
@click.option("--html", type=FILE, help="Also write the report as one self-contained HTML page.")
@client_options
@_options
def report(options: Options, job_id: str, html: Path | None) -> None:
    """Show what a finished job found, and whether growth paid."""
    from esperd.report.tables import report_grids
    from esperd.report.verdict import judge

    async def work(esper: Client, output: Output) -> None:
        handle = esper.job(job_id)
        found = await handle.report()
        if html is not None:
            from esperd.report.html import write_html

            write_html(html, found, await handle.events(), (await handle.info()).job)
        if output.as_json:
            output.json(found)
            return
        for grid in report_grids(found):
            output.grid(grid)
            output.line("")
        if html is not None:
            output.line(f"written {html}")
        output.line(str(judge(found)), style="bold")

    with_daemon(options, work)


@esper.command()
@click.argument("job_id", metavar="ID")
@click.option("--to", "directory", type=DIRECTORY, required=True, help="Directory to write; made when absent.")
@click.option(
    "--format",
    "forms",
    metavar="FORMAT",
    multiple=True,
    callback=_formats,
    help="Also write the model as pt2 (torch.export) or onnx, checked against it. Repeatable, or with commas.",
)
@click.option("--merge", "merged", is_flag=True, help="Fold seeds into the layers around them, where algebra allows.")
@click.option(
    "--host",
    metavar="MODULE:FUNCTION",
    help="For --merge and --format: what builds the host; imported from the current directory or the job's workdir.",
)
@click.option(
    "--import-host",
    is_flag=True,
    help="For --merge and --format: import the host that the export names, from the job's workdir. Only for jobs you trust.",
)
@client_options
@_options
def export(
    options: Options,
    job_id: str,
    directory: Path,
    forms: tuple[str, ...],
    host: str | None,
    *,
    merged: bool,
    import_host: bool,
) -> None:
    """Write a finished job's grown model and its records. `esperd.load(DIRECTORY)` rebuilds it without a daemon."""
    if (host is not None or import_host) and not (merged or forms):
        raise click.UsageError("--host and --import-host belong to --merge and to --format pt2 or onnx")
    if host is not None and import_host:
        raise click.UsageError("--host and --import-host say the same in two ways: give one of them")
    from esperd.cli.exported import Exported, require_packages

    require_packages(forms)  # before anything is written

    async def work(esper: Client, output: Output) -> None:
        handle = esper.job(job_id)
        made = Exported(directory, await handle.export(directory), output)
        if merged or forms:
            made.rebuild_from(Path((await handle.info()).job.workdir), host, import_host=import_host)
        if merged:
            made.merge()
        if forms:
            made.write_forms(forms)
        made.tell()

    with_daemon(options, work)


esper.add_command(events)


@esper.command()
@client_options
@_options
def actors(options: Options) -> None:
    """List the daemon's actors, its dead letters and its circuit breakers."""
    from esperd.cli.listings import actors_grid, breakers_line, dead_letters_line

    async def work(esper: Client, output: Output) -> None:
        listed = await esper.actors()
        if output.as_json:
            output.json(listed)
            return
        output.grid(actors_grid(listed))
        output.line(dead_letters_line(listed))
        output.line(breakers_line(listed))

    with_daemon(options, work)


@esper.command()
@client_options
@_options
def kernels(options: Options) -> None:
    """List compiled kernels and how often each was found in the cache."""
    from esperd.cli.listings import kernels_grid, kernels_line

    async def work(esper: Client, output: Output) -> None:
        listed = await esper.kernels()
        if output.as_json:
            output.json(listed)
            return
        output.grid(kernels_grid(listed))
        output.line(kernels_line(listed))

    with_daemon(options, work)


@esper.command()
@click.option("--blueprint", metavar="PATTERN", default="*", help="Only blueprints of this name or shell pattern.")
@click.option("--job", "job_id", metavar="ID", help="Only tries of this job.")
@click.option(
    "--forget",
    metavar="[PATTERN]",
    is_flag=False,
    flag_value="*",
    help="Delete what is known of the blueprints that match; without a pattern: of all.",
)
@click.option("--yes", is_flag=True, help="For --forget: do not ask.")
@client_options
@_options
def evidence(options: Options, blueprint: str, job_id: str | None, forget: str | None, *, yes: bool) -> None:
    """Show what tries of seeds came to, in all jobs. Jobs with `policy.memory` learn from it."""
    from esperd.cli.forgetting import may_forget
    from esperd.cli.listings import evidence_grid
    from esperd.messages.evidence import EvidenceForgotten

    if forget is not None and (job_id is not None or blueprint != "*"):
        raise click.UsageError("--forget takes its own pattern; --blueprint and --job belong to the listing")
    if yes and forget is None:
        raise click.UsageError("--yes belongs to --forget")

    async def work(esper: Client, output: Output) -> None:
        if forget is None:
            listed = await esper.evidence(blueprint, job_id)
            if output.as_json:
                output.json(listed)
            else:
                output.grid(evidence_grid(listed))
            return
        tries = sum(row.tries for row in (await esper.evidence(forget)).rows)
        if not may_forget(tries, forget, yes=yes or not tries, as_json=output.as_json):
            output.line("nothing was forgotten")
            return
        forgotten = await esper.forget_evidence(forget)
        if output.as_json:
            output.json(EvidenceForgotten(tries=forgotten))
        else:
            output.line(f"forgotten: {forgotten} tries")

    with_daemon(options, work)


@esper.group(invoke_without_command=True)
@client_options
@click.pass_context
def plugins(context: click.Context) -> None:
    """List plugins, or check one. Alone: list."""
    if context.invoked_subcommand is None:
        context.invoke(list_plugins)


@plugins.command(name="list")
@client_options
@_options
def list_plugins(options: Options) -> None:
    """List every plugin of the daemon: what it registered, or the traceback of its failure."""
    from esperd.cli.listings import plugin_errors, plugins_grid

    async def work(esper: Client, output: Output) -> None:
        listed = await esper.plugins()
        if output.as_json:
            output.json(listed)
            return
        output.grid(plugins_grid(listed))
        for error in plugin_errors(listed):
            output.line("")
            output.line(error, style="red")

    with_daemon(options, work)


@plugins.command()
@click.argument("name")
@output_options
@_options
def check(options: Options, name: str) -> int | None:
    """Prove the contract of the blueprint NAME, here: no daemon is asked. Fails when a check fails."""
    from esperd.cli.contract import contract_grid, contract_line
    from esperd.cli.output import Output
    from esperd.growth.contract import check_blueprint
    from esperd.plugins import load_plugins

    output = Output(options)
    proof = check_blueprint(load_plugins().blueprints[name])
    if output.as_json:
        output.json({"blueprint": name, "passed": proof.passed, "checks": proof.checks})
    else:
        output.grid(contract_grid(proof))
        output.line(contract_line(name, proof), style="bold green" if proof.passed else "bold red")
    return None if proof.passed else FAILED


esper.add_command(keys)
esper.add_command(dead_letters)


def with_daemon(options: Options, work: Callable[[Client, Output], Awaitable[ResultT]]) -> ResultT:
    """Connect to the daemon and do this. Where traces are configured, each request begins one."""
    import anyio

    from esperd import tracing
    from esperd.cli.output import Output
    from esperd.client import Client
    from esperd.config import load_config

    async def connected() -> ResultT:
        async with Client(options.endpoint, server_key=options.server_key, client_key=options.client_key) as client:
            return await work(client, Output(options))

    with tracing.exporting(load_config().telemetry.otlp_endpoint, "esper"):
        return anyio.run(connected)


def main() -> None:
    """Entry point of ``esper``."""
    sys.exit(run(esper))


if __name__ == "__main__":
    main()
