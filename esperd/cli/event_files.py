"""Events as files: JSON lines, or Parquet (``pip install "esperd[parquet]"``). Written whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from esperd.errors import MissingExtra
from esperd.messages.telemetry import Event

if TYPE_CHECKING:
    import pyarrow as pa

Write = Callable[[Event], None]

ROW_GROUP = 10_000
"""Events kept in memory before they are written as one group of rows; chosen, not measured."""


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Write]:
    """A file that takes events; in its place when the block ends well, nowhere when it does not.

    Args:
        file: its suffix, ``.jsonl`` or ``.parquet``, says what it becomes. An existing one is replaced.

    Raises:
        MissingExtra: when it is to be Parquet and pyarrow is not installed.
        OSError: when it cannot be written.
    """
    form = _parquet if file.suffix == ".parquet" else _json_lines
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with form(partial) as write:
            yield write
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    """Each line what ``esper events --json`` prints."""
    with path.open("wb") as stream:

        def write(event: Event) -> None:
            stream.write(msgspec.json.encode(event) + b"\n")

        yield write


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    """Columns job, sequence, at (UTC), type, and the body as JSON: types have fields of their own."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise MissingExtra(
            'Parquet files need pyarrow: pip install "esperd[parquet]", or export to a .jsonl file',
            extra="parquet",
            package="pyarrow",
        ) from error
    schema = _schema(pa)
    rows: list[dict[str, Any]] = []
    with ParquetWriter(path, schema, compression="zstd") as writer:

        def write(event: Event) -> None:
            rows.append(_row(event))
            if len(rows) >= ROW_GROUP:
                flush()

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()

        yield write
        if rows:
            flush()


def _schema(arrow: Any) -> pa.Schema:  # noqa: ANN401 - a module that may be absent
    return arrow.schema(
        [
            ("job", arrow.string()),
            ("sequence", arrow.int64()),
            ("at", arrow.timestamp("us", tz="UTC")),
            ("type", arrow.string()),
            ("body", arrow.string()),
        ]
    )


def _row(event: Event) -> dict[str, Any]:
    return {
        "job": event.job,
        "sequence": event.sequence,
        "at": round(event.at * 1e6),
        "type": type(event.body).__name__,
        "body": msgspec.json.encode(event.body).decode(),
    }
