"""How a command ends: its exit code, and one line on stderr when it failed. Documented in ``docs/cli.md``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import IO

import click

from esperd.cli.options import Options
from esperd.errors import EsperError, WireValue

OK = 0
FAILED = 1
BAD_INPUT = 2
NO_DAEMON = 3
NOT_FOUND = 4
CONFLICT = 5
INTERRUPTED = 130
"""128 + SIGINT, as shells have it. The codes 1 to 5 are the ``exit_status`` of the classes in :mod:`esperd.errors`."""


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a command line and say how it ended.

    Args:
        command: the program.
        arguments: words after the program's name; None: those of this process.

    Returns:
        The exit code. An error was told on stderr: a line ``error: …``, or with ``--json`` an object
        ``{"error": {"code", "message", "fields"}}``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = Options()
    try:
        ended = command.main(args=words, prog_name=command.name, obj=options, standalone_mode=False)
        sys.stdout.flush()
    except EsperError as error:
        tell_error(error.message, error.code, error.fields, as_json=options.as_json)
        return error.exit_status
    except click.UsageError as error:
        _tell_usage(error, as_json=options.as_json or "--json" in words)
        return BAD_INPUT
    except (click.Abort, KeyboardInterrupt):
        tell_error("interrupted", "interrupted", {}, as_json=options.as_json)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        tell_error(_say(error), "os_error", {}, as_json=options.as_json)
        return FAILED
    return ended if isinstance(ended, int) else OK


def tell_error(message: str, code: str, fields: Mapping[str, WireValue], *, as_json: bool, stream: IO[str] | None = None) -> None:
    """Write an error to ``stream`` (stderr when None), behind the traceback of the user's code where there is one."""
    story = fields.get("traceback")
    text = f"{story}error: {message}" if isinstance(story, str) and story else f"error: {message}"
    if as_json:
        text = json.dumps({"error": {"code": code, "message": message, "fields": dict(fields)}})
    print(text, file=stream or sys.stderr)


def _tell_usage(error: click.UsageError, *, as_json: bool) -> None:
    if as_json:
        tell_error(error.format_message(), "usage", {}, as_json=True)
    else:
        error.show()


def _say(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
