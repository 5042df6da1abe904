"""Files as bytes, and the options that name them: what a job file holds is untyped until here."""

from __future__ import annotations

import os
from pathlib import Path

from esperd.errors import InvalidData


def path_of(data: str, option: str, value: object) -> Path:
    """An option as a path; a relative one starts in the job's ``workdir``, where the worker runs.

    Raises:
        InvalidData: when it is no path.
    """
    if not isinstance(value, str) or not value:
        raise InvalidData(f"option {option!r} of data {data!r} must be a path, not {value!r}", key="data_options", option=option)
    if not _can_be_a_name(value):
        raise InvalidData(
            f"option {option!r} of data {data!r} cannot be a path: no file name holds what {value!r} holds",
            key="data_options",
            option=option,
        )
    return Path(value)


def _can_be_a_name(path: str) -> bool:
    """Whether the operating system can be asked for it: no NUL, and nothing the file system's encoding lacks."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def whole_number(data: str, option: str, value: object) -> int:
    """An option as a whole number of at least 1.

    Raises:
        InvalidData: when it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidData(
            f"option {option!r} of data {data!r} must be a whole number of at least 1, not {value!r}",
            key="data_options",
            option=option,
        )
    return value


def read(path: Path) -> bytes:
    """The whole file.

    Raises:
        InvalidData: when it cannot be read; says why.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror or error}", path=str(path)) from error
