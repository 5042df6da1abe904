"""``esper events``: search the log of everything that happened, follow it, or write it to a file."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from esperd.cli.options import Options, client_options

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.client import Client
    from esperd.messages.telemetry import Event, FindEvents

FOLLOW_S = 1.0
"""How often a follower looks for what was recorded since; chosen, not measured."""
UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
EXPORTS = (".jsonl", ".parquet")


def moment(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """A time as people give it, in seconds since the epoch: ``90s``, ``10m``, ``2h``, ``3d`` ago, or ISO 8601 (local time
    unless it says otherwise).
    """
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip()):
        return time.time() - float(ago[1]) * UNIT_SECONDS[ago[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{text!r} is no time; it is one as 2026-01-31T12:00 or 2026-01-31T12:00+00:00, or an age as 90s, 10m, 2h or 3d"
        ) from error


@click.command()
@click.option("--job", "job_id", metavar="ID", help="Only of this job.")
@click.option("--type", "types", metavar="TYPE", multiple=True, help="Only of this type, as EpochCompleted. Repeatable.")
@click.option("--since", metavar="TIME", callback=moment, help="Not before: ISO 8601, or an age as 90s, 10m, 2h, 3d.")
@click.option("--until", metavar="TIME", callback=moment, help="Before: ISO 8601, or an age.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many. Default: all there are.")
@click.option("--follow", "followed", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option(
    "--export",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write them to FILE.jsonl or FILE.parquet instead of showing them.",
)
@client_options
@click.make_pass_decorator(Options)
def events(
    options: Options,
    job_id: str | None,
    types: tuple[str, ...],
    since: float | None,
    until: float | None,
    limit: int | None,
    file: Path | None,
    *,
    followed: bool,
) -> None:
    """Show what happened, oldest first: of one job or all, by type and time."""
    if file is not None and file.suffix not in EXPORTS:
        raise click.UsageError(f"--export writes {' or '.join(EXPORTS)}, not {file.name}")
    if file is not None and followed:
        raise click.UsageError("--export writes what there is; leave --follow out")
    from esperd.cli.client import with_daemon
    from esperd.messages.telemetry import FindEvents

    asked = FindEvents(job=job_id, types=types, since=since, until=until)

    async def work(esper: Client, output: Output) -> None:
        async with aclosing(found(esper, asked, limit, followed=followed)) as found_events:
            if file is not None:
                await _export(found_events, file, output)
                return
            async for event in found_events:
                if output.as_json:
                    output.json(event)
                else:
                    output.line(line_of(event))

    with_daemon(options, work)


async def found(
    esper: Client, asked: FindEvents, limit: int | None = None, *, followed: bool = False
) -> AsyncGenerator[Event, None]:
    """What a search finds, a page at a time; then, when followed, what is recorded from there on, for ever.

    Args:
        esper: open.
        asked: the search; its first page.
        limit: events at most; None: all.
        followed: go on.
    """
    import anyio
    import msgspec

    from esperd.messages.telemetry import EventsFound

    left = limit
    while True:
        if left is not None:
            asked = msgspec.structs.replace(asked, limit=min(left, asked.limit))
        page = await esper.ask(asked, EventsFound)
        for event in page.events:
            yield event
        left = None if left is None else left - len(page.events)
        if left == 0:
            return
        if page.next is not None:
            asked = msgspec.structs.replace(asked, after=page.next, recorded_until=page.recorded)
            continue
        if not followed:
            return
        if asked.recorded_after is not None and not page.events:
            await anyio.sleep(FOLLOW_S)
        asked = msgspec.structs.replace(asked, after=None, recorded_until=None, recorded_after=page.recorded)


def line_of(event: Event) -> str:
    """An event for people, on one line."""
    from esperd.cli.lines import describe

    at = datetime.fromtimestamp(event.at).isoformat(sep=" ", timespec="milliseconds")
    return f"{at}  {event.job}  {event.sequence:>5}  {type(event.body).__name__:<20}  {describe(event) or ''}".rstrip()


async def _export(events: AsyncGenerator[Event, None], file: Path, output: Output) -> None:
    from esperd.cli.event_files import opened

    count = 0
    with opened(file) as write:
        async for event in events:
            write(event)
            count += 1
    if output.as_json:
        output.json({"file": str(file), "events": count})
    else:
        output.line(f"written {file}: {count} events")
