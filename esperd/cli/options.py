"""Options every command takes, before or after its name: ``--endpoint``, ``--json``, ``--no-color``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


@dataclass
class Options:
    """What was asked for, filled in while the command line is read."""

    endpoint: str | None = None
    as_json: bool = False
    color: bool = True


def _keep_endpoint(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Options).endpoint = value


def _keep_json(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        context.ensure_object(Options).as_json = True


def _keep_color(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        context.ensure_object(Options).color = False


def output_options(function: FunctionT) -> FunctionT:
    """Add ``--json`` and ``--no-color`` to a command."""
    plain = click.option(
        "--no-color",
        is_flag=True,
        expose_value=False,
        callback=_keep_color,
        help="No colour, also when stdout is a terminal (as does NO_COLOR).",
    )
    machine = click.option(
        "--json", "as_json", is_flag=True, expose_value=False, callback=_keep_json, help="Print JSON for programs."
    )
    return machine(plain(function))


def client_options(function: FunctionT) -> FunctionT:
    """Add ``--endpoint``, ``--json`` and ``--no-color`` to a command."""
    endpoint = click.option(
        "--endpoint",
        metavar="URL",
        expose_value=False,
        callback=_keep_endpoint,
        help="Socket of the daemon. Default: $ESPERD_ENDPOINT, else the configured runtime directory's control.sock.",
    )
    return endpoint(output_options(function))
