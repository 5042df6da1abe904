"""``esperd``: run the daemon, look at its configuration, see a demonstration. Commands import what they need when they run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from esperd.cli.configured import DIRECTORY, config_option, load, state_option
from esperd.cli.database import db
from esperd.cli.exit_codes import run
from esperd.cli.options import Options, output_options
from esperd.cli.service import install_service

_options = click.make_pass_decorator(Options)


@click.group(name="esperd", context_settings={"help_option_names": ["-h", "--help"]})
@output_options
@click.version_option(package_name="esperd", message="%(prog)s %(version)s")
def esperd() -> None:
    """The esperd daemon: grows neural networks while they train."""


@esperd.command(name="run")
@config_option
@state_option
@output_options
def run_command(config_file: Path | None, state_dir: Path | None) -> int:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C. A second signal stops it at once; jobs stay resumable."""
    config = load(config_file, state_dir)
    from esperd.daemon.process import run_daemon
    from esperd.daemon.startable import require_startable

    return run_daemon(config, lambda: require_startable(load(config_file, state_dir)))


@esperd.group()
@output_options
def config() -> None:
    """Check or show the configuration."""


@config.command(name="check")
@config_option
@state_option
@output_options
@_options
def check_config(options: Options, config_file: Path | None, state_dir: Path | None) -> None:
    """Say whether the configuration is right. Exit code 2 when it is not."""
    from esperd.cli.output import Output
    from esperd.daemon.startable import require_startable

    require_startable(load(config_file, state_dir))
    output = Output(options)
    if output.as_json:
        output.json({"ok": True, "config": str(config_file) if config_file else None})
    else:
        output.line(f"{config_file or 'configuration'} is right")


@config.command(name="show")
@click.option("--origin", is_flag=True, help="Say where each value comes from: default, file, variable or option.")
@config_option
@state_option
@output_options
@_options
def show_config(options: Options, config_file: Path | None, state_dir: Path | None, *, origin: bool) -> None:
    """Show the configuration in force: every key, with defaults and variables applied, as TOML."""
    from esperd.cli.origins import config_with_origins, key_origins
    from esperd.cli.output import Output
    from esperd.cli.settings import as_toml

    config = load(config_file, state_dir)
    output = Output(options)
    if origin:
        origins = key_origins(config, config_file, state_dir)
        if output.as_json:
            output.json(config_with_origins(config, origins))
        else:
            output.line(as_toml(config, origins))
    elif output.as_json:
        output.json(config)
    else:
        output.line(as_toml(config))


esperd.add_command(db)
esperd.add_command(install_service)


@esperd.command()
@click.option(
    "--output",
    "directory",
    type=DIRECTORY,
    default=Path("demo-output"),
    show_default=True,
    help="Where the report and the grown model are written.",
)
@click.option("--state-dir", type=DIRECTORY, help="State of the demo's own daemon, kept between runs. Default: OUTPUT/state.")
@click.option("--rng-seed", type=click.IntRange(min=0), help="RNG seed of the job. Default: that of the demo's job file.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs to train. Default: those of the demo's job file.")
@output_options
@_options
def demo(options: Options, directory: Path, state_dir: Path | None, rng_seed: int | None, epochs: int | None) -> None:
    """Grow a network on handwritten digits: its own daemon, a live view, a report, the exported model."""
    from esperd.cli.demo import run_demo
    from esperd.cli.output import Output

    run_demo(Output(options), directory, state_dir or directory / "state", rng_seed=rng_seed, epochs=epochs)


def main() -> None:
    """Entry point of ``esperd``."""
    sys.exit(run(esperd))


if __name__ == "__main__":
    main()
