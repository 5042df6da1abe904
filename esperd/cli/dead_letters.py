"""``esper dead-letters``: messages that reached nobody or whose handler failed; look at them, deliver one again, forget them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import click

from esperd.cli.options import Options, client_options

if TYPE_CHECKING:
    from esperd.cli.output import Output
    from esperd.client import Client
    from esperd.messages import Message, Reply
    from esperd.messages.dead_letters import DeadLetterSummary
    from esperd.report.grid import Grid

ReplyT = TypeVar("ReplyT", bound="Reply")
LETTER = click.IntRange(1, 2**63 - 1)

_options = click.make_pass_decorator(Options)


@click.group(name="dead-letters")
def dead_letters() -> None:
    """Messages that reached nobody, or whose handler failed: list, show, retry, drop."""


@dead_letters.command(name="list")
@click.option("--limit", type=click.IntRange(1, 1_000), default=100, show_default=True, help="Show at most this many.")
@client_options
@_options
def list_letters(options: Options, limit: int) -> None:
    """List the dead letters that are kept, newest first."""
    from esperd.cli.output import Output
    from esperd.messages.dead_letters import DeadLetterList, ListDeadLetters

    listed = _ask(options, ListDeadLetters(limit=limit), DeadLetterList)
    output = Output(options)
    if output.as_json:
        output.json(listed)
    else:
        output.grid(_grid(listed.letters))
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(listed.counts.items()))
        output.line(f"since the daemon started: {told or 'none'}")


@dead_letters.command()
@click.argument("letter_id", metavar="ID", type=LETTER)
@client_options
@_options
def show(options: Options, letter_id: int) -> None:
    """Show one dead letter with its message."""
    from esperd.cli.output import Output
    from esperd.messages.dead_letters import DeadLetterShown, ShowDeadLetter

    shown = _ask(options, ShowDeadLetter(id=letter_id), DeadLetterShown)
    output = Output(options)
    if output.as_json:
        output.json(shown)
    else:
        output.grid(_grid((shown.letter,)))
        output.line(shown.letter.detail or "no further detail")
        output.line(shown.body if shown.body is not None else "its message was not kept")


@dead_letters.command()
@click.argument("letter_id", metavar="ID", type=LETTER)
@client_options
@_options
def retry(options: Options, letter_id: int) -> None:
    """Deliver a dead letter's message to whoever bears its address now; kept when that fails."""
    from esperd.cli.output import Output
    from esperd.messages import Reply
    from esperd.messages.dead_letters import RetryDeadLetter

    answer = _ask(options, RetryDeadLetter(id=letter_id), Reply)
    output = Output(options)
    if output.as_json:
        output.json({"id": letter_id, "answer": type(answer).__name__})
    else:
        output.line(f"delivered dead letter {letter_id}: answered with {type(answer).__name__}")


@dead_letters.command()
@click.argument("letter_id", metavar="[ID]", type=LETTER, required=False)
@click.option("--all", "everything", is_flag=True, help="Forget all of them.")
@client_options
@_options
def drop(options: Options, letter_id: int | None, *, everything: bool) -> None:
    """Forget one dead letter, or all. What was counted stays counted."""
    from esperd.cli.output import Output
    from esperd.messages.dead_letters import DeadLettersDropped, DropDeadLetters

    if (letter_id is None) is not everything:
        raise click.UsageError("name one dead letter, or say --all")
    dropped = _ask(options, DropDeadLetters(id=letter_id), DeadLettersDropped)
    output = Output(options)
    if output.as_json:
        output.json(dropped)
    else:
        output.line(f"dropped: {dropped.dropped}")


def _grid(letters: tuple[DeadLetterSummary, ...]) -> Grid:
    from esperd.report import numbers
    from esperd.report.grid import Column, Grid

    return Grid(
        "",
        (
            Column("id", "right", style="bold"),
            Column("reason"),
            Column("message"),
            Column("from"),
            Column("to"),
            Column("age", "right"),
            Column("size", "right"),
        ),
        [
            (
                str(letter.id),
                letter.reason,
                letter.message_type or numbers.UNKNOWN,
                letter.sender,
                letter.to,
                numbers.duration(letter.age_s),
                numbers.size(letter.size_bytes),
            )
            for letter in letters
        ],
        empty="no dead letters",
    )


def _ask(options: Options, message: Message, answer: type[ReplyT]) -> ReplyT:
    """Connect to the daemon and ask this."""
    from esperd.cli.client import with_daemon

    async def work(client: Client, _output: Output) -> ReplyT:
        return await client.ask(message, answer)

    return with_daemon(options, work)
