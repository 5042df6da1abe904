"""Job files: TOML → :class:`~esperd.messages.jobs.Job`, strictly. What is wrong is named with file, line, key and value."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from esperd.errors import InvalidJob
from esperd.messages.base import Value
from esperd.messages.jobs import BUILT_IN_OPTIMIZERS, Job, Section

_UNKNOWN_KEY = re.compile(r"Object contains unknown field `(?P<key>.*)`", re.DOTALL)
_MISSING_KEY = re.compile(r"Object missing required field `(?P<key>.*)`", re.DOTALL)
_PLACE = re.compile(r"(?P<problem>.*?)(?: - at `(?P<key>key` in `)?\$(?P<path>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")
_HEADER = re.compile(r"\s*\[([A-Za-z0-9_\-.\"' ]+)\]\s*(?:#.*)?$")
_TYPE_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
}

Step = str | int


def load_job(path: Path) -> Job:
    """Read a job file.

    Args:
        path: a TOML file; see ``docs/job.md`` for its keys. A relative ``workdir`` in it is relative to the file's folder.

    Returns:
        The job, with an absolute ``workdir``.

    Raises:
        InvalidJob: when the file cannot be read, is not TOML, has an unknown key, lacks a required one, or a value is
            mistyped, out of range or contradicts another one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidJob(f"cannot read {path}: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise InvalidJob(f"{path} is not UTF-8: {error}", file=str(path)) from error
    return parse_job(text, path.absolute().parent, origin=str(path))


def parse_job(text: str, directory: Path, *, origin: str) -> Job:
    """Read a job from TOML text.

    Args:
        text: the TOML.
        directory: what a relative ``workdir`` is relative to.
        origin: how errors call the text: its file name.

    Raises:
        InvalidJob: as :func:`load_job`.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidJob(f"{origin} is not TOML: {error}", file=origin) from error
    return job_from(values, directory, origin=origin, text=text)


def job_from(values: Mapping[str, Any], directory: Path, *, origin: str = "job", text: str | None = None) -> Job:
    """Build a job from plain values, as they stand in a TOML file.

    Args:
        values: tables as dictionaries.
        directory: what a relative ``workdir`` is relative to.
        origin: how errors call the values.
        text: TOML text they come from, so that errors can name the line; None when there is none.

    Raises:
        InvalidJob: as :func:`load_job`.
    """
    try:
        job = msgspec.convert(dict(values), Job)
    except msgspec.ValidationError as error:
        raise _explain(str(error), values, origin=origin, text=text) from error
    _check_budget(job, origin)
    if contradiction := contradiction_in(job):
        steps, told = contradiction
        raise InvalidJob(
            f"{_where(steps, origin, text)}: {_dotted(steps)}: {told}",
            file=origin,
            key=_dotted(steps),
            line=_line_of(steps, text),
        )
    for steps, number in _numbers(job):
        if not math.isfinite(number):
            raise InvalidJob(
                f"{_where(steps, origin, text)}: {_dotted(steps)}: expected a finite number, got {number}",
                file=origin,
                key=_dotted(steps),
            )
    return msgspec.structs.replace(job, workdir=str((directory / Path(job.workdir).expanduser()).absolute()))


def check_job(job: Job, directory: Path) -> Job:
    """Check a job built in Python as strictly as one read from a file: Structs do not check what they are made of.

    Args:
        job: the job.
        directory: what a relative ``workdir`` is relative to.

    Returns:
        The same job with an absolute ``workdir``.

    Raises:
        InvalidJob: when a value is mistyped or out of range, or an option is not plain data.
    """
    try:
        values = msgspec.to_builtins(job)
    except (TypeError, msgspec.ValidationError) as error:
        raise InvalidJob(f"job: host_options and data_options hold plain values only: {error}") from error
    return job_from(values, directory)


def _check_budget(job: Job, origin: str) -> None:
    if job.budget.epochs is None and job.budget.flops is None and job.budget.seconds is None:
        raise InvalidJob(
            f"{origin}: [budget] sets no end: give at least one of epochs, flops, seconds",
            file=origin,
            key="budget",
        )


def contradiction_in(job: Job) -> tuple[list[Step], str] | None:
    """Values that are each in range and cannot hold together: the key to change, and what is wrong with it. None: no such.

    The daemon asks this of every job too: not every client reads job files.
    """
    optimizer, gates, epochs = job.optimizer, job.gates, job.budget.epochs
    if optimizer.name == "sgd" and optimizer.nesterov and optimizer.momentum == 0.0:
        return ["optimizer", "nesterov"], "needs momentum; set optimizer.momentum above 0, or nesterov = false"
    if optimizer.options and optimizer.name in BUILT_IN_OPTIMIZERS:
        named = ", ".join(optimizer.options)
        return ["optimizer", "options"], (
            f"{named}: options are for an optimizer of your own, those of {optimizer.name!r} are keys of [optimizer]; remove "
            "them, or set optimizer.name to a module:function that takes them"
        )
    policy = job.policy
    if policy.plateau_release < policy.plateau_improvement:
        return ["policy", "plateau_release"], (
            f"{policy.plateau_release:g} is below policy.plateau_improvement = {policy.plateau_improvement:g}, so a plateau "
            "would end while it lasts; raise it, or lower the other"
        )
    if gates.proof == "trial" and epochs is not None and gates.trial_epochs > epochs:
        return ["gates", "trial_epochs"], (
            f"a trial of {gates.trial_epochs:g} epochs is longer than the whole job, budget.epochs = {epochs}; lower it, or "
            "raise budget.epochs"
        )
    return None


def _numbers(table: msgspec.Struct, steps: tuple[Step, ...] = ()) -> Iterator[tuple[list[Step], float]]:
    """Every floating-point number of a job and where it stands, options left out: those belong to the user's functions."""
    for field in msgspec.structs.fields(table):
        value = getattr(table, field.name)
        if isinstance(value, msgspec.Struct):
            yield from _numbers(value, (*steps, field.name))
        elif isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(inner, msgspec.Struct):
                    yield from _numbers(inner, (*steps, field.name, name))
        elif isinstance(value, float):
            yield [*steps, field.name], value


def _where(steps: list[Step], origin: str, text: str | None) -> str:
    line = _line_of(steps, text)
    return origin if line is None else f"{origin}, line {line}"


def _explain(message: str, values: Mapping[str, Any], *, origin: str, text: str | None) -> InvalidJob:
    """The error a person can act on, from msgspec's text and the values it was given."""
    place = _PLACE.fullmatch(message)
    problem, path = (place["problem"], place["path"] or "") if place else (message, "")
    steps = _steps(path, values)
    misnamed = _misnamed(steps, values) if place and place["key"] else None
    unknown = _UNKNOWN_KEY.fullmatch(problem)
    if misnamed is not None or unknown:
        key = misnamed if misnamed is not None else unknown["key"] if unknown else ""
        known = _keys_of(steps)
        told = f"unknown key {key!r}{_within(steps)}; {_suggest(key, known)}"
        steps = [*steps, key]
    elif missing := _MISSING_KEY.fullmatch(problem):
        key = missing["key"]
        told = f"the key {key!r} is missing{_within(steps) or ' at the top level'}; {_how_to_add(key)}"
        return InvalidJob(f"{origin}: {told}", file=origin, key=_dotted([*steps, key]))
    else:
        told = f"{_dotted(steps) or 'job'}: {_say(problem, steps, values)}"
    where = _where(steps, origin, text)
    return InvalidJob(f"{where}: {told}", file=origin, key=_dotted(steps), line=_line_of(steps, text))


def _steps(path: str, values: Mapping[str, Any]) -> list[Step]:
    """``.slots.patterns[1]`` → its steps. Of a table of tables msgspec says ``[...]``, and not which: the first that is wrong."""
    steps: list[Step] = []
    for name, inside in _STEP.findall(path):
        if inside == "...":
            kind = get_args(_type_at(steps))[1]
            steps.append(next(key for key, value in _value_at(steps, values).items() if not _fits(value, kind)))
        else:
            steps.append(name or int(inside))
    return steps


def _fits(value: Any, kind: Any) -> bool:  # noqa: ANN401 - whatever the file holds, and a type annotation
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _misnamed(steps: list[Step], values: Mapping[str, Any]) -> str:
    """The first key of a table of tables that is none of the names it may hold."""
    known = _keys_of(steps)
    return next(str(key) for key in _value_at(steps, values) if key not in known)


def _say(problem: str, steps: list[Step], values: Mapping[str, Any]) -> str:
    """``Expected `int | null`, got `str``` → ``expected an integer, got 'ten'``."""
    got = f", got {_value_at(steps, values)!r}"
    if problem.startswith("Invalid enum value"):
        return f"expected {_choices(steps)}{got}"
    if "matching regex" in problem and (described := _description_at(steps)):
        return f"expected {described}{got}"
    wanted = re.match(r"Expected `([^`]+)`(?: (?!got)([^,]*))?", problem)
    if not wanted:
        return f"{problem[:1].lower()}{problem[1:]}{got}"
    kinds = [_TYPE_NAMES.get(kind.strip(), kind.strip()) for kind in wanted[1].split("|") if kind.strip() != "null"]
    limit = f" {wanted[2]}" if wanted[2] else ""
    return f"expected {' or '.join(kinds)}{limit}{got}"


def _suggest(key: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    listed = f"known keys: {', '.join(known)}"
    return f"did you mean {nearest[0]!r}? ({listed})" if nearest else listed


def _how_to_add(key: str) -> str:
    examples = {
        "host": 'host = "cnn", or host = "module:function" for your own model',
        "data": 'data = "digits", a path to an .npz file, or data = "module:function"',
        "budget": "a [budget] table with at least one of epochs, flops, seconds",
    }
    return f"add {examples[key]}" if key in examples else "add it"


def _within(steps: list[Step]) -> str:
    return f" in [{_dotted(steps)}]" if steps else ""


def _dotted(steps: list[Step]) -> str:
    dotted = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return dotted.removeprefix(".")


def _value_at(steps: list[Step], values: Any) -> Any:  # noqa: ANN401 - whatever the file holds there
    for step in steps:
        values = values[step]
    return values


def _type_at(steps: list[Step]) -> Any:  # noqa: ANN401 - a type annotation
    """The annotation of the place, without ``Annotated`` and optionality; None where the path leaves the Structs."""
    here: Any = Job
    for step in steps:
        if get_origin(here) is dict:
            here = get_args(here)[1]
            continue
        if isinstance(step, int) or not (isinstance(here, type) and issubclass(here, (Section, Value))):
            return None
        here = get_type_hints(here).get(step)
        if get_origin(here) is Annotated:
            here = get_args(here)[0]
        if get_origin(here) in (Union, UnionType):
            here = next(part for part in get_args(here) if part is not type(None))
    return here


def _description_at(steps: list[Step]) -> str | None:
    """What a place may hold in words, where its annotation says so."""
    table, last = _type_at(steps[:-1]), steps[-1]
    if not isinstance(table, type) or not issubclass(table, msgspec.Struct):
        return None
    annotation = get_type_hints(table, include_extras=True).get(last) if isinstance(last, str) else None
    told = [meta.description for meta in get_args(annotation)[1:] if isinstance(meta, msgspec.Meta)]
    return told[0] if told else None


def _keys_of(steps: list[Step]) -> list[str]:
    table = _type_at(steps)
    if get_origin(table) is dict:
        return list(get_args(get_args(table)[0]))
    return [field.encode_name for field in msgspec.structs.fields(table)] if table is not None else []


def _choices(steps: list[Step]) -> str:
    kind = _type_at(steps)
    names = [repr(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    return " or ".join(names) if names else "one of the allowed values"


def _line_of(steps: list[Step], text: str | None) -> int | None:
    """Line on which a key is assigned; None when it is not written plainly as ``key = …`` under its ``[table]``."""
    wanted = [step for step in steps if isinstance(step, str)]
    if text is None or not wanted:
        return None
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.match(line):
            table = _key_parts(header[1])
            if table == wanted:
                return number
        elif (assignment := _ASSIGNMENT.match(line)) and table + _key_parts(assignment[1]) == wanted:
            return number
    return None


def _key_parts(key: str) -> list[str]:
    return [part.strip().strip("\"'") for part in key.split(".")]
