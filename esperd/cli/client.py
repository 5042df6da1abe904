"""``esper``: submit jobs and look at what a daemon does. Commands import what they need when they run."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from esperd.cli.exit_codes import FAILED, run
from esperd.cli.options import Options, client_options, output_options

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.client import Client
    from esperd.growth.merge import Merge
    from esperd.messages.jobs import JobInfo

ResultT = TypeVar("ResultT")
JOB_FILE = click.Path(dir_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)

_options = click.make_pass_decorator(Options)


@click.group(name="esper", context_settings={"help_option_names": ["-h", "--help"]})
@client_options
@click.version_option(package_name="esperd", message="%(prog)s %(version)s")
def esper() -> None:
    """Grow neural networks: hand jobs to an esperd daemon and see what it does with them."""


@esper.command()
@click.argument("job_file", type=JOB_FILE)
@click.option("--watch", "watched", is_flag=True, help="Show the job until it is over; fails when the job does.")
@click.option("--key", metavar="KEY", help="Idempotency key: the same job under the same key is submitted once.")
@client_options
@_options
def submit(options: Options, job_file: Path, key: str | None, *, watched: bool) -> None:
    """Submit a job file."""
    from esperd.cli.live import follow, require_success
    from esperd.jobfile import load_job
    from esperd.messages.jobs import JobSubmitted

    job = load_job(job_file)  # before connecting: a wrong file needs no daemon to be found wrong

    async def work(esper: Client, output: Output) -> None:
        handle = await esper.submit(job, idempotency_key=key)
        if output.as_json:
            output.json(JobSubmitted(id=handle.id, duplicate=handle.duplicate))
        else:
            output.line(f"{'already submitted' if handle.duplicate else 'submitted'} {handle.id}")
        if watched:
            await follow(handle, output)
            require_success(await handle.info())

    _with_daemon(options, work)


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

    _with_daemon(options, work)


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

    _with_daemon(options, work)


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

        _with_daemon(options, work)


_change_command("pause", "Checkpoint a job and stop it, to be resumed later.")
_change_command("resume", "Queue a paused job again.")
_change_command("cancel", "Stop a job for good.")


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

    _with_daemon(options, work)


@esper.command()
@click.argument("job_id", metavar="ID")
@click.option("--to", "directory", type=DIRECTORY, required=True, help="Directory to write; made when absent.")
@click.option("--merge", "merged", is_flag=True, help="Fold seeds into the layers around them, where algebra allows.")
@click.option(
    "--host",
    metavar="MODULE:FUNCTION",
    help="For --merge: what builds the host; imported from the current directory or the job's workdir.",
)
@click.option(
    "--import-host",
    is_flag=True,
    help="For --merge: import the host that the export names, from the job's workdir. Only for jobs you trust.",
)
@client_options
@_options
def export(options: Options, job_id: str, directory: Path, host: str | None, *, merged: bool, import_host: bool) -> None:
    """Write a finished job's grown model and its records. `esperd.load(DIRECTORY)` rebuilds it without a daemon."""
    if (host is not None or import_host) and not merged:
        raise click.UsageError("--host and --import-host belong to --merge")
    if host is not None and import_host:
        raise click.UsageError("--host and --import-host say the same in two ways: give one of them")

    async def work(esper: Client, output: Output) -> None:
        handle = esper.job(job_id)
        written = await handle.export(directory)
        if not output.as_json:
            for path in written:
                output.line(f"written {path}")
        told: dict[str, object] = {"directory": str(directory), "files": [str(path) for path in written], "merged": merged}
        if merged:
            result = _merge(directory, Path((await handle.info()).job.workdir), host, import_host=import_host)
            told |= {"folded": result.folded, "kept": result.kept}
            if not output.as_json:
                output.line(f"merged {directory}: folded {', '.join(result.folded) or 'nothing'}")
                for seed, reason in result.kept.items():
                    output.line(f"kept {seed}: {reason}")
        if output.as_json:
            output.json(told)

    _with_daemon(options, work)


def _merge(directory: Path, workdir: Path, host: str | None, *, import_host: bool) -> Merge:
    """Merge an export, with the user's host where the command named it."""
    from esperd.cli.users_code import make_importable, not_merged
    from esperd.declarations import resolve
    from esperd.errors import EsperError
    from esperd.growth.merge import merge_export

    here = Path.cwd()
    try:
        if host is not None:
            make_importable(here, workdir)
            return merge_export(directory, host=resolve(host))
        if import_host:
            make_importable(workdir, here)
        return merge_export(directory, import_host=import_host)
    except EsperError as error:
        raise not_merged(error, directory, has_host=host is not None or import_host) from error


@esper.command()
@client_options
@_options
def actors(options: Options) -> None:
    """List the daemon's actors and its dead letters."""
    from esperd.cli.listings import actors_grid, dead_letters_line

    async def work(esper: Client, output: Output) -> None:
        listed = await esper.actors()
        if output.as_json:
            output.json(listed)
            return
        output.grid(actors_grid(listed))
        output.line(dead_letters_line(listed))

    _with_daemon(options, work)


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

    _with_daemon(options, work)


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

    _with_daemon(options, work)


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


def _with_daemon(options: Options, work: Callable[[Client, Output], Awaitable[ResultT]]) -> ResultT:
    """Connect to the daemon and do this."""
    import anyio

    from esperd.cli.output import Output
    from esperd.client import Client

    async def connected() -> ResultT:
        async with Client(options.endpoint) as client:
            return await work(client, Output(options))

    return anyio.run(connected)


def main() -> None:
    """Entry point of ``esper``."""
    sys.exit(run(esper))


if __name__ == "__main__":
    main()
