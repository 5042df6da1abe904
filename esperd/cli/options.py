"""Options every command takes, before or after its name: ``--endpoint`` and its keys, ``--json``, ``--no-color``."""

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
    server_key: str | None = None
    client_key: str | None = None
    as_json: bool = False
    color: bool = True


def _keep_endpoint(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Options).endpoint = value


def _keep_key(context: click.Context, parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        setattr(context.ensure_object(Options), str(parameter.name), value)


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
    """Add ``--endpoint``, ``--server-key``, ``--client-key``, ``--json`` and ``--no-color`` to a command."""
    endpoint = click.option(
        "--endpoint",
        metavar="URL",
        expose_value=False,
        callback=_keep_endpoint,
        help="Socket of the daemon. Default: $ESPERD_ENDPOINT, else the configured runtime directory's control.sock.",
    )
    server_key = click.option(
        "--server-key",
        metavar="KEY",
        expose_value=False,
        callback=_keep_key,
        help="Public key of a daemon on the network: 64 hexadecimal digits, or a file. Default: $ESPERD_SERVER_KEY.",
    )
    client_key = click.option(
        "--client-key",
        metavar="FILE",
        expose_value=False,
        callback=_keep_key,
        help="Your own secret key, for a daemon on the network. Default: $ESPERD_CLIENT_KEY.",
    )
    return endpoint(server_key(client_key(output_options(function))))
