"""What cannot be undone is asked about first, and never done because nobody was there to ask."""

from __future__ import annotations

import sys

import click


def may_forget(tries: int, pattern: str, *, yes: bool, as_json: bool) -> bool:
    """Whether evidence may be deleted.

    Args:
        tries: that would be gone.
        pattern: of the blueprints they are of.
        yes: it was said already.
        as_json: a program reads the output, so nobody is asked.

    Returns:
        What was said; a terminal is asked.

    Raises:
        click.UsageError: when nobody said so, and nobody can be asked.
    """
    if yes:
        return True
    whose = "all blueprints" if pattern == "*" else f"blueprints like {pattern!r}"
    if as_json or not sys.stdin.isatty():
        raise click.UsageError(f"{tries} tries of {whose} would be forgotten for good; add --yes to have it done")
    return click.confirm(f"forget {tries} tries of {whose} for good?", err=True)
