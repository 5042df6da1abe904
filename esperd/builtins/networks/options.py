"""Checks the options of the built-in hosts: what a job file holds is untyped until here."""

from __future__ import annotations

from collections.abc import Sequence

from esperd.errors import InvalidModel


def positive(host: str, name: str, value: object) -> int:
    """Return ``value`` as a whole number of at least 1.

    Raises:
        InvalidModel: when it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidModel(
            f"option {name!r} of host {host!r} must be a whole number of at least 1, not {value!r}",
            host=host,
            option=name,
            value=repr(value),
        )
    return value


def share(host: str, name: str, value: object) -> float:
    """Return ``value`` as a number from 0 to below 1.

    Raises:
        InvalidModel: when it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise InvalidModel(
            f"option {name!r} of host {host!r} must be a number from 0 to below 1, not {value!r}",
            host=host,
            option=name,
            value=repr(value),
        )
    return float(value)


def widths(host: str, name: str, value: object) -> tuple[int, ...]:
    """Return ``value`` as at least one whole number of at least 1, one for each layer.

    Raises:
        InvalidModel: when it is anything else.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InvalidModel(
            f"option {name!r} of host {host!r} must list one width for each layer, as in [8, 16], not {value!r}",
            host=host,
            option=name,
            value=repr(value),
        )
    return tuple(positive(host, f"{name}[{index}]", width) for index, width in enumerate(value))
