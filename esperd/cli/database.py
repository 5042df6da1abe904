"""``esperd db``: check, back up and restore a state directory. Works beside a running daemon, but for restoring."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esperd.cli.configured import DIRECTORY, config_option, load, state_option
from esperd.cli.exit_codes import FAILED
from esperd.cli.options import Options, output_options

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.daemon.state_check import StateFound

_options = click.make_pass_decorator(Options)


@click.group()
@output_options
def db() -> None:
    """Check, back up or restore what a daemon keeps."""


@db.command(name="check")
@config_option
@state_option
@output_options
@_options
def check(options: Options, config_file: Path | None, state_dir: Path | None) -> int | None:
    """Verify every database, every blob, and that rows and files belong together. Fails when something is wrong."""
    from esperd.cli.output import Output
    from esperd.daemon.state_check import check_state

    output = Output(options)
    with _progress(output) as progress:
        found = check_state(load(config_file, state_dir).state_directory, progress)
    if output.as_json:
        output.json({"well": found.well, "found": found})
    else:
        _tell(output, found)
    return None if found.well else FAILED


@db.command(name="backup")
@click.argument("target", type=DIRECTORY, metavar="DIR")
@click.option("--copy", is_flag=True, help="Copy blobs also where a second name for the same file would do.")
@click.option("--with-keys", is_flag=True, help="Also the keys of the network, the daemon's secret one with them.")
@config_option
@state_option
@output_options
@_options
def backup(
    options: Options, target: Path, config_file: Path | None, state_dir: Path | None, *, copy: bool, with_keys: bool
) -> int | None:
    """Write everything a daemon keeps into DIR, which is made; keys of the network only when asked. The daemon may run on."""
    from esperd.cli.output import Output
    from esperd.daemon.backup import KEYS, back_up

    output = Output(options)
    state = load(config_file, state_dir).state_directory
    with _progress(output) as progress:
        manifest = back_up(state, target, progress, copy=copy, with_keys=with_keys)
    size = sum(file.size_bytes for file in manifest.files)
    if output.as_json:
        told = {"directory": str(target), "files": len(manifest.files), "bytes": size, "missing": manifest.missing}
        output.json(told | {"keys": manifest.keys})
    else:
        output.line(f"backed up {len(manifest.files)} files, {size:,} bytes, into {target}")
        if manifest.keys == ():
            output.line("the state directory holds no keys of the network")
        elif manifest.keys is not None:
            output.line(f"{len(manifest.keys)} of them are keys of the network: keep the backup as secret as they are")
        elif (state / KEYS).exists():
            output.line("keys of the network are not in it; --with-keys takes them", style="yellow")
        for missing in manifest.missing:
            output.line(f"missing, damaged or unreadable in the state directory: {missing}", style="red")
    return FAILED if manifest.missing else None


@db.command(name="restore")
@click.argument("source", type=DIRECTORY, metavar="DIR")
@click.option("--force", is_flag=True, help="Move the state that is there aside.")
@config_option
@state_option
@output_options
@_options
def restore_command(options: Options, source: Path, config_file: Path | None, state_dir: Path | None, *, force: bool) -> None:
    """Put the backup DIR into the state directory, after verifying it. No daemon may run on it."""
    from esperd.cli.output import Output
    from esperd.daemon.restore import restore

    output = Output(options)
    state = load(config_file, state_dir).state_directory
    with _progress(output) as progress:
        manifest, aside = restore(source, state, progress, force=force)
    if output.as_json:
        output.json({"directory": str(state), "files": len(manifest.files), "replaced": str(aside) if aside else None})
        return
    output.line(f"restored {len(manifest.files)} files of {manifest.created_at} into {state}")
    if aside is not None:
        output.line(f"what was there is in {aside}")


def _tell(output: Output, found: StateFound) -> None:
    for database in found.databases:
        said = "; ".join(database.faults) or f"well, version {database.version}"
        output.line(f"{database.name}.db: {said}", style="red" if database.faults else "")
    counts = f"{len(found.damaged)} damaged, {len(found.unreadable)} unreadable, {found.orphans} that no row refers to"
    output.line(f"blobs: {found.blobs} verified, {counts}")
    for kind, names in (
        ("damaged", found.damaged),
        ("unreadable", found.unreadable),
        ("missing", found.dangling),
        ("quarantined", found.quarantined),
    ):
        for name in names:
            output.line(f"{kind}: {name}", style="yellow" if kind == "quarantined" else "red")
    for note in found.notes:
        output.line(f"note: {note}", style="yellow")
    output.line("nothing is wrong" if found.well else "something is wrong", style="bold green" if found.well else "bold red")


@contextlib.contextmanager
def _progress(output: Output) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not output.is_live:
        yield lambda _what, _done, _total: None
        return
    from rich.progress import Progress, TaskID

    with Progress(console=output.console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
