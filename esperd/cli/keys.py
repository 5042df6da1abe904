"""``esper keys``: make key pairs, and say who may reach this machine's daemon over the network. No secret key is ever printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from esperd.cli.options import Options, output_options

if TYPE_CHECKING:
    from esperd.report.grid import Grid

DIRECTORY = click.Path(file_okay=False, path_type=Path)

_options = click.make_pass_decorator(Options)
_state_option = click.option(
    "--state-dir", type=DIRECTORY, help="State directory of the daemon. Default: that of the configuration's variables."
)


@click.group()
@output_options
def keys() -> None:
    """Keys of clients on other machines. No daemon is asked."""


@keys.command()
@click.argument("name", required=False)
@click.option("--directory", type=DIRECTORY, help="Where NAME.key goes. Default: `keys` in the user's configuration directory.")
@click.option("--server", is_flag=True, help="Make the daemon's own key, in its state directory, instead of a client's.")
@_state_option
@output_options
@_options
def create(options: Options, name: str | None, directory: Path | None, state_dir: Path | None, *, server: bool) -> None:
    """Make a key pair; print its public key, keep the secret one in a file of mode 0600."""
    import platformdirs

    from esperd.actors.keys import SECRET_SUFFIX, checked_name, create_pair
    from esperd.cli.output import Output
    from esperd.daemon.remote import server_key_file

    if server == (name is not None) or (server and directory is not None) or (not server and state_dir is not None):
        raise click.UsageError("give NAME (and --directory) for a client's key, or --server (and --state-dir) for the daemon's")
    if server:
        path = server_key_file(_state(state_dir))
    else:
        folder = directory or Path(platformdirs.user_config_dir("esperd")) / "keys"
        path = folder / f"{checked_name(name or '')}{SECRET_SUFFIX}"
    pair = create_pair(path)
    output = Output(options)
    if output.as_json:
        output.json({"file": str(path), **_shown(name, pair.public)})
        return
    output.line(f"secret key: {path} (keep it)")
    output.line(f"public key: {pair.public.hex()}")
    if name is not None:
        output.line(f"on the daemon's machine: esper keys allow {name} {pair.public.hex()}")


@keys.command(name="list")
@_state_option
@output_options
@_options
def list_keys(options: Options, state_dir: Path | None) -> None:
    """Show the daemon's public key, and who is allowed."""
    from esperd.actors.keys import read_pair
    from esperd.cli.output import Output
    from esperd.daemon.remote import allow_list, server_key_file

    state = _state(state_dir)
    file = server_key_file(state)
    server = read_pair(file).public if file.exists() else None
    those = allow_list(state)
    allowed = sorted((name, public) for public, name in those.names().items())
    output = Output(options)
    if output.as_json:
        shown = [_shown(*row) for row in allowed]
        output.json({"server": _shown(None, server) if server else None, "allowed": shown, "skipped": those.skipped})
        return
    output.line(f"server key: {server.hex() if server else 'none yet; `esper keys create --server` makes one'}")
    output.grid(_grid(allowed))
    for file_name, why in those.skipped.items():
        output.line(f"{those.directory / file_name} allows nobody: {why}", style="yellow")


@keys.command()
@click.argument("name")
@click.argument("key")
@_state_option
@output_options
@_options
def allow(options: Options, name: str, key: str, state_dir: Path | None) -> None:
    """Allow the client NAME, whose public KEY is 64 hexadecimal digits or a file, from now on."""
    from esperd.actors.keys import public_key
    from esperd.daemon.remote import allow_list

    public = public_key(key)
    allow_list(_state(state_dir)).allow(name, public)
    _tell(options, "allowed", name, public)


@keys.command()
@click.argument("name")
@_state_option
@output_options
@_options
def revoke(options: Options, name: str, state_dir: Path | None) -> None:
    """Allow the client NAME no more; also what it has open is refused from now on."""
    from esperd.daemon.remote import allow_list

    _tell(options, "revoked", name, allow_list(_state(state_dir)).revoke(name))


def _grid(allowed: list[tuple[str, bytes]]) -> Grid:
    from esperd.actors.keys import fingerprint
    from esperd.report.grid import Column, Grid

    return Grid(
        "",
        (Column("name", style="bold"), Column("fingerprint"), Column("public key")),
        [(name, fingerprint(public), public.hex()) for name, public in allowed],
        empty="nobody is allowed",
    )


def _state(named: Path | None) -> Path:
    from esperd.config import load_config

    return named.absolute() if named is not None else load_config().state_directory


def _tell(options: Options, what: str, name: str, public: bytes) -> None:
    from esperd.actors.keys import fingerprint
    from esperd.cli.output import Output

    output = Output(options)
    if output.as_json:
        output.json(_shown(name, public))
    else:
        output.line(f"{what}: {name} ({fingerprint(public)})")


def _shown(name: str | None, public: bytes) -> dict[str, str | None]:
    from esperd.actors.keys import fingerprint

    return {"name": name, "fingerprint": fingerprint(public), "public_key": public.hex()}
