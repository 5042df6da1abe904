"""Where commands write: tables on a terminal, aligned plain text in a pipe, JSON when asked."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from esperd.cli.options import Options

if TYPE_CHECKING:
    from rich.console import Console

    from esperd.report.grid import Grid


class Output:
    """Standard output, as the options ask for it. rich is imported when stdout is a terminal, and only then."""

    def __init__(self, options: Options) -> None:
        self.as_json = options.as_json
        self._color = options.color

    @property
    def is_live(self) -> bool:
        """Whether a person watches: stdout is a terminal and JSON was not asked for."""
        return not self.as_json and sys.stdout.isatty()

    @cached_property
    def console(self) -> Console:
        """The terminal. NO_COLOR is honoured by rich itself."""
        from rich.console import Console

        return Console(no_color=True if not self._color else None, highlight=False)

    def json(self, value: Any) -> None:  # noqa: ANN401 - whatever msgspec encodes
        """One JSON document on one line."""
        print(msgspec.json.encode(value).decode(), flush=True)

    def line(self, text: str, style: str = "") -> None:
        """One line of text, styled on a terminal."""
        if self.is_live:
            self.console.print(text, style=style or None, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def grid(self, grid: Grid) -> None:
        """A table."""
        if self.is_live:
            self.console.print(grid.rich())
        else:
            print(grid.plain(), flush=True)
