"""A table of text that can be shown two ways: with rich on a terminal, as aligned plain text anywhere else."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

NOTE_WIDTH = 94
"""Characters of a line of a note, so that it stays within 100 columns."""


@dataclass(frozen=True)
class Column:
    """A column. ``style`` is a rich style, used on terminals only; ``widest`` wraps longer text."""

    title: str
    align: Literal["left", "right"] = "left"
    style: str = ""
    widest: int | None = None


@dataclass(frozen=True)
class Cell:
    """Text with a rich style of its own."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Grid:
    """A titled table. ``empty`` is what is said when there are no rows, ``note`` what is said under those that there are."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str | Cell]] = field(default_factory=tuple)
    empty: str = ""
    note: str = ""

    def plain(self) -> str:
        """Aligned columns, two spaces apart, under their titles; no line ends in a space."""
        if not self.rows:
            return "\n".join(line for line in (self.title, self.empty and f"  {self.empty}") if line)
        cells = [
            [_wrapped(_text(cell), column.widest) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows
        ]
        widths = [
            max(len(column.title), *(len(line) for row in cells for line in row[index]))
            for index, column in enumerate(self.columns)
        ]
        lines = [self.title] if self.title else []
        lines.append(self._line([column.title for column in self.columns], widths))
        for row in cells:
            lines += [self._line(line, widths) for line in zip_longest(*row, fillvalue="")]
        lines += [("  " if self.title else "") + line for line in textwrap.wrap(self.note, NOTE_WIDTH)]
        return "\n".join(lines)

    def rich(self) -> RenderableType:
        """The same as a rich table, with its note under it."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            header_style="bold",
            pad_edge=False,
            caption=self.empty if not self.rows else None,
            caption_justify="left",
            show_header=bool(self.rows),
        )
        for column in self.columns:
            table.add_column(
                column.title,
                justify=column.align,
                style=column.style or None,
                max_width=column.widest,
                overflow="fold",
                no_wrap=column.widest is None,
            )
        for row in self.rows:
            table.add_row(*(Text(_text(cell), style=cell.style if isinstance(cell, Cell) else "") for cell in row))
        if not self.rows or not self.note:
            return table
        return Group(table, Text("\n".join(textwrap.wrap(self.note, NOTE_WIDTH)), style="dim"))

    def _line(self, cells: Sequence[str], widths: Sequence[int]) -> str:
        padded = [
            cell.rjust(width) if column.align == "right" else cell.ljust(width)
            for cell, width, column in zip(cells, widths, self.columns, strict=True)
        ]
        return ("  " if self.title else "") + "  ".join(padded).rstrip()


def _text(cell: str | Cell) -> str:
    return cell.text if isinstance(cell, Cell) else cell


def _wrapped(text: str, widest: int | None) -> list[str]:
    if widest is None:
        return text.splitlines() or [""]
    return [line for part in text.splitlines() for line in textwrap.wrap(part, widest)] or [""]
