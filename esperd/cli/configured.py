"""What commands of `esperd` read first: the configuration, and which state directory it means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from esperd.config import Config

FILE = click.Path(dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)

config_option = click.option(
    "--config", "config_file", type=FILE, help="esperd.toml. Default: no file; ESPERD__SECTION__KEY variables count always."
)
state_option = click.option(
    "--state-dir", type=DIRECTORY, help="State directory; wins over daemon.state_directory of the configuration."
)


def load(config_file: Path | None, state_dir: Path | None) -> Config:
    """The configuration in force.

    Raises:
        ConfigError: when it is wrong; names the place.
    """
    import msgspec

    from esperd.config import load_config

    config = load_config(config_file)
    if state_dir is None:
        return config
    daemon = msgspec.structs.replace(config.daemon, state_directory=str(state_dir))
    return msgspec.structs.replace(config, daemon=daemon)
