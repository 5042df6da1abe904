"""Writes docs/job.md from the Structs in esperd/messages: ``python tests/meta/job_reference.py``. A test compares."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from esperd.messages.jobs import Job

DOCUMENT = Path(__file__).parents[2] / "docs" / "job.md"

INTRODUCTION = """\
# A job, key by key

A job is a TOML file for `esper submit`, or an `esperd.Job` in Python; keys, types and defaults are the same. An unknown key, a
wrong type or a value out of range is an error that names file, line, key and value. The shortest job:

    host = "cnn"
    data = "digits"
    [budget]
    epochs = 20

Keys of the file's top level stand before the first `[table]`. Where `module:function` may be given, the module is imported in the
worker, from `workdir`, by the interpreter `python`. What a model may take and return, and every form of data:
[models.md](models.md).

*Written by `python tests/meta/job_reference.py` from `esperd/messages/jobs.py` and `policy.py`.*
"""

_NAMES = {
    msgspec.inspect.StrType: "string",
    msgspec.inspect.IntType: "integer",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.BoolType: "boolean",
    msgspec.inspect.DictType: "table",
}
_LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
_TOML = {True: "true", False: "false"}


def reference() -> str:
    """The whole document."""
    sections = [INTRODUCTION, "## Top level\n", _table(Job, _split(Job)[0])]
    for name, table in _tables(Job):
        told = _sentence(inspect.getdoc(table) or "").partition("`: ")[2]
        sections += [f"## [{name}]\n", f"{told[:1].upper()}{told[1:]}\n", _table(table, _split(table)[0])]
    return "\n".join(sections)


def every_key() -> dict[str, Any]:
    """Every key a job file may hold, dotted, with its field."""
    nested = {f"{name}.{field.name}": field for name, table in _tables(Job) for field in _split(table)[0]}
    return {field.name: field for field in _split(Job)[0]} | nested


def _tables(table: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every table of a job file by its dotted name; several that look alike (``[gates.topologies.cnn]``) once, as ``NAME``."""
    told: set[type] = set()
    for name, inner in _split(table)[1]:
        if inner not in told:
            told.add(inner)
            yield f"{prefix}{name}", inner
            yield from _tables(inner, f"{prefix}{name}.")


def _split(table: type) -> tuple[list[Any], list[tuple[str, type]]]:
    """Keys and tables of a table. A table of tables is both: the key says what it is for."""
    fields = msgspec.inspect.type_info(table).fields
    tables = []
    for field in fields:
        if isinstance(field.type, msgspec.inspect.StructType):
            tables.append((field.name, field.type.cls))
        elif isinstance(getattr(field.type, "value_type", None), msgspec.inspect.StructType):
            tables.append((f"{field.name}.NAME", field.type.value_type.cls))
    return [field for field in fields if not isinstance(field.type, msgspec.inspect.StructType)], tables


def _table(table: type, fields: list[Any]) -> str:
    meanings = _meanings(table)
    rows = [f"| `{field.name}` | {_kind(field.type)} | {_default(field)} | {meanings[field.name]} |" for field in fields]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _kind(kind: Any) -> str:
    if isinstance(kind, msgspec.inspect.Metadata):  # around what carries a description
        kind = kind.type
    if isinstance(kind, msgspec.inspect.UnionType):
        (kind,) = (part for part in kind.types if not isinstance(part, msgspec.inspect.NoneType))
    if isinstance(kind, msgspec.inspect.LiteralType):
        return " or ".join(f'`"{value}"`' for value in kind.values)
    if isinstance(kind, msgspec.inspect.TupleType):
        return f"list of {len(kind.item_types)} times {_kind(kind.item_types[0])}"
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return f"list of {_kind(kind.item_type)}s"
    limits = [f"{sign} {limit:g}" for name, sign in _LIMITS if (limit := getattr(kind, name, None)) is not None]
    return " ".join([_NAMES[type(kind)], ", ".join(limits)]).strip()


def _default(field: Any) -> str:
    if field.required:
        return "required"
    if field.default_factory is not msgspec.NODEFAULT:
        return "`{}`"
    if field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{_TOML[field.default]}`"
    if isinstance(field.default, str):
        return f'`"{field.default}"`'
    if isinstance(field.default, tuple):
        return f"`[{', '.join(f'{value:g}' for value in field.default)}]`"
    return f"`{field.default:g}`"


def _meanings(table: type) -> dict[str, str]:
    """The string that stands below each field of a Struct."""
    body = ast.parse(textwrap.dedent(inspect.getsource(table))).body[0].body  # type: ignore[attr-defined]
    found: dict[str, str] = {}
    for field, below in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            told = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[field.target.id] = _sentence(inspect.cleandoc(told))
    return found


def _sentence(text: str) -> str:
    """A docstring as one line of Markdown."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return " ".join(plain.split()).replace("|", "\\|")


if __name__ == "__main__":
    DOCUMENT.write_text(reference(), encoding="utf-8")
